"""An autoencoder joined to what it is trained on: pixels, features, and the spread of its latents."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repro import config, evaluate, schedules
from repro.files import ReproError


class Features(nn.Module):
    """Features of EfficientNet-Lite0 along its way down: images in [-1, 1] -> four maps of unit vectors.

    After the last block of each side from 1/2 to 1/16 of the image's, where LPIPS (Zhang et al. 2018) takes
    VGG's; not weighted by people's judgements, as LPIPS' are.
    """

    AFTER = (0, 2, 4, 10)
    """Blocks of the network after which a map is taken."""

    def __init__(self):
        super().__init__()
        self.network = evaluate.EfficientNetLite0().network.eval().requires_grad_(False)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> list[Float[Tensor, "n _ _ _"]]:
        """The maps, each divided by its length over channels."""
        net, maps = self.network, []
        x = net._swish(net._bn0(net._conv_stem(x)))
        for number, block in enumerate(net._blocks[: self.AFTER[-1] + 1]):
            x = block(x)
            if number in self.AFTER:
                maps.append(x / (x.float().square().sum(1, keepdim=True).sqrt() + 1e-6))
        return maps


class Autoencoder(nn.Module):
    """`net` and what it is trained on (Rombach et al. 2022, section 3.1, without the discriminator).

    The loss of an image is the mean absolute error of a pixel, plus `kl_weight` times the divergence of its
    latents from a standard normal distribution, over its number of pixel values, plus `feature_weight` times
    the squared difference of `Features`, summed over channels, and the mean over places and maps.
    """

    def __init__(
        self, net: nn.Module, how: config.Autoencoder, schedule: schedules.DiscreteVP | schedules.EDM,
        features: Features | None = None,
    ):  # fmt: skip
        super().__init__()
        self.net, self.how, self.schedule = net, how, schedule
        self.features = features or (Features() if how.feature_weight else None)

    def with_net(self, net: nn.Module) -> Autoencoder:
        """The same with another network."""
        return Autoencoder(net, self.how, self.schedule, self.features)

    def loss(
        self,
        y: Float[Tensor, "n c h w"],
        noise: Float[Tensor, "n c h w"],
        sigma: Tensor | None = None,
        labels: Tensor | None = None,
        weight: object = None,
    ) -> Float[Tensor, " n"]:
        """The loss of each image; noise level, label and loss weight have no part in it.

        noise: of the images' shape, as for a denoiser; the latents take the first numbers of it.
        """
        side = y.shape[-1] >> (len(self.how.channels) - 1)
        shape = (self.how.latent_channels, side, side)
        if noise[0].numel() < math.prod(shape):
            raise ReproError(
                f"latents of {math.prod(shape):,} numbers are more than the {noise[0].numel():,} of an image"
            )
        noise = noise.reshape(len(noise), -1)[:, : math.prod(shape)].reshape(-1, *shape)
        again, mean, log_variance = self.net(y, noise)
        error = (again.float() - y).abs().mean((1, 2, 3))
        mean, log_variance = mean.float(), log_variance.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))
        loss = error + self.how.kl_weight * divergence / y[0].numel()
        if self.features is not None:
            maps = zip(self.features(again), self.features(y), strict=True)
            apart = [(one - other).float().square().sum(1).mean((1, 2)) for one, other in maps]
            loss = loss + self.how.feature_weight * torch.stack(apart).mean(0)
        return loss
