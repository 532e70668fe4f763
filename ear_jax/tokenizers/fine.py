"""The fine branch of Lite-Hybrid: a UNet that refines what the coarse levels left over into fine tokens."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.nn.unet import UNet


class FineResidual(nnx.Module):
    """u = r + UNet(r), with a UNet (down, middle, up) that starts at zero.

    Raises:
        ValueError: the latent's side cannot be halved between all levels of the UNet.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        latent_grid: int,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        factor = 2 ** (len(multipliers) - 1)
        if latent_grid % factor:
            raise ValueError(
                f"fine multipliers {multipliers} halve the latent {len(multipliers) - 1} times, "
                f"but its side {latent_grid} is not a multiple of {factor}; use fewer"
            )
        self.network = UNet(
            latent_channels,
            latent_channels,
            channels=channels,
            multipliers=multipliers,
            blocks=blocks,
            use_resampling=True,
            zero_output=True,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, residual: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Return the fine map, float32."""
        return residual + self.network(residual).astype(jnp.float32)
