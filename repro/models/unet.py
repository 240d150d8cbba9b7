"""The UNet of ADM (Dhariwal and Nichol 2021, section 3; class `UNetModel` of openai/guided-diffusion).

`ResidualBlock`, `Attention` and `Resample` are the blocks; `ADMUNet` and `NoisyClassifier` wire them. LDM's
UNet (Rombach et al. 2022; `UNetModel` of CompVis/latent-diffusion) is the same wiring with a
`SpatialTransformer` for each `Attention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from repro import config
from repro.files import ReproError
from repro.models import recompute
from repro.models.norm import GroupNorm
from repro.models.vit import LayerNorm


class Map(NamedTuple):
    """A feature map, x + the maps in `more` + offset, not added up yet.

    All that is done with it can be done by the next norm without passing over the map once more: it adds the
    maps where it reads them, and takes an offset (the biases of the convolutions before) as it is.
    """

    x: Float[Tensor, "n c h w"]
    offset: Float[Tensor, " c"]
    more: tuple[Float[Tensor, "n c h w"], ...] = ()

    def whole(self) -> Float[Tensor, "n c h w"]:
        """The map as one tensor."""
        return sum(self.more, self.x) + self.offset.to(self.x.dtype)[:, None, None]


class Resample(nn.Module):
    """Halve (mean of 2 x 2) or double (nearest) the side, with a 3 x 3 convolution where `convolve`."""

    def __init__(self, channels: int, factor: str, convolve: bool):
        super().__init__()
        self.factor = factor
        stride = 2 if factor == "down" else 1
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1) if convolve else None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        """Halve or double the side; the convolution's bias is left to the caller."""
        if self.factor == "down":
            return F.avg_pool2d(x, 2) if self.conv is None else F.conv2d(x, self.conv.weight, None, 2, 1)
        if self.conv is not None:
            # Doubled pixels see sums of neighbouring weights: one transposed convolution by 4 x 4
            # instead of 3 x 3 on four times the pixels, 4/9 of the arithmetic and no doubled map.
            kernel = F.pad(self.conv.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))
            kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
            kernel = kernel[:, :, :, 1:] + kernel[:, :, :, :-1]
            kernel = kernel.contiguous(memory_format=torch.channels_last)
            return F.conv_transpose2d(x, kernel, stride=2, padding=1)
        n, c, h, w = x.shape
        # written as a broadcast, since compiled, the gradient of F.interpolate is a slow scatter; of
        # pixels, then channels, which is how they lie in memory
        x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, h, 2, w, 2, c)
        return x.reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """norm, SiLU, (resample), convolve; norm, SiLU, dropout, convolve; plus the (resampled) input.

    emb_width: width of the embedding of time and class, which scales and shifts the second norm
    (`scale_shift_norm`) or is added before it. The last convolution starts at zero.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        emb_width: int,
        dropout: float,
        scale_shift_norm: bool,
        resample: str | None = None,
    ):
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.norm_in = GroupNorm(channels_in)
        self.resample = None if resample is None else Resample(channels_in, resample, convolve=False)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.emb = nn.Linear(emb_width, 2 * channels_out if scale_shift_norm else channels_out)
        self.norm_out = GroupNorm(channels_out)
        self.dropout = dropout
        self.conv_out = zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(
        self, h: Map, condition: Float[Tensor, "n _"], skip: Map | None = None, keep: bool = False
    ) -> tuple[Map, Map | None]:
        """The block's output; with `keep`, also its input for later use (whose gradient is then added where
        the norm's is formed).

        condition: emb(SiLU(embedding of time and class)), see `Encoder.conditions`. skip: more channels of
        the input (the decoder's skip connection). Both stay apart, since joining them, and splitting the
        gradient, would cost a pass over memory each.
        """
        maps = (h,) if skip is None else (h, skip)
        offset = torch.cat([map.offset for map in maps])
        z, parts = self.norm_in.beside(
            *[map.x for map in maps], more=h.more, offset=offset, silu=True, copies=2 if keep else 1
        )
        parts, kept = parts[: len(maps)], Map(parts[-1], h.offset) if keep else None
        if self.resample is not None:  # which leaves an offset as it is
            z, parts = self.resample(z), tuple(self.resample(part) for part in parts)
        z = F.conv2d(z, self.conv_in.weight, padding=1)  # its bias goes into the norm
        bias = self.conv_in.bias
        dropout = self.dropout if self.training else 0.0
        if self.scale_shift_norm:
            scale, shift = condition.chunk(2, dim=1)
            z = self.norm_out(z, scale=scale, shift=shift, offset=bias, silu=True, dropout=dropout)
        else:
            z = self.norm_out(z, offset=bias + condition, silu=True, dropout=dropout)
        beside, offset = self._skipped(parts, offset)
        more = (*beside, F.conv2d(z, self.conv_out.weight, padding=1))
        return Map(more[0], offset + self.conv_out.bias, more[1:]), kept

    def _skipped(self, parts: tuple[Tensor, ...], offset: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """What is added to the block's result: maps, and their offset."""
        if isinstance(self.skip, nn.Identity):
            return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1),), offset
        kernels = self.skip.weight.split([part.shape[1] for part in parts], dim=1)
        maps = tuple(F.conv2d(part, kernel) for part, kernel in zip(parts, kernels, strict=True))
        return maps, (self.skip.weight * offset[:, None, None]).sum((1, 2, 3)) + self.skip.bias


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, added to its input; starts as the identity."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ReproError(
                f"{channels} channels cannot be split into {heads} attention heads of equal width"
            )
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)  # heads, then q k v, then channels of a head
        self.proj = zeroed(nn.Linear(channels, channels))

    def forward(self, h: Map) -> Map:
        """Attend over all pixels."""
        n, c, height, width = h.x.shape
        tokens, (x,) = self.norm.beside(h.x, more=h.more, offset=h.offset)
        tokens = tokens.permute(0, 2, 3, 1).reshape(n, height * width, c)  # n hw c
        qkv = self.qkv(tokens).view(n, height * width, self.heads, 3, c // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)  # n heads hw c/heads
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        mixed = F.linear(mixed, self.proj.weight).view(n, height, width, c).permute(0, 3, 1, 2)
        return Map(x, h.offset + self.proj.bias, (mixed,))


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of a feature map, which also attends to a context (Rombach et al. 2022,
    appendix E.2.1; class `SpatialTransformer` of CompVis/latent-diffusion). Starts as the identity.

    norm; a linear layer; `depth` blocks; a linear layer, zero at the start; plus the input. Raises
    `ReproError` where `heads` do not divide the channels.
    """

    def __init__(self, channels: int, heads: int, depth: int, context_width: int):
        super().__init__()
        if channels % heads:
            raise ReproError(
                f"{channels} channels cannot be split into {heads} attention heads of equal width"
            )
        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_width) for _ in range(depth))
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, h: Map, context: Float[Tensor, "n k e"]) -> Map:
        """Attend over all pixels and to all tokens of `context`, block by block."""
        n, c, height, width = h.x.shape
        tokens, (x,) = self.norm.beside(h.x, more=h.more, offset=h.offset)
        tokens = self.proj_in(tokens.permute(0, 2, 3, 1).reshape(n, height * width, c))  # n hw c
        for block in self.blocks:
            tokens = block(tokens, context)
        out = F.linear(tokens, self.proj_out.weight).view(n, height, width, c).permute(0, 3, 1, 2)
        return Map(x, h.offset + self.proj_out.bias, (out,))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to a context and a gated MLP, each after a norm, added to its input."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm_self = LayerNorm(width)
        self.attend_self = CrossAttention(width, heads, width)
        self.norm_context = LayerNorm(width)
        self.attend_context = CrossAttention(width, heads, context_width)
        self.norm_mlp = LayerNorm(width)
        self.gated = nn.Linear(width, 8 * width)  # the hidden layer, then its gate
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "n s d"], context: Float[Tensor, "n k e"]) -> Float[Tensor, "n s d"]:
        """[n, s, d] to [n, s, d]."""
        z = self.norm_self(x)
        x = x + self.attend_self(z, z)
        x = x + self.attend_context(self.norm_context(x), context)
        hidden, gate = self.gated(self.norm_mlp(x)).chunk(2, dim=2)  # two of [n, s, 4 d]
        return x + self.mlp_out(hidden * F.gelu(gate))  # GEGLU (Shazeer 2020)


class CrossAttention(nn.Module):
    """Attention of tokens to others, or to themselves; only the last of its projections has a bias.

    To a single token, as that of a class, all attend alike: queries, keys and the norm before have no effect
    then. They are kept, since they are parameters of the published network.
    """

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * width, bias=False)  # keys, then values
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n s d"], context: Float[Tensor, "n k e"]) -> Float[Tensor, "n s d"]:
        """[n, s, d] and what they attend to, [n, k, e], to [n, s, d]."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # n heads s d/heads
        k, v = self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # n heads k d/heads
        mixed = F.scaled_dot_product_attention(q, k, v)  # n heads s d/heads
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """What the UNet and the noisy classifier share: time, the way down, and the middle."""

    recompute = False
    """Whether training computes steps again in backward passes (see `recompute`)."""

    def __init__(self, config: config.UNet | config.NoisyClassifier, resolution: int, in_channels: int):
        super().__init__()
        levels = len(config.multipliers)
        if resolution % 2 ** (levels - 1):
            raise ReproError(f"a side of {resolution} pixels cannot be halved {levels - 1} times")
        sides = [resolution >> level for level in range(levels)]
        if missing := sorted(set(config.attention) - set(sides)):
            raise ReproError(
                f"no feature map has the side {missing} asked for in attention; there are {sides}"
            )
        self.config, self.channels, self.emb_width = config, config.channels, 4 * config.channels
        self.sides = sides
        self.widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.time_in = nn.Linear(config.channels, self.emb_width)
        self.time_out = nn.Linear(self.emb_width, self.emb_width)
        channels = self.widths[0]
        self.conv_in = InputConvolution(in_channels, channels, 3, padding=1)
        self.skip_widths = [channels]
        self.encoder = nn.ModuleList()
        for level, (side, width) in enumerate(zip(sides, self.widths, strict=True)):
            for _ in range(config.blocks):
                self.encoder.append(Step(self.residual(channels, width)))
                channels = width
                if side in config.attention:
                    self.encoder[-1].append(self.attention(channels))
                self.skip_widths.append(channels)
            if level < levels - 1:
                self.encoder.append(Step(self.resampling(channels, "down")))
                self.skip_widths.append(channels)
        self.middle = Step(
            self.residual(channels, channels), self.attention(channels), self.residual(channels, channels)
        )

    def residual(self, channels_in: int, channels_out: int, resample: str | None = None) -> ResidualBlock:
        """A residual block as configured."""
        how = self.config
        return ResidualBlock(
            channels_in, channels_out, self.emb_width, how.dropout, how.scale_shift_norm, resample
        )

    def resampling(self, channels: int, factor: str) -> nn.Module:
        """What halves or doubles the side, as configured."""
        if self.config.resample_in_blocks:
            return self.residual(channels, channels, factor)
        return Resample(channels, factor, convolve=True)

    def attention(self, channels: int) -> Attention | SpatialTransformer:
        """Self-attention with as many heads as configured."""
        return Attention(channels, heads_for(self.config, channels))

    def embed_time(self, t: Float[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n e"]:
        """The embedding of the time."""
        return self.time_out(F.silu(self.time_in(sinusoids(t, self.channels).to(dtype))))

    def conditions(self, emb: Float[Tensor, "n e"]) -> Iterator[list[Float[Tensor, "n _"]]]:
        """What the residual blocks of each step are conditioned on, in their order: their layers `emb` of
        SiLU(`emb`).

        All by one product, since each by itself is too small to occupy a GPU.
        """
        steps = [step.residuals() for step in self.modules() if isinstance(step, Step)]
        layers = [block.emb for step in steps for block in step]
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        all_of_them = F.linear(F.silu(emb), weight, bias)
        each = iter(all_of_them.split([layer.out_features for layer in layers], dim=1))
        return iter([[next(each) for _ in step] for step in steps])

    def encode(
        self,
        x: Float[Tensor, "n c h w"],
        conditions: Iterator[list[Float[Tensor, "n _"]]],
        keep: bool,
        context: Float[Tensor, "n k e"] | None = None,
    ) -> tuple[Map, list[Map | None]]:
        """The middle's output; with `keep`, also the maps on the way down, for the way up."""
        h = Map(self.conv_in(x), self.conv_in.bias)
        skips = []
        for step in (*self.encoder, self.middle):
            h, kept = self.through(step, h, next(conditions), None, keep, context)
            skips.append(kept)
        return h, skips

    def through(
        self,
        step: Step,
        h: Map,
        conditions: list[Float[Tensor, "n _"]],
        skip: Map | None,
        keep: bool,
        context: Float[Tensor, "n k e"] | None,
    ) -> tuple[Map, Map | None]:
        """What `step` gives (see `Step`), which `self.recompute` lets backward passes compute again.

        Then all that enters a step is kept. So that this is one map, its maps are added up, within the step
        before, and what is for later is what entered, not another output (nor would a skip's `more` be read).
        """
        if not (self.recompute and self.training):
            return step(h, conditions, skip, keep, context)
        after = recompute.block(True, _summed, step, h, conditions, skip, context)
        return after, h if keep else None


def _summed(step, h, conditions, skip, context):
    """What `step` makes of the rest, with the maps added up."""
    h, _ = step(h, conditions, skip, False, context)
    return Map(sum(h.more, h.x), h.offset)


def heads_for(config: config.UNet | config.NoisyClassifier, channels: int) -> int:
    """Attention heads for a map of `channels`; raises `ReproError` where they do not divide it."""
    if config.head_channels and channels % config.head_channels:
        raise ReproError(f"{channels} channels do not divide into heads of {config.head_channels}")
    return config.heads or channels // config.head_channels


class ADMUNet(Encoder):
    """The UNet that `config` describes: net(x, t, labels) -> [n, out_channels, h, w].

    x: [n, in_channels, resolution, resolution]. t: [n] float32, embedded by sines and cosines.
    labels: [n] in [0, classes], where `classes` itself is the null class; none means all null. Their
    embedding is added to that of the time, or is what LDM's transformers attend to, where it has these.
    Raises `ReproError` for sizes that do not fit each other and for labels the network cannot take.
    """

    def __init__(
        self,
        config: config.UNet,
        resolution: int = 64,
        in_channels: int = 3,
        classes: int = 0,
        out_channels: int | None = None,
    ):
        super().__init__(config, resolution, in_channels)
        if config.context_width and not classes:
            raise ReproError("transformers that attend to a class (context_width) need data with classes")
        self.classes, self.null_class = classes, config.null_class
        label_width = config.context_width or self.emb_width
        self.label_table = nn.Embedding(classes + config.null_class, label_width) if classes else None
        self.decoder = nn.ModuleList()
        channels, skips = self.widths[-1], list(self.skip_widths)
        for level in reversed(range(len(self.widths))):
            for block in range(config.blocks + 1):
                self.decoder.append(Step(self.residual(channels + skips.pop(), self.widths[level])))
                channels = self.widths[level]
                if self.sides[level] in config.attention:
                    self.decoder[-1].append(self.attention(channels))
                if level > 0 and block == config.blocks:
                    self.decoder[-1].append(self.resampling(channels, "up"))
        self.norm_out = GroupNorm(channels)
        self.conv_out = zeroed(OutputConvolution(channels, out_channels or in_channels, 3, padding=1))

    def attention(self, channels: int) -> Attention | SpatialTransformer:
        """Self-attention, or LDM's transformer, with as many heads as configured."""
        how = self.config
        if how.transformer_depth is None:
            return super().attention(channels)
        return SpatialTransformer(
            channels, heads_for(how, channels), how.transformer_depth, how.context_width
        )

    def forward(
        self, x: Float[Tensor, "n c h w"], t: Float[Tensor, " n"], labels: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n out h w"]:
        """What the network predicts, in the precision of `x`."""
        emb, context = self.embed_time(t, x.dtype), None  # n e
        if self.classes or labels is not None:
            label = self._embed(labels, len(x))
            if self.config.context_width:
                context = label[:, None]  # n 1 context_width
            else:
                emb = emb + label
        conditions = self.conditions(emb)
        h, skips = self.encode(x, conditions, keep=True, context=context)
        for step in self.decoder:
            h, _ = self.through(step, h, next(conditions), skips.pop(), False, context)
        with torch.autocast(x.device.type, enabled=False):  # as ADM: the output keeps its digits
            return self.conv_out(self.norm_out(h.x, more=h.more, offset=h.offset, silu=True))  # n out h w

    def _embed(self, labels: Int[Tensor, " n"] | None, n: int) -> Float[Tensor, "n e"]:
        if not self.classes:
            raise ReproError("labels were given to a network without classes")
        if labels is None:
            if not self.null_class:
                raise ReproError("this network has no null class: it needs labels")
            labels = torch.full((n,), self.classes, device=self.label_table.weight.device)
        return self.label_table(labels)


class NoisyClassifier(Encoder):
    """ADM's noisy classifier (class `EncoderUNetModel`): net(x, t) -> logits [n, classes], float32.

    Half a UNet: the way down and the middle, then attention pooling. x: [n, in_channels, resolution,
    resolution], scaled as for the UNet. t: [n] float32. Raises `ReproError` for sizes that do not fit.
    """

    def __init__(self, config: config.NoisyClassifier, resolution: int, in_channels: int, classes: int):
        super().__init__(config, resolution, in_channels)
        if not classes:
            raise ReproError("a classifier needs data with classes (data.classes)")
        self.norm_out = GroupNorm(self.widths[-1])
        self.pool = AttentionPool(self.widths[-1], self.sides[-1], config, classes)

    def forward(self, x: Float[Tensor, "n c h w"], t: Float[Tensor, " n"]) -> Float[Tensor, "n classes"]:
        """Logits of the classes."""
        h, _ = self.encode(x, self.conditions(self.embed_time(t, x.dtype)), keep=False)
        return self.pool(self.norm_out(h.x, more=h.more, offset=h.offset, silu=True)).float()


class AttentionPool(nn.Module):
    """The mean of all pixels attends over the pixels and itself (Radford et al. 2021, as in ADM)."""

    def __init__(self, channels: int, side: int, config: config.NoisyClassifier, classes: int):
        super().__init__()
        self.heads = heads_for(config, channels)
        self.position = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)  # the mean's first
        self.qkv = nn.Linear(channels, 3 * channels)  # q k v, then heads, then channels of a head
        self.proj = nn.Linear(channels, classes)

    def forward(self, h: Float[Tensor, "n c s s"]) -> Float[Tensor, "n classes"]:
        """The mean's token after attention, projected."""
        n, c = h.shape[:2]
        tokens = h.flatten(2)  # n c hw
        tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + self.position.to(h.dtype)
        qkv = self.qkv(tokens.transpose(1, 2)).view(n, -1, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # n heads hw+1 c/heads
        mean = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # only the mean's token is asked for
        return self.proj(mean.transpose(1, 2).reshape(n, c))


class Step(nn.ModuleList):
    """Blocks in a row; `conditions` has one for each residual block."""

    def __init__(self, *blocks: nn.Module):
        super().__init__(blocks)

    def residuals(self) -> list[ResidualBlock]:
        """Its residual blocks."""
        return [block for block in self if isinstance(block, ResidualBlock)]

    def forward(
        self,
        h: Map,
        conditions: list[Float[Tensor, "n _"]],
        skip: Map | None = None,
        keep: bool = False,
        context: Float[Tensor, "n k e"] | None = None,
    ) -> tuple[Map, Map | None]:
        """Pass `h` through the blocks in turn; `skip` goes to the first, `context` to each transformer. With
        `keep`, also `h` for later."""
        kept, conditions = None, iter(conditions)
        for place, block in enumerate(self):
            if isinstance(block, ResidualBlock):
                h, before = block(h, next(conditions), skip, keep and place == 0)
            elif isinstance(block, Resample):  # at a map's edge, no offset is like another
                before = Map(h.whole(), torch.zeros_like(h.offset))
                h = Map(block(before.x), block.conv.bias)
            elif isinstance(block, SpatialTransformer):
                h, before = block(h, context), None
            else:
                h, before = block(h), None
            kept, skip = before if place == 0 else kept, None
        return h, kept


class InputConvolution(nn.Conv2d):
    """The first convolution, 3 x 3 of a few channels; its bias is left to the caller."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out h w"]:
        """Convolve: in half precision, and where no gradient by `x` is asked for, as one matrix product.

        A convolution by itself would pad few channels to many.
        """
        if x.requires_grad or not torch.is_autocast_enabled(x.device.type):
            return F.conv2d(x, self.weight, padding=1)
        n, c, height, width = x.shape
        dtype = torch.get_autocast_dtype(x.device.type)
        pixels = F.pad(x.to(dtype), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # n c h w 3 3
        pixels = _pad_columns(pixels.permute(0, 2, 3, 1, 4, 5).reshape(n * height * width, 9 * c))
        kernel = _pad_columns(self.weight.reshape(-1, 9 * c))
        return F.linear(pixels, kernel).view(n, height, width, -1).permute(0, 3, 1, 2)


class OutputConvolution(nn.Conv2d):
    """The last convolution, 3 x 3 to a few channels: of a half precision map, its output is float32."""

    def forward(self, h: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out h w"]:
        """Convolve in the map's precision; sum, and give out, in the weights'."""
        if h.dtype == self.weight.dtype:
            return super().forward(h)
        return _FewOutputs.apply(h, self.weight, self.bias)


class _FewOutputs(torch.autograd.Function):
    """A 3 x 3 convolution of a half precision map to few channels, with sums and output in float32.

    One matrix product makes all 9 contributions of each pixel, which are then shifted and added: a
    convolution by itself would waste most of its tiles on outputs that are not there.
    """

    @staticmethod
    def forward(ctx, h, weight, bias):
        n, c, height, width = h.shape
        kernel = _pad_columns(weight.permute(1, 2, 3, 0).reshape(c, -1)).to(h.dtype)  # c, 9 * outputs or more
        pixels = h.permute(0, 2, 3, 1).reshape(-1, c)  # n*h*w c
        ctx.save_for_backward(pixels, kernel)
        ctx.shape, ctx.weight_shape = h.shape, weight.shape
        parts = _wide_product(pixels, kernel)[:, : 9 * len(bias)].view(n, height, width, 3, 3, len(bias))
        parts = F.pad(parts, (0, 0, 0, 0, 0, 0, 1, 1, 1, 1))
        out = sum(
            parts[:, y : y + height, x : x + width, y, x] for y in range(3) for x in range(3)
        )  # n h w outputs
        return (out + bias).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, dout):
        pixels, kernel = ctx.saved_tensors
        n, c, height, width = ctx.shape
        outputs = ctx.weight_shape[0]
        padded = F.pad(dout.permute(0, 2, 3, 1).to(pixels.dtype), (0, 0, 1, 1, 1, 1))
        # what reaches a pixel's part (y, x) is the output that lies (1 - y, 1 - x) beside it
        dparts = padded.unfold(1, 3, 1).unfold(2, 3, 1).flip(4, 5).permute(0, 1, 2, 4, 5, 3)
        dparts = _pad_columns(dparts.reshape(-1, 9 * outputs))
        dh = (dparts @ kernel.T).view(n, height, width, c).permute(0, 3, 1, 2)
        dkernel = _wide_product(pixels.T, dparts)[:, : 9 * outputs].view(c, 3, 3, outputs)
        return dh, dkernel.permute(3, 0, 1, 2), dout.sum((0, 2, 3))


def _pad_columns(matrix: Tensor) -> Tensor:
    """`matrix` with columns of zeros up to a multiple of 16: rows that GPUs read whole."""
    return F.pad(matrix, (0, -matrix.shape[1] % 16))


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of half precision matrices, in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def sinusoids(t: Float[Tensor, " n"], width: int) -> Float[Tensor, "n width"]:
    """Cosines, then sines, of t at `width / 2` frequencies from 1 down to 1 / 10000 (Ho et al. 2020)."""
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10_000) / half)
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with all parameters set to zero, so that what it adds starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
