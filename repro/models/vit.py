"""The paper's ViT: a plain transformer over the tokens [time, class, patches].

Block for block, and tensor name for tensor name, the network of the released checkpoints (the Min-SNR
authors' release v0.0.0), so that their state dicts load as they are. Sizes: Table 1 of the supplement.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from repro import config as configs
from repro.files import ReproError
from repro.models import recompute, vit_fused


class ViT(nn.Module):
    """Vision transformer that predicts an image from a noisy one, its timestep and its class.

    With `classes == 0` there is no class token: the tokens are [time, patches]. Pixels enter and leave
    the network in float32 and layer norms are computed in it, also under autocast.
    """

    recompute = False
    """Whether training computes blocks again in backward passes (see `recompute`)."""

    def __init__(self, config: configs.ViT, resolution: int, in_channels: int, classes: int):
        """For square images of side `resolution` (pixels) and `classes` classes (0: unconditional).

        Raises `ReproError` where the patch does not divide the resolution or the heads the width.
        """
        super().__init__()
        _check_sizes(config, resolution)
        self.resolution, self.in_channels, self.classes = resolution, in_channels, classes
        self.patch, self.heads, self.null_class = config.patch, config.heads, config.null_class
        width, patches = config.width, (resolution // config.patch) ** 2
        self.other_tokens = 2 if classes else 1  # before the patches: time and class, or time alone

        self.time_embedding = nn.Embedding(config.time_rows, width)
        self.class_embedding = nn.Embedding(classes + config.null_class, width) if classes else None
        self.patch_embed = PatchEmbed(in_channels, width, config.patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.other_tokens + patches, width))
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        # No norm before it: the residual stream is projected as it is.
        self.linear_projection = nn.Linear(width, config.patch**2 * in_channels)
        self._initialise()

    def forward(
        self, x: Float[Tensor, "n c h w"], t: Float[Tensor, " n"], labels: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n c h w"]:
        """The network's output F(x, t, labels), of the shape of `x`.

        `x`: the scaled input (x_t = alpha y + sigma n of a VP schedule). `t`: timestep indices, rounded to
        the nearest row of the time table, in 0 to time_rows - 1. `labels`: classes in 0 to classes - 1, or
        `classes` for the null class; None: the null class for all. Raises `ReproError` for an image of
        another size, for labels that this network cannot take, and, on a CPU, for a timestep or label out
        of range (on a GPU that check would wait for the device: the lookup itself aborts there).
        """
        self._check_input(x, labels)
        # s = tokens, k = patches, d = width, p = patch side
        time = self._look_up(self.time_embedding, t.round().long(), "timestep")  # [n, d]
        tokens = [time.unsqueeze(1)]  # [n, 1, d]
        if self.class_embedding is not None:
            labels = torch.full_like(t, self.classes, dtype=torch.long) if labels is None else labels  # [n]
            tokens.append(self._look_up(self.class_embedding, labels, "label").unsqueeze(1))  # [n, 1, d]
        with _without_autocast(x.device):
            tokens.append(self.patch_embed(x))  # [n, k, d]
        z = torch.cat(tokens, dim=1) + self.pos_embed  # [n, s, d]
        if vit_fused.can_take(z, self.heads):
            z = vit_fused.run(self.blocks, z, self.recompute and self.training)  # [n, s, d]
        else:
            for block in self.blocks:
                z = recompute.block(self.recompute and self.training, block, z)  # [n, s, d]
        z = z[:, self.other_tokens :]  # [n, k, d]
        with _without_autocast(x.device):
            z = self.linear_projection(z)  # [n, k, p p c]
        return unpatchify(z, self.patch, self.resolution)  # [n, c, h, w]

    def _check_input(self, x: Tensor, labels: Tensor | None) -> None:
        """Raise `ReproError` for what this network cannot take. Looks at shapes alone, never at values."""
        expected = (self.in_channels, self.resolution, self.resolution)
        if tuple(x.shape[1:]) != expected:
            raise ReproError(
                f"this ViT takes images of {' x '.join(map(str, expected))} (channels, height, width), "
                f"not {' x '.join(map(str, x.shape[1:]))}; build it for that size or resize the images."
            )
        if labels is not None and not self.classes:
            raise ReproError("this ViT is unconditional (classes = 0): call it with labels = None.")
        if labels is None and self.classes and not self.null_class:
            raise ReproError(
                f"this ViT has {self.classes} classes and no null class: pass labels, "
                "or train it with null_class = True."
            )

    def check_fp8(self, device: str | torch.device) -> None:
        """Raise `ReproError` where the blocks cannot take products of float8 numbers on `device`."""
        mlp = self.blocks[0].mlp
        tokens, width = self.pos_embed.shape[1:]
        vit_fused.check_fp8(device, tokens, width, self.heads, mlp.fc1.out_features)

    @staticmethod
    def _look_up(table: nn.Embedding, index: Tensor, what: str) -> Tensor:
        try:
            return table(index)
        except IndexError as error:
            raise ReproError(
                f"a {what} lies outside this ViT's table: it must be in 0 to {table.num_embeddings - 1}."
            ) from error

    @torch.no_grad()
    def _initialise(self) -> None:
        """The authors' initialisation (BEiT's); embeddings and the patch convolution keep torch's own."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer, block in enumerate(self.blocks, start=1):
            # Each block adds two branches: the variance of the residual stream stays bounded with depth.
            block.attn.proj.weight.div_(math.sqrt(2 * layer))
            block.mlp.fc2.weight.div_(math.sqrt(2 * layer))
        self.linear_projection.weight.mul_(0.001)


class PatchEmbed(nn.Module):
    """Each p × p patch, linearly, to one token; tokens in row-major order."""

    def __init__(self, in_channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, stride=patch)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k d"]:
        """[n, c, h, w] to [n, (h / p) (w / p), d]."""
        p = self.proj.stride[0]
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [n, c, h / p, p, w / p, p]
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [n, k, c p p]
        # the convolution as one matrix product: cuDNN would pad few channels to many
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # [n, k, d]


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(mlp_ratio * width))

    def forward(self, x: Float[Tensor, "n s d"]) -> Float[Tensor, "n s d"]:
        """[n, s, d] to [n, s, d]."""
        x = x + self.attn(self.norm1(x))  # [n, s, d]
        return x + self.mlp(self.norm2(x))  # [n, s, d]


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in at least float32, whatever the precision around it."""

    def forward(self, x: Float[Tensor, "n s d"]) -> Float[Tensor, "n s d"]:
        """[n, s, d] to [n, s, d], in the dtype of `x`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)  # [d], [d]
        y = F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps)  # [n, s, d]
        return y.to(x.dtype)  # [n, s, d]


class Attention(nn.Module):
    """Multi-head self-attention; query and value have a bias, the key has none.

    A bias of the key would add the same number to all logits of a query, which softmax ignores.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n s d"]) -> Float[Tensor, "n s d"]:
        """[n, s, d] to [n, s, d]; logits are scaled by (d / heads)^-1/2."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))  # [3 d]
        qkv = F.linear(x, self.qkv.weight, bias)  # [n, s, 3 d]
        qkv = qkv.unflatten(2, (3, self.heads, -1))  # [n, s, 3, heads, d / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # three of [n, heads, s, d / heads]
        x = F.scaled_dot_product_attention(q, k, v)  # [n, heads, s, d / heads]
        x = x.transpose(1, 2).flatten(2)  # [n, s, d]
        return self.proj(x)  # [n, s, d]


class MLP(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "n s d"]) -> Float[Tensor, "n s d"]:
        """[n, s, d] to [n, s, d]."""
        x = F.gelu(self.fc1(x))  # [n, s, hidden]
        return self.fc2(x)  # [n, s, d]


def unpatchify(x: Float[Tensor, "n k v"], patch: int, resolution: int) -> Float[Tensor, "n c h w"]:
    """Patches in row-major order, each laid out (p, p, channels), to images of side `resolution` (pixels)."""
    side = resolution // patch
    x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # [n, h / p, w / p, p, p, c]
    x = x.permute(0, 5, 1, 3, 2, 4)  # [n, c, h / p, p, w / p, p]
    return x.flatten(4, 5).flatten(2, 3)  # [n, c, h, w]


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which autocast is off; the meta device, on which shapes are counted, has none.

    Named, since torch 2.11 cannot compile the question whether a device has autocast.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _check_sizes(config: configs.ViT, resolution: int) -> None:
    """Raise `ReproError` where the patch does not divide the resolution or the heads the width."""
    if config.patch < 1 or resolution % config.patch:
        raise ReproError(
            f"a ViT of patch {config.patch} cannot cover images of side {resolution}: "
            "choose a patch that divides the resolution."
        )
    if config.heads < 1 or config.width % config.heads:
        divisors = [heads for heads in range(1, 2 * config.heads + 1) if config.width % heads == 0]
        near = [str(heads) for heads in divisors if 2 * heads >= config.heads] or ["1"]
        raise ReproError(
            f"a ViT of width {config.width} cannot be split into {config.heads} heads: "
            f"choose a number of heads that divides it, such as {' or '.join(near)}."
        )
