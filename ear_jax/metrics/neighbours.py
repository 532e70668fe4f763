"""Metrics of nearest neighbours, and the distances between rows of features in tiles that they are made of."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ear_jax.metrics.scores import NEEDS_ROWS, Measurement, Metric, Scores, Seen, has_rows
from ear_jax.metrics.statistics import Features, check_features, check_same_width

TILE_ROWS = 2048
_USUAL_COUNT = 10_000
_MANIFOLD_K, _DENSITY_K = 3, 5


def precision_recall(generated: Features, real: Features, *, k: int = _MANIFOLD_K) -> tuple[Measurement, Measurement]:
    """Return precision and recall (Kynkäänniemi et al. 2019), each in [0, 1].

    A set's manifold is the union of balls around its rows that reach to the k-th nearest other row, borders included.
    Precision is the fraction of generated rows inside the real manifold, recall that of real rows inside the generated
    one. Features are [N1, D] and [N2, D]; memory grows with the number of images and not with its square.

    Raises:
        DataError: No more than k images on a side, features that are not finite, or other widths.
    """
    first, second = _checked(generated, real, k)
    inside_real, inside_generated = cross_counts(
        first, second, point_radii=squared_radii(second, k), query_radii=squared_radii(first, k)
    )
    notes = _manifold_notes(len(first), len(second))
    return (
        Measurement("precision", float(np.mean(inside_real > 0)), notes=notes),
        Measurement("recall", float(np.mean(inside_generated > 0)), notes=notes),
    )


def density_coverage(generated: Features, real: Features, *, k: int = _DENSITY_K) -> tuple[Measurement, Measurement]:
    """Return density (1 for equal distributions, no upper bound) and coverage (in [0, 1]).

    Both use balls around the real rows, borders excluded as published. Density is the mean number of balls around a
    generated row divided by k; coverage is the fraction of balls with a generated row in them, whose expectation for
    equal distributions and equal counts is about 1 - 2^-k. The k-th nearest row sets a radius (Naeem et al. 2020).

    Raises:
        DataError: No more than k images on a side, features that are not finite, or other widths.
    """
    first, second = _checked(generated, real, k)
    balls, hits = cross_counts(first, second, point_radii=squared_radii(second, k), strict=True)
    notes = _manifold_notes(len(first), len(second))
    return (
        Measurement("density", float(balls.mean() / k), notes=notes),
        Measurement("coverage", float(np.mean(hits > 0)), notes=notes),
    )


def inner_products(
    a: Float[np.ndarray, "M D"], b: Float[np.ndarray, "N D"], *, on_accelerator: bool | None = None
) -> Float[np.ndarray, "M N"]:
    """Return a @ b.T: float64 on the host, or float32 without reduced-precision passes on an accelerator.

    The same array twice is half the work on the host; None decides by jax's default backend where to compute.
    """
    if on_accelerator is None:
        on_accelerator = jax.default_backend() != "cpu"
    if on_accelerator:
        return np.asarray(_on_accelerator(a.astype(np.float32), b.astype(np.float32)))
    left = a.astype(np.float64, copy=False)
    return left @ (left if a is b else b.astype(np.float64, copy=False)).T


def squared_distances(
    a: Float[np.ndarray, "M D"], b: Float[np.ndarray, "N D"], *, on_accelerator: bool | None = None
) -> Float[np.ndarray, "M N"]:
    """Return ||a_i - b_j||^2, exactly 0 where the rows are equal up to rounding.

    |a|^2 + |b|^2 - 2 a.b loses digits for rows far from the origin, so callers move the origin into the data first.
    """
    products = inner_products(a, b, on_accelerator=on_accelerator)
    size_a, size_b = (np.square(rows.astype(np.float64)).sum(axis=1) for rows in (a, b))
    sizes = size_a[:, None] + size_b
    squared = sizes - 2.0 * products
    # Copies of an image must be at distance 0: a radius can be 0 too.
    squared[squared < 8 * np.finfo(products.dtype).eps * sizes] = 0.0
    return squared


def squared_radii(features: Float[np.ndarray, "N D"], k: int) -> Float[np.ndarray, " N"]:
    """Return the squared distance of each row to its k-th nearest other row.

    This is the (k+1)-th smallest of its distances to all rows with itself among them. Memory is a few tiles.
    """
    centred = centre(features)[0]
    nearest = np.full((len(centred), k + 1), np.inf)
    tiles = list(_tiles(len(centred)))
    for index, rows in enumerate(tiles):
        for columns in tiles[index:]:
            tile = squared_distances(centred[rows], centred[columns])
            if columns == rows:
                np.fill_diagonal(tile, 0.0)
            nearest[rows] = _smallest(nearest[rows], tile)
            if columns != rows:
                nearest[columns] = _smallest(nearest[columns], tile.T)
    return nearest.max(axis=1)


def cross_counts(
    queries: Float[np.ndarray, "M D"],
    points: Float[np.ndarray, "N D"],
    *,
    point_radii: Float[np.ndarray, " N"],
    query_radii: Float[np.ndarray, " M"] | None = None,
    strict: bool = False,
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " N"]]:
    """Count memberships between two sets in one pass over their distances.

    Args:
        queries: Rows.
        points: Rows.
        point_radii: Squared radius around each point.
        query_radii: Squared radius around each query; None leaves the second result to `point_radii` as well.
        strict: Count distances below the radius only; otherwise up to it.

    Returns:
        For each query, how many points have it within their radius; and for each point, how many queries have it within
        theirs (without `query_radii`: how many queries lie within the point's own radius).
    """
    moved_points, moved_queries = centre(points, queries)
    compare = np.less if strict else np.less_equal
    of_query, of_point = np.zeros(len(queries), np.int64), np.zeros(len(points), np.int64)
    for rows in _tiles(len(queries)):
        for columns in _tiles(len(points)):
            tile = squared_distances(moved_queries[rows], moved_points[columns])
            near_points = compare(tile, point_radii[columns])
            of_query[rows] += near_points.sum(axis=1)
            near_queries = near_points if query_radii is None else compare(tile, query_radii[rows, None])
            of_point[columns] += near_queries.sum(axis=0)
    return of_query, of_point


def centre(features: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return all sets with the mean of the first moved to the origin; distances do not change."""
    mean = features.mean(axis=0, dtype=np.float64)
    return tuple(rows - mean.astype(rows.dtype) for rows in (features, *others))


def mean_of_pairs(matrix: Float[np.ndarray, "N N"]) -> float:
    """Return the mean over ordered pairs of different rows: the diagonal is left out."""
    count = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))


def _checked(generated: Features, real: Features, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both sets of features after the checks that metrics of nearest neighbours share; raises DataError."""
    if k < 1:
        raise ValueError(f"k={k}; expected at least 1.")
    first = check_features(generated, "Generated features", least=k + 1)
    second = check_features(real, "Real features", least=k + 1)
    check_same_width(first, second)
    return first, second


def _manifold_notes(generated: int, real: int) -> tuple[str, ...]:
    """Return the caveats of few or unequal numbers of images, which move all metrics of nearest neighbours."""
    notes = []
    if min(generated, real) < _USUAL_COUNT:
        notes.append(
            f"{generated} generated and {real} real images: with fewer than {_USUAL_COUNT} radii are wide and the "
            "values rise; compare only with numbers from as many images."
        )
    if generated != real:
        notes.append(f"{generated} generated against {real} real images: the larger set has the finer manifold.")
    return tuple(notes)


@jax.jit
def _on_accelerator(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def _tiles(count: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE_ROWS, count)) for start in range(0, count, TILE_ROWS))


def _smallest(kept: np.ndarray, tile: np.ndarray) -> np.ndarray:
    count = kept.shape[1]
    if tile.shape[1] > count:
        tile = np.partition(tile, count - 1, axis=1)[:, :count]
    return np.sort(np.concatenate([kept, tile], axis=1), axis=1)[:, :count]


def _of_equal_rows(measure: Callable[..., tuple[Measurement, ...]]) -> Callable[[Seen], Scores]:
    """Return what measures as many generated as real rows: with more of one side, its manifold would be the finer."""

    def measured(seen: Seen) -> Scores:
        rows = seen.collected.features, seen.real_features
        fewest = min(map(len, rows))
        stream = np.random.default_rng(seen.settings.seed)
        return Scores.of(*measure(*(side[np.sort(stream.permutation(len(side))[:fewest])] for side in rows)))

    return measured


PRECISION_RECALL = Metric(
    "precision_recall",
    needs=NEEDS_ROWS,
    collects=("rows",),
    possible=has_rows,
    measure=_of_equal_rows(precision_recall),
    least=_MANIFOLD_K + 1,
)
DENSITY_COVERAGE = Metric(
    "density_coverage",
    needs=NEEDS_ROWS,
    collects=("rows",),
    possible=has_rows,
    measure=_of_equal_rows(density_coverage),
    least=_DENSITY_K + 1,
)
