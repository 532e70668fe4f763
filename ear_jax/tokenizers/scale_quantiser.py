"""VAR's multi-scale residual quantiser (arXiv 2404.02905): a feature map as grids of ids, coarsest first, and back.

With f the map, r = f and f_hat = 0: for each scale k the residual is reduced to the scale's grid by areas, each of its
vectors becomes the id of a code, the codes are enlarged bicubically and convolved (phi_k) to the map h_k, and
f_hat += h_k, r -= h_k. One codebook serves all scales. Everything is float32 at full precision: ids depend on it.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ear_jax.nn.resize import apply_to_axes, area_matrix, bicubic_matrix
from ear_jax.tokenizers.codebook import nearest

HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantiserTraining:
    """What a training pass returns.

    `map` is f_hat of all scales with the gradient of the features (straight through), `loss` the codebook and
    commitment losses, `usage` the fraction of codes that the batch hit at any scale, `ids` those of each scale.
    """

    map: jax.Array
    loss: jax.Array
    usage: jax.Array
    ids: tuple[jax.Array, ...]


class ScaleQuantiser(nnx.Module):
    """The codebook, its scales and the convolutions that turn enlarged codes into residual maps.

    `residual_convolutions` phi are shared by the scales (0: one each); phi(x) = (1 - ratio) x + ratio conv3x3(x), and a
    ratio of 0 has none. `convolve_last=False` leaves phi out at the last scale wherever ids become maps, as HART does;
    training applies it there all the same, as both published systems do. `variable` is the kind of its arrays, so that
    a generator can hold a copy that is not trained.

    Raises:
        ValueError: scales are not increasing.
    """

    def __init__(
        self,
        *,
        scales: tuple[int, ...],
        codes: int,
        channels: int,
        residual_convolutions: int = 4,
        residual_ratio: float = 0.5,
        use_cosine: bool = False,
        commitment_weight: float = 0.25,
        convolve_last: bool = True,
        variable: type[nnx.Variable] = nnx.Param,
        rngs: nnx.Rngs,
    ):
        if not scales or scales[0] < 1 or any(after <= before for before, after in itertools.pairwise(scales)):
            raise ValueError(f"scales={scales} must be increasing sides of grids, the last that of the feature map")
        self.scales = scales
        self.channels = channels
        self.residual_ratio = residual_ratio
        self.use_cosine = use_cosine
        self.commitment_weight = commitment_weight
        self.convolve_last = convolve_last
        self.shared = sharing_table(len(scales), residual_convolutions)
        # Codes that start close together are all within reach: on 32 px shapes (128 codes, 300 updates) every code came
        # into use, against 9 % from unit-normal ones.
        reach = 1.0 / codes
        self.codebook = variable(
            jax.random.uniform(rngs.params(), (codes, channels), jnp.float32, minval=-reach, maxval=reach)
        )
        count = (residual_convolutions or len(scales)) if residual_ratio > 0 else 0
        spread = nnx.initializers.lecun_normal(batch_axis=0)
        kernel = spread(rngs.params(), (count, 3, 3, channels, channels), jnp.float32) if count else None
        self.kernel = None if kernel is None else variable(kernel)
        self.bias = variable(jnp.zeros((count, channels), jnp.float32)) if count else None

    def assign(self, other: "ScaleQuantiser") -> None:
        """Take over the arrays of another quantiser of the same sizes, whatever the kind of its variables."""
        for name in ("codebook", "kernel", "bias"):
            if getattr(self, name) is not None:
                getattr(self, name)[...] = getattr(other, name)[...]

    @property
    def grid(self) -> int:
        """Side of the feature map, which is that of the last scale."""
        return self.scales[-1]

    def lookup(self, ids_BN: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        """Return the codes of ids."""
        return self.codebook[...][ids_BN]

    def spread(self, codes_BND: Float[Array, "B N D"], k: int) -> Float[Array, "B h w D"]:
        """Return the residual map of codes (or mixtures of codes) of scale k: what it adds to f_hat."""
        return self._residual_map(codes_BND, k, convolve=self.convolve_last or k < len(self.scales) - 1)

    def embed_scale(self, ids_BN: Int[Array, "B N"], k: int) -> Float[Array, "B h w D"]:
        """Return the residual map h_k of the ids of scale k."""
        return self.spread(self.lookup(ids_BN), k)

    def next_input(self, f_hat: Float[Array, "B h w D"], k: int) -> Float[Array, "B N D"]:
        """Return the running f_hat after scale k, reduced to the grid of scale k + 1, as a row-major sequence."""
        reduced = self._reduce(f_hat, k + 1)
        return reduced.reshape(f_hat.shape[0], -1, self.channels)

    def running_maps(self, ids: Sequence[Int[Array, "B _"]]) -> tuple[Float[Array, "B h w D"], ...]:
        """Return f_hat after each scale of a prefix of the scales."""
        maps: list[jax.Array] = []
        for k, ids_BN in enumerate(ids):
            added = self.embed_scale(ids_BN, k)
            maps.append(maps[-1] + added if maps else added)
        return tuple(maps)

    def inputs_of(self, ids: Sequence[Int[Array, "B _"]]) -> Float[Array, "B M D"]:
        """Return the inputs of scales 2, 3 … for teacher forcing, joined: M tokens, those of all scales but the first.

        The ids of the last scale are not needed and may be left out.
        """
        maps = self.running_maps(ids[: len(self.scales) - 1])
        return jnp.concatenate([self.next_input(f_hat, k) for k, f_hat in enumerate(maps)], axis=1)

    def quantise(
        self, features: Float[Array, "B h w D"]
    ) -> tuple[tuple[Int[Array, "B _"], ...], Float[Array, "B h w D"]]:
        """Return the ids of each scale, row-major, and the residual that the scales before the last left over."""
        rest, found = features.astype(jnp.float32), []
        for k in range(len(self.scales)):
            found.append(self._ids(rest, k))
            if k < len(self.scales) - 1:
                rest = rest - self.embed_scale(found[-1], k)
        return tuple(found), rest

    def train(self, features: Float[Array, "B h w D"]) -> QuantiserTraining:
        """Quantise with straight-through gradients.

        The loss is the mean over scales of commitment_weight mse(sg f_hat, f) + mse(f_hat, sg f), so the codebook and
        the convolutions learn from the second term, the encoder from the first.
        """
        fixed = jax.lax.stop_gradient(features)
        rest, f_hat, loss, found = fixed, jnp.zeros_like(features), jnp.zeros((), jnp.float32), []
        for k in range(len(self.scales)):
            found.append(self._ids(rest, k))
            added = self._residual_map(self.lookup(found[-1]), k, convolve=True)
            f_hat, rest = f_hat + added, rest - jax.lax.stop_gradient(added)
            commitment = jnp.mean(jnp.square(jax.lax.stop_gradient(f_hat) - features))
            loss = loss + self.commitment_weight * commitment + jnp.mean(jnp.square(f_hat - fixed))
        hits = jnp.zeros((self.codebook[...].shape[0],), jnp.float32)
        hits = hits.at[jnp.concatenate([ids.reshape(-1) for ids in found])].set(1.0)
        straight = features + jax.lax.stop_gradient(f_hat - features)
        return QuantiserTraining(straight, loss / len(self.scales), hits.mean(), tuple(found))

    def phi(self, features: Float[Array, "B h w D"], index: int) -> Float[Array, "B h w D"]:
        """Apply convolution `index` of the shared ones."""
        if self.kernel is None or self.bias is None:
            return features
        convolved = jax.lax.conv_general_dilated(
            features,
            self.kernel[...][index],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=HIGHEST,
        )
        return (1.0 - self.residual_ratio) * features + self.residual_ratio * (convolved + self.bias[...][index])

    def _ids(self, rest: jax.Array, k: int) -> jax.Array:
        vectors = self._reduce(rest, k).reshape(-1, self.channels)
        codes = self.codebook[...]
        ids = nearest_by_cosine(vectors, codes) if self.use_cosine else nearest(vectors, codes)
        return ids.reshape(rest.shape[0], -1)

    def _reduce(self, features: jax.Array, k: int) -> jax.Array:
        side = self.scales[k]
        return features if side == self.grid else apply_to_axes(features, area_matrix(self.grid, side))

    def _residual_map(self, codes_BND: jax.Array, k: int, *, convolve: bool) -> jax.Array:
        side = self.scales[k]
        enlarged = codes_BND.reshape(codes_BND.shape[0], side, side, self.channels)
        if side != self.grid:
            enlarged = apply_to_axes(enlarged, bicubic_matrix(side, self.grid))
        return self.phi(enlarged, self.shared[k]) if convolve else enlarged


def sharing_table(scales: int, convolutions: int) -> tuple[int, ...]:
    """Return which of the shared convolutions each scale uses; 0 convolutions means one of its own for each.

    Scale k lies at k / (scales - 1); the convolutions lie evenly between 1/2n and 1 - 1/2n, four of them between 1/12
    and 11/12. Scale k takes the nearest one, the first of equals. Where two are equally near, rounding decides in the
    published system: the arithmetic is that of IEEE doubles in this order, and float32 gives other tables.
    """
    count = convolutions or scales
    margin = 1.0 / 3.0 / count if count == 4 else 1.0 / 2.0 / count
    step = (1.0 - margin - margin) / max(count - 1, 1)
    ticks = [margin + index * step for index in range(count)]
    if count > 1:
        ticks[-1] = 1.0 - margin
    table = []
    for k in range(scales):
        position = k / max(scales - 1, 1)
        distances = [abs(tick - position) for tick in ticks]
        table.append(distances.index(min(distances)))
    return tuple(table)


def nearest_by_cosine(vectors: Float[Array, "M c"], codes: Float[Array, "V c"]) -> Int[Array, " M"]:
    """Return the id of the code of greatest cosine with each vector (float32, full-precision product)."""
    products = jnp.matmul(_unit(vectors), _unit(codes).T, precision=HIGHEST)
    return jnp.argmax(products, axis=-1).astype(jnp.int32)


def _unit(vectors: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.square(vectors).sum(axis=-1, keepdims=True))
    return vectors / jnp.maximum(norm, 1e-12)
