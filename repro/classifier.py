"""A network that tells the class of a noisy image, joined to its noise levels: log p(label | x, sigma)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from repro import schedules, weights


class Classifier(nn.Module):
    """`net` as a classifier of x = y + sigma * n, in EDM's frame: c(x, sigma) -> [n, classes].

    net: called as net(x / sqrt(1 + sigma^2), time) for logits, with time [n] as the schedule tells it. It is
    trained on noise levels that the schedule draws (Dhariwal and Nichol 2021, section 4).
    """

    def __init__(self, net: nn.Module, schedule: schedules.DiscreteVP | schedules.EDM):
        super().__init__()
        self.net, self.schedule = net, schedule

    def with_net(self, net: nn.Module) -> Classifier:
        """The same with another network."""
        return Classifier(net, self.schedule)

    def forward(self, x: Float[Tensor, "n c h w"], sigma: Float[Tensor, " *n"]) -> Float[Tensor, "n classes"]:
        """Logarithms of the classes' probabilities, float32. sigma > 0: one number, or one per image."""
        sigma = sigma.to(x.device, torch.float64).expand(len(x))
        c_in = (1 / (1 + sigma**2).sqrt()).to(x.dtype)[:, None, None, None]
        return F.log_softmax(self.net((c_in * x).float(), self.schedule.network_time(sigma)).float(), dim=1)

    def loss(
        self,
        y: Float[Tensor, "n c h w"],
        noise: Float[Tensor, "n c h w"],
        sigma: Float[Tensor, " n"],
        labels: Int[Tensor, " n"],
        weight: weights.Weight | None = None,
    ) -> Float[Tensor, " n"]:
        """-log p(label | y + sigma * noise) of each image; a loss weight has no part in it."""
        log_probabilities = self(y + sigma.to(y.dtype)[:, None, None, None] * noise, sigma)
        return -log_probabilities.gather(1, labels[:, None])[:, 0]
