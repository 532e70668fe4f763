"""The coarse levels of Lite-Hybrid: a residual pyramid of strided convolutions, codebooks and learned upsamplings."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ear_jax.nn.conv import convolution
from ear_jax.nn.resize import depth_to_space
from ear_jax.tokenizers.codebook import Codebook, CodebookState, nearest, start, update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CoarseTraining:
    """What a training pass through the coarse levels returns; gradients reach the encoder straight through."""

    map: jax.Array
    commitment: jax.Array
    books: tuple[CodebookState, ...]


class CoarseLevel(nnx.Module):
    """One grid: latent map to vectors by a convolution of kernel and stride `stride`, and codes back to a map."""

    def __init__(
        self,
        *,
        latent_channels: int,
        stride: int,
        codes: int,
        code_channels: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.stride = stride
        self.down = convolution(
            latent_channels, code_channels, kernel=stride, stride=stride, padding="VALID", dtype=dtype, rngs=rngs
        )
        spread = stride * stride * latent_channels
        self.spread = convolution(code_channels, spread, kernel=1, dtype=dtype, rngs=rngs)
        self.smooth = convolution(latent_channels, latent_channels, dtype=dtype, rngs=rngs)
        self.book = Codebook(codes, code_channels, rngs=rngs)

    def vectors(self, latent: Float[Array, "B h w c"]) -> Float[Array, "B g g d"]:
        """Return the vectors to be quantised, float32."""
        return self.down(latent).astype(jnp.float32)

    def up(self, vectors: Float[Array, "B g g d"]) -> Float[Array, "B h w c"]:
        """Bring a grid of codes to the latent's resolution, float32."""
        spread = depth_to_space(self.spread(vectors), self.stride)
        return (spread + self.smooth(spread)).astype(jnp.float32)


class CoarseTokenizer(nnx.Module):
    """Coarse grids from coarsest to finest; each quantises what the grids before it left over.

    Raises:
        ValueError: a grid does not divide the latent's side.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        latent_grid: int,
        grids: tuple[int, ...],
        codes: int,
        code_channels: int,
        initialisation: str,
        decay: float,
        revive_below: float,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        wrong = [grid for grid in grids if grid < 1 or latent_grid % grid]
        if wrong or not grids:
            raise ValueError(f"coarse grids {grids} must divide the latent's side {latent_grid}; wrong: {wrong}")
        self.grids = grids
        self.codes = codes
        self.initialisation = initialisation
        self.decay = decay
        self.revive_below = revive_below
        self.levels = nnx.List(
            CoarseLevel(
                latent_channels=latent_channels,
                stride=latent_grid // grid,
                codes=codes,
                code_channels=code_channels,
                dtype=dtype,
                rngs=rngs,
            )
            for grid in grids
        )

    @property
    def books(self) -> tuple[CodebookState, ...]:
        """The states of the codebooks, one a grid."""
        return tuple(level.book.state for level in self.levels)

    def assign_books(self, books: tuple[CodebookState, ...]) -> None:
        """Store the states of the codebooks."""
        for level, state in zip(self.levels, books, strict=True):
            level.book.assign(state)

    def ids(self, latent: Float[Array, "B h w c"]) -> tuple[tuple[Int[Array, "B n"], ...], Float[Array, "B h w c"]]:
        """Quantise: ids of each grid, row-major, and the map that the codes decode to."""
        found, residual = [], latent
        for level in self.levels:
            vectors = level.vectors(residual)
            flat = nearest(vectors.reshape(-1, vectors.shape[-1]), level.book.codes[...])
            codes = level.book.codes[...][flat].reshape(vectors.shape)
            residual = residual - level.up(codes)
            found.append(flat.reshape(latent.shape[0], -1))
        return tuple(found), latent - residual

    def map_of(self, ids: tuple[Int[Array, "B _"], ...]) -> Float[Array, "B h w c"]:
        """Return the map that ids decode to; with a prefix of the grids, the map of those."""
        maps = []
        for level, grid, level_ids in zip(self.levels, self.grids, ids, strict=False):
            codes = level.book.codes[...][level_ids]
            maps.append(level.up(codes.reshape(codes.shape[0], grid, grid, -1)))
        return sum(maps[1:], start=maps[0])

    def train(
        self, latent: Float[Array, "B h w c"], rng: jax.Array, is_active: Bool[Array, ""] | bool = True
    ) -> CoarseTraining:
        """Quantise with straight-through gradients; return the map, the commitment loss and the updated codebooks.

        A codebook that has not started is placed on this batch first, once `is_active`. The module itself is not
        changed; the caller stores the books.
        """
        residual, commitment, books = latent, jnp.zeros((), jnp.float32), []
        for level, level_rng in zip(self.levels, jax.random.split(rng, len(self.levels)), strict=True):
            vectors = level.vectors(residual)
            flat = jax.lax.stop_gradient(vectors.reshape(-1, vectors.shape[-1]))
            start_rng, update_rng = jax.random.split(level_rng)
            state = jax.lax.cond(
                (level.book.started[...] > 0) | ~jnp.asarray(is_active),
                lambda state, *_: state,
                lambda state, flat, rng: start(state, flat, rng, initialisation=self.initialisation),
                level.book.state,
                flat,
                start_rng,
            )
            ids = nearest(flat, state.codes)
            codes = state.codes[ids].reshape(vectors.shape)
            commitment = commitment + jnp.mean(jnp.square(vectors - codes))
            residual = residual - level.up(vectors + jax.lax.stop_gradient(codes - vectors))
            books.append(update(state, flat, ids, update_rng, decay=self.decay, revive_below=self.revive_below))
        return CoarseTraining(latent - residual, commitment, tuple(books))
