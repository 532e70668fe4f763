"""Distances between features in tiles: the neighbour radius of each row, and which rows lie within whose radius."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from ear_jax.metrics.products import inner_products

TILE_ROWS = 2048


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


def _tiles(count: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE_ROWS, count)) for start in range(0, count, TILE_ROWS))


def _smallest(kept: np.ndarray, tile: np.ndarray) -> np.ndarray:
    count = kept.shape[1]
    if tile.shape[1] > count:
        tile = np.partition(tile, count - 1, axis=1)[:, :count]
    return np.sort(np.concatenate([kept, tile], axis=1), axis=1)[:, :count]
