"""The layers of every trunk and head: dense, norms, MLP, dropout by key, positions and diffusion steps."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

XAVIER = nnx.initializers.xavier_uniform()
ZEROS = nnx.initializers.zeros_init()


class FrozenWeight(nnx.Variable):
    """A weight that was loaded and is never trained."""


class Linear(nnx.Linear):
    """Dense layer over the last axis; leading axes are flattened first.

    XLA's CPU backend runs a `[B, N, D] x [D, E]` product at half the speed of `[B*N, D] x [D, E]`; accelerators do
    not care. Parameters are float32, the product runs in `dtype`. Weights start xavier-uniform, biases at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        kernel_init: jax.nn.initializers.Initializer = XAVIER,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            dtype=dtype,
            param_dtype=jnp.float32,
            rngs=rngs,
        )

    def __call__(self, inputs: Float[Array, "*batch d"]) -> Float[Array, "*batch e"]:
        """Apply the layer to the last axis."""
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return flat.reshape(*inputs.shape[:-1], flat.shape[-1])


def layer_norm(width: int, *, affine: bool = True, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Make the layer norm of every trunk and head: eps 1e-6, statistics in float32 by the two-pass formula.

    The one-pass formula of the library's default loses all precision where the mean is far larger than the spread.
    """
    return nnx.LayerNorm(
        width,
        epsilon=1e-6,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def dropout(inputs: Float[Array, "..."], rate: float, rng: jax.Array | None) -> Float[Array, "..."]:
    """Zero each element with probability `rate` and scale the rest by 1/(1-rate); no key means no dropout."""
    if rng is None or rate == 0.0:
        return inputs
    keep = jax.random.bernoulli(rng, jnp.float32(1.0 - rate), inputs.shape)
    return jnp.where(keep, inputs / (1.0 - rate), 0).astype(inputs.dtype)


def group_count(channels: int, *, limit: int = 32, smallest: int = 4) -> int:
    """Return the largest number of groups, at most `limit`, that divides `channels` into groups of `smallest` or more.

    Groups of a single channel would be instance normalisation, which removes what the low band of a wavelet carries.
    """
    most = max(1, min(limit, channels // smallest))
    return next(count for count in range(most, 0, -1) if channels % count == 0)


class GroupNorm(nnx.Module):
    """Group normalisation with a learned scale and bias, epsilon 1e-6.

    `groups` must divide the channels; without it `group_count` chooses.
    """

    def __init__(self, channels: int, *, groups: int | None = None, dtype: DTypeLike = jnp.float32):
        self.groups = groups or group_count(channels)
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Normalise each group of channels over its pixels."""
        batch, height, width, channels = features.shape
        grouped = features.astype(jnp.float32).reshape(batch, height * width, self.groups, channels // self.groups)
        mean = grouped.mean(axis=(1, 3), keepdims=True)
        variance = jnp.square(grouped - mean).mean(axis=(1, 3), keepdims=True)
        # Folding statistics into one scale and shift per channel keeps the large arrays in a single pass.
        scale = jax.lax.rsqrt(variance + 1e-6) * self.scale[...].reshape(1, 1, self.groups, -1)
        shift = self.bias[...].reshape(1, 1, self.groups, -1) - mean * scale
        return (grouped * scale + shift).reshape(features.shape).astype(self.dtype)


Initializer = jax.nn.initializers.Initializer


class Mlp(nnx.Module):
    """Linear, GELU, linear, with dropout after each half.

    GELU is exact, or its tanh approximation with `use_tanh` (DiT, VAR). `inner_dropout` is the rate after the first
    half where it is another one (VAR: 0).
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        dropout: float,
        inner_dropout: float | None = None,
        use_tanh: bool = False,
        kernel_init: Initializer = XAVIER,
        output_init: Initializer = XAVIER,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dropout, self.use_tanh = dropout, use_tanh
        self.inner_dropout = dropout if inner_dropout is None else inner_dropout
        self.expand = Linear(width, hidden, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.contract = Linear(hidden, width, kernel_init=output_init, dtype=dtype, rngs=rngs)

    def __call__(self, hidden_BLE: Float[Array, "B L E"], rng: jax.Array | None = None) -> Float[Array, "B L E"]:
        """Apply the MLP to each position; with `rng`, apply dropout."""
        first, second = (None, None) if rng is None else jax.random.split(rng)
        inner = jax.nn.gelu(self.expand(hidden_BLE), approximate=self.use_tanh)
        return dropout(self.contract(dropout(inner, self.inner_dropout, first)), self.dropout, second)


class NoiseBlock(nnx.Module):
    """Residual MLP block whose norm is shifted, scaled and gated by the noise."""

    def __init__(self, *, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 3 * width, kernel_init=ZEROS, dtype=dtype, rngs=rngs)
        self.expand = Linear(width, width, dtype=dtype, rngs=rngs)
        self.contract = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array, noise: jax.Array, temperature: jax.Array | float) -> jax.Array:
        """Apply the block; `temperature` scales only the shift."""
        shift, scale, gate = jnp.split(self.modulation(jax.nn.silu(noise)), 3, axis=-1)
        inner = self.norm(hidden) * (1 + scale) + shift * jnp.asarray(temperature, shift.dtype)
        return hidden + gate * self.contract(jax.nn.silu(self.expand(inner)))


@functools.cache
def sincos_positions(grid: int, width: int) -> np.ndarray:
    """Return float32 [grid², width] for a row-major grid: the column in the first half, the row in the second.

    Each half is [sin | cos] of the coordinate times 10000^(-i / (width/4)), as in MAE and DiT.

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions of width {width}; expected a multiple of 4")
    rates = 1.0 / 10_000 ** (np.arange(width // 4) / (width / 4.0))
    angles = np.arange(grid)[:, None] * rates
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(axis, (grid, 1)), np.repeat(axis, grid, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


FREQUENCIES = 128


def sinusoids(steps: Int[Array, "*batch"], frequencies: int = FREQUENCIES) -> Float[Array, "*batch f"]:
    """Return [cos | sin] of step times 10000^(-i / frequencies), float32."""
    rates = np.exp(-math.log(10_000) * np.arange(frequencies) / frequencies).astype(np.float32)
    angles = steps[..., None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Sinusoids, linear, SiLU, linear; weights start as N(0, .02), as in DiT and MAR."""

    def __init__(self, *, width: int, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.expand = Linear(2 * FREQUENCIES, width, kernel_init=normal, dtype=dtype, rngs=rngs)
        self.contract = Linear(width, width, kernel_init=normal, dtype=dtype, rngs=rngs)

    def __call__(self, steps: Int[Array, "*batch"]) -> Float[Array, "*batch E"]:
        """Embed steps of the trained process."""
        return self.contract(jax.nn.silu(self.expand(sinusoids(steps))))
