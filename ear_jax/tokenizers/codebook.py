"""A codebook that follows its vectors by running averages: nearest codes, start, update, revival, usage."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

KMEANS_ROUNDS = 10
HIGHEST = jax.lax.Precision.HIGHEST


class CodebookVariable(nnx.Variable):
    """An array of a codebook: measured from the data, never a target of the optimiser."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodebookState:
    """All of a codebook: codes, running count and running sum of the vectors of each, and whether it has started."""

    codes: jax.Array
    counts: jax.Array
    sums: jax.Array
    started: jax.Array


class Codebook(nnx.Module):
    """Holder of one `CodebookState` between steps."""

    def __init__(self, codes: int, channels: int, *, rngs: nnx.Rngs):
        initial = jax.random.normal(rngs.params(), (codes, channels), jnp.float32)
        self.codes = CodebookVariable(initial)
        self.counts = CodebookVariable(jnp.ones((codes,), jnp.float32))
        self.sums = CodebookVariable(initial)
        self.started = CodebookVariable(jnp.zeros((), jnp.int32))

    @property
    def state(self) -> CodebookState:
        """The arrays as a value."""
        return CodebookState(self.codes[...], self.counts[...], self.sums[...], self.started[...])

    def assign(self, state: CodebookState) -> None:
        """Store the arrays of `state`."""
        self.codes[...] = state.codes
        self.counts[...] = state.counts
        self.sums[...] = state.sums
        self.started[...] = state.started


def nearest(vectors: Float[Array, "M c"], codes: Float[Array, "V c"]) -> Int[Array, " M"]:
    """Return the id of the nearest code of each vector (Euclidean, float32, full-precision product)."""
    products = jnp.matmul(vectors, codes.T, precision=HIGHEST)
    return jnp.argmin(jnp.square(codes).sum(axis=-1) - 2.0 * products, axis=-1).astype(jnp.int32)


def start(state: CodebookState, vectors: Float[Array, "M c"], rng: jax.Array, *, initialisation: str) -> CodebookState:
    """Place the codes of a fresh codebook by "kmeans" or by "data" (random vectors); "normal" leaves them.

    With more codes than vectors, vectors are reused with a little noise so that no two codes coincide.
    """
    size = state.codes.shape[0]
    if initialisation == "normal":
        return dataclasses.replace(state, started=jnp.ones_like(state.started))
    pick, jitter = jax.random.split(rng)
    order = jax.random.permutation(pick, vectors.shape[0])
    codes = vectors[order[jnp.arange(size) % vectors.shape[0]]]
    if size > vectors.shape[0]:
        codes = codes + 0.01 * vectors.std(axis=0) * jax.random.normal(jitter, codes.shape, jnp.float32)

    def round_of_kmeans(_: jax.Array, codes: jax.Array) -> jax.Array:
        counts, sums = assignments(vectors, nearest(vectors, codes), size)
        return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1.0)[:, None], codes)

    if initialisation == "kmeans":
        codes = jax.lax.fori_loop(0, KMEANS_ROUNDS, round_of_kmeans, codes)
    counts, _ = assignments(vectors, nearest(vectors, codes), size)
    # An unused code keeps a small count, so that it moves at once when a vector comes near.
    counts = jnp.maximum(counts, 0.1)
    return CodebookState(codes, counts, codes * counts[:, None], jnp.ones_like(state.started))


def update(
    state: CodebookState,
    vectors: Float[Array, "M c"],
    ids: Int[Array, " M"],
    rng: jax.Array,
    *,
    decay: float,
    revive_below: float,
) -> CodebookState:
    """Move the running averages by one batch, then give dead codes the place of a random vector of the batch.

    A code is dead when its running count is below `revive_below` times an equal share of the running total.
    """
    size = state.codes.shape[0]
    batch_counts, batch_sums = assignments(vectors, ids, size)
    counts = decay * state.counts + (1.0 - decay) * batch_counts
    sums = decay * state.sums + (1.0 - decay) * batch_sums
    share = counts.sum() / size
    dead = counts < revive_below * share
    places = vectors[jax.random.randint(rng, (size,), 0, vectors.shape[0], jnp.int32)]
    codes = jnp.where(dead[:, None], places, sums / jnp.maximum(counts, 1e-12)[:, None])
    counts = jnp.where(dead, share, counts)
    return CodebookState(codes, counts, codes * counts[:, None], state.started)


def assignments(
    vectors: Float[Array, "M c"], ids: Int[Array, " M"], size: int
) -> tuple[Float[Array, " V"], Float[Array, "V c"]]:
    """Return how many vectors each code has, and their sum.

    A product with the one-hot matrix: unlike a scatter it is deterministic on accelerators, and it shards.
    """
    one_hot = jax.nn.one_hot(ids, size, dtype=jnp.float32)
    return one_hot.sum(axis=0), jnp.matmul(one_hot.T, vectors, precision=HIGHEST)


def usage(state: CodebookState) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the fraction of codes with a tenth of a fair share or more, and the perplexity, of the running counts."""
    probabilities = state.counts / jnp.maximum(state.counts.sum(), 1e-12)
    entropy = -jnp.sum(probabilities * jnp.log(jnp.maximum(probabilities, 1e-12)))
    used = jnp.mean(probabilities * probabilities.shape[0] >= 0.1, dtype=jnp.float32)
    return used, jnp.exp(entropy)
