"""Lite-Hybrid: a LiteVAE latent as discrete coarse tokens plus continuous fine tokens, fused before decoding."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ear_jax.nn.unet import UNet
from ear_jax.tokenizers.coarse import CoarseTokenizer
from ear_jax.tokenizers.codebook import CodebookState
from ear_jax.tokenizers.fusion import make_fusion
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
    The posterior's standard deviation is the VAE's. Dropping the fine level decodes fuse(up(k)).
    """

    def __init__(
        self,
        *,
        vae: LiteVAE,
        grids: tuple[int, ...],
        codes: int,
        code_channels: int,
        initialisation: str,
        decay: float,
        revive_below: float,
        fine_channels: int,
        fine_multipliers: tuple[int, ...],
        fine_blocks: int,
        fusion: str,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(vae.latent_channels)
        self.vae = vae
        self.coarse = CoarseTokenizer(
            latent_channels=vae.latent_channels,
            latent_grid=vae.latent_grid,
            grids=grids,
            codes=codes,
            code_channels=code_channels,
            initialisation=initialisation,
            decay=decay,
            revive_below=revive_below,
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
        names = ["coarse"] if len(grids) == 1 else [f"coarse_{grid}" for grid in grids]
        discrete = tuple(LevelSpec(name, grid, "discrete", codes) for name, grid in zip(names, grids, strict=True))
        self.spec = TokenizerSpec(vae.spec.image_px, (*discrete, *vae.spec.levels))

    def posterior(self, images: Float[Array, "B h w 3"]) -> Posterior:
        """Encode images in [-1, 1] to ids per coarse grid and the normalised fine posterior."""
        latent, logvar = self.vae.encoder(images)
        ids, coarse_map = self.coarse.ids(latent)
        mean, std = self.normalise(self.fine(latent - coarse_map), logvar)
        return Posterior(ids, mean, std)

    def decode(self, tokens: Tokens, *, clamp: bool = True) -> Float[Array, "B h w 3"]:
        """Decode all levels, or the first coarse ones alone, to float32 images."""
        coarse_levels = len(self.coarse.grids)
        coarse_map = self.coarse.map_of(tokens.levels[:coarse_levels])
        joined = coarse_map
        if len(tokens.levels) > coarse_levels:
            joined = coarse_map + self.denormalise(tokens.levels[-1], self.vae.latent_grid)
        images = self.vae.decoder(self.fusion(joined, coarse_map))
        return jnp.clip(images, -1.0, 1.0) if clamp else images

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
