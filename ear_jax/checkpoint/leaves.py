"""A tree of arrays as a flat mapping from path to leaf, and as the nested dictionaries that are stored."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

SEPARATOR = "/"


def flatten(tree: Any) -> dict[str, Any]:
    """Return every leaf by its path, such as `params/blocks/0/kernel`; TypeError for a leaf that is no array."""
    leaves: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(key_path, simple=True, separator=SEPARATOR)
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"{path} is {type(leaf).__name__}; a checkpoint holds plain jax arrays only")
        if path in leaves:
            raise TypeError(f"two leaves have the path {path}")
        leaves[path] = leaf
    return leaves


def unflatten(leaves: Mapping[str, Any], like: Any) -> Any:
    """Return a tree of the structure of `like` that holds `leaves`."""
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), [leaves[path] for path in flatten(like)])


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the non-empty leaves as nested dictionaries (array storage refuses arrays of size zero)."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if leaf.size:
            *parents, name = path.split(SEPARATOR)
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = leaf
    return tree


def unnest(tree: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of `expected` from nested dictionaries; empty ones are made anew."""
    leaves: dict[str, Any] = {}
    for path, leaf in expected.items():
        if not leaf.size:
            leaves[path] = jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), abstract(leaf).sharding)
            continue
        node: Any = tree
        for name in path.split(SEPARATOR):
            node = node[name]
        leaves[path] = node
    return leaves


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding of a leaf; without a sharding, the first local device."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
