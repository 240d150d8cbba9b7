"""The KL autoencoder of LDM (Rombach et al. 2022): diffusers' AutoencoderKL, and its latents' scale."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repro import config
from repro.files import ReproError


class KLAutoencoder(nn.Module):
    """What `config` describes: net(x, noise) -> (reconstruction, mean, log variance).

    x: [n, in_channels, resolution, resolution], in [-1, 1]. Mean and log variance are those of the latents'
    normal distribution, [n, latent_channels, h, w] with h = resolution / 2^(resolutions - 1), as the network
    knows them: not scaled. noise: of the latents' shape; what is decoded is mean + deviation * noise.
    `scale`: what latents are multiplied by for a diffusion model, about 1 / their standard deviation; 1 until
    it is known. Raises `ReproError` for a side that cannot be halved so often.
    """

    def __init__(
        self, config: config.Autoencoder, resolution: int = 64, in_channels: int = 3, classes: int = 0
    ):
        super().__init__()
        halvings = len(config.channels) - 1
        if resolution % 2**halvings:
            raise ReproError(f"a side of {resolution} pixels cannot be halved {halvings} times")
        self.side = resolution >> halvings
        self.kl = _autoencoder_kl()(
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=("DownEncoderBlock2D",) * len(config.channels),
            up_block_types=("UpDecoderBlock2D",) * len(config.channels),
            block_out_channels=config.channels,
            layers_per_block=config.blocks,
            latent_channels=config.latent_channels,
            norm_num_groups=config.groups,
            sample_size=resolution,
        )
        self.register_buffer("scale", torch.ones(()))

    def encode(
        self, x: Float[Tensor, "n c h w"]
    ) -> tuple[Float[Tensor, "n l h2 w2"], Float[Tensor, "n l h2 w2"]]:
        """Mean and log variance of the latents of images in [-1, 1]."""
        mean, log_variance = self.kl.quant_conv(self.kl.encoder(x)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Float[Tensor, "n l h2 w2"]) -> Float[Tensor, "n c h w"]:
        """The images of latents that are not scaled, about [-1, 1]."""
        return self.kl.decoder(self.kl.post_quant_conv(latents))

    def forward(
        self, x: Float[Tensor, "n c h w"], noise: Float[Tensor, "n l h2 w2"]
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n l h2 w2"], Float[Tensor, "n l h2 w2"]]:
        """Encode, draw latents, and decode them."""
        mean, log_variance = self.encode(x)
        return self.decode(mean + (0.5 * log_variance).exp() * noise), mean, log_variance


def _autoencoder_kl() -> type[nn.Module]:
    """diffusers' class, imported without torchvision.

    Which it does not need, and which breaks the import where it was built for another torch. Raises
    `ReproError` without diffusers.
    """
    try:
        from diffusers.utils import import_utils
    except ImportError as error:
        raise ReproError("latents need the package diffusers, which is not installed") from error
    known = import_utils._torchvision_available
    import_utils._torchvision_available = False
    try:
        from diffusers import AutoencoderKL
    finally:
        import_utils._torchvision_available = known
    return AutoencoderKL
