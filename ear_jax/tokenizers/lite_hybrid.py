"""Lite-Hybrid: a LiteVAE latent as discrete coarse tokens plus continuous fine tokens, fused before decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ear_jax.nn.attention import SpatialAttention
from ear_jax.nn.conv import ZEROS, convolution
from ear_jax.nn.unet import UNet
from ear_jax.tokenizers.coarse import CoarseTokenizer
from ear_jax.tokenizers.codebook import CodebookState
from ear_jax.tokenizers.latents import LatentTokenizer, sample_gaussian
from ear_jax.tokenizers.lite_vae import LiteVAE
from ear_jax.types import LevelSpec, Posterior, TokenizerSpec, Tokens


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


class NoFusion(nnx.Module):
    """The sum as it is."""

    def __call__(self, joined: Float[Array, "B h w c"], coarse: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Return `joined`."""
        return joined


class MLPFusion(nnx.Module):
    """A residual pixel-wise MLP C -> 2C -> C, optionally after a layer norm, whose output starts at zero."""

    def __init__(self, channels: int, *, use_layer_norm: bool, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        norm = nnx.LayerNorm(channels, epsilon=1e-6, use_fast_variance=False, dtype=dtype, rngs=rngs)
        self.norm = norm if use_layer_norm else None
        self.expand = convolution(channels, 2 * channels, kernel=1, dtype=dtype, rngs=rngs)
        self.reduce = convolution(2 * channels, channels, kernel=1, kernel_init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(self, joined: Float[Array, "B h w c"], coarse: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Return `joined` plus its MLP, float32."""
        hidden = joined if self.norm is None else self.norm(joined)
        return joined + self.reduce(jax.nn.gelu(self.expand(hidden))).astype(jnp.float32)


class AttentionFusion(nnx.Module):
    """Residual single-head self-attention over the latent's pixels, whose output starts at zero."""

    def __init__(self, channels: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.attention = SpatialAttention(channels, use_norm=True, zero_output=True, dtype=dtype, rngs=rngs)

    def __call__(self, joined: Float[Array, "B h w c"], coarse: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Return `joined` after attention, float32."""
        return self.attention(joined).astype(jnp.float32)


class ChannelWeightFusion(nnx.Module):
    """A learned weight per channel for the coarse and for the fine part, and a shift; weights start at one."""

    def __init__(self, channels: int):
        self.coarse_weight = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.fine_weight = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, joined: Float[Array, "B h w c"], coarse: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Weigh the coarse part and the rest of `joined`."""
        fine = joined - coarse
        return self.coarse_weight[...] * coarse + self.fine_weight[...] * fine + self.shift[...]


def make_fusion(kind: str, channels: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> nnx.Module:
    """Make the fusion of a kind: none, mlp, mlp_layernorm, attention or channel_weight.

    Raises:
        ValueError: the kind is not one of these.
    """
    if kind == "none":
        return NoFusion()
    if kind in ("mlp", "mlp_layernorm"):
        return MLPFusion(channels, use_layer_norm=kind == "mlp_layernorm", dtype=dtype, rngs=rngs)
    if kind == "attention":
        return AttentionFusion(channels, dtype=dtype, rngs=rngs)
    if kind == "channel_weight":
        return ChannelWeightFusion(channels)
    raise ValueError(f"fusion={kind!r} is not one of none, mlp, mlp_layernorm, attention, channel_weight")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HybridTraining:
    """The decoder's input in training, the fine posterior's mean, the commitment loss and the moved codebooks."""

    latent: jax.Array
    fine_mean: jax.Array
    commitment: jax.Array
    books: tuple[CodebookState, ...]


class LiteHybrid(LatentTokenizer):
    """Coarse grids of ids, then one grid of continuous residual tokens.

    With z the mean of the VAE's posterior and up(k) the map of the codes: u = r + UNet(r), r = z - up(k), and the
    decoder sees fuse(up(k) + u). All learned corrections start at zero, so the hybrid path starts as the plain VAE.
    The posterior's standard deviation is the VAE's. Dropping the fine level decodes fuse(up(k)). `coarse` are the
    arguments of `CoarseTokenizer`: grids, codes, code_channels, initialisation, decay and revive_below.
    """

    def __init__(
        self,
        *,
        vae: LiteVAE,
        fine_channels: int,
        fine_multipliers: tuple[int, ...],
        fine_blocks: int,
        fusion: str,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **coarse: Any,
    ):
        super().__init__(vae.latent_channels)
        self.vae = vae
        self.coarse = CoarseTokenizer(
            latent_channels=vae.latent_channels,
            latent_grid=vae.latent_grid,
            **coarse,
            dtype=dtype,
            rngs=rngs,
        )
        self.fine = FineResidual(
            latent_channels=vae.latent_channels,
            latent_grid=vae.latent_grid,
            channels=fine_channels,
            multipliers=fine_multipliers,
            blocks=fine_blocks,
            dtype=dtype,
            rngs=rngs,
        )
        self.fusion = make_fusion(fusion, vae.latent_channels, dtype=dtype, rngs=rngs)
        grids, codes = self.coarse.grids, self.coarse.codes
        names = ["coarse"] if len(grids) == 1 else [f"coarse_{grid}" for grid in grids]
        discrete = tuple(LevelSpec(name, grid, "discrete", codes) for name, grid in zip(names, grids, strict=True))
        self.spec = TokenizerSpec(vae.spec.image_px, (*discrete, *vae.spec.levels))

    def posterior(self, images: Float[Array, "B h w 3"]) -> Posterior:
        """Encode images in [-1, 1] to ids per coarse grid and the normalised fine posterior."""
        latent, logvar = self.vae.encoder(images)
        ids, coarse_map = self.coarse.ids(latent)
        mean, std = self.normalise(self.fine(latent - coarse_map), logvar)
        return Posterior(ids, mean, std)

    def map_of(self, tokens: Tokens) -> Float[Array, "B i j c"]:
        """Return the fused map of all levels, or of the first coarse ones alone."""
        coarse_levels = len(self.coarse.grids)
        coarse_map = self.coarse.map_of(tokens.levels[:coarse_levels])
        joined = coarse_map
        if len(tokens.levels) > coarse_levels:
            joined = coarse_map + self.denormalise(tokens.levels[-1], self.vae.latent_grid)
        return self.fusion(joined, coarse_map)

    def decode_map(self, latent: Float[Array, "B i j c"], *, clamp: bool = True) -> Float[Array, "B h w 3"]:
        """Decode a fused map to float32 images; clamped to [-1, 1] unless told not to."""
        return self.vae.decode_map(latent, clamp=clamp)

    def train_latent(
        self,
        latent: Float[Array, "B h w c"],
        logvar: Float[Array, "B h w c"],
        use_fine: Float[Array, " B"],
        rng: jax.Array,
        is_active: Bool[Array, ""] | bool = True,
    ) -> HybridTraining:
        """Run the hybrid path on a VAE posterior; images with `use_fine` 0 keep only their coarse map.

        Changes no variable: the caller stores the books. While `is_active` is false no codebook is started.
        """
        book_rng, sample_rng = jax.random.split(rng)
        coarse = self.coarse.train(latent, book_rng, is_active)
        fine_mean = self.fine(latent - coarse.map)
        fine = sample_gaussian(sample_rng, fine_mean, logvar)
        joined = coarse.map + use_fine[:, None, None, None] * fine
        return HybridTraining(self.fusion(joined, coarse.map), fine_mean, coarse.commitment, coarse.books)
