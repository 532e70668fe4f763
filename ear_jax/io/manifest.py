"""The manifest of a checkpoint: what every leaf must be, vouched for by a checksum of its own.

Because the manifest is sealed, a leaf that is missing from it means another model, and a broken seal means damage.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ear_jax.io.digest import LeafDigest, leaf_digests

ALGORITHM = "position-weighted-sums-v1"


def plain_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return `value` as it will be after a round trip through JSON; TypeError when it is not JSON-safe."""
    return json.loads(json.dumps(value))


def seal(leaves: Mapping[str, jax.Array], host: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of these leaves and this JSON mapping."""
    body = {
        "algorithm": ALGORITHM,
        "host": _checksum(host),
        "leaves": {path: [list(shape), dtype, digest] for path, (shape, dtype, digest) in leaf_digests(leaves).items()},
    }
    return {**body, "seal": _checksum(body)}


def opened(sealed: Mapping[str, Any], host: Mapping[str, Any]) -> dict[str, LeafDigest]:
    """Return the expected digest of every leaf; ValueError when the manifest or `host` is damaged."""
    body = {name: value for name, value in sealed.items() if name != "seal"}
    if sealed.get("seal") != _checksum(body):
        raise ValueError("the digest manifest does not match its own checksum")
    if body["algorithm"] != ALGORITHM:
        raise ValueError(f"unknown digest algorithm {body['algorithm']!r}; expected {ALGORITHM!r}")
    if body["host"] != _checksum(host):
        raise ValueError("the host record does not match its checksum")
    return {path: (tuple(shape), dtype, digest) for path, (shape, dtype, digest) in body["leaves"].items()}


def structure_differences(digests: Mapping[str, LeafDigest], expected: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (path, stored, expected) of every leaf whose presence, shape or dtype differs, in order of path."""
    stored = {path: _describe(shape, dtype) for path, (shape, dtype, _) in digests.items()}
    wanted = {path: _describe(tuple(leaf.shape), np.dtype(leaf.dtype).name) for path, leaf in expected.items()}
    return [
        (path, stored.get(path, "-"), wanted.get(path, "-"))
        for path in sorted(stored.keys() | wanted.keys())
        if stored.get(path) != wanted.get(path)
    ]


def verify(digests: Mapping[str, LeafDigest], leaves: Mapping[str, jax.Array]) -> None:
    """Raise ValueError naming the leaves whose bits are not those that were saved."""
    wrong = [path for path, digest in leaf_digests(leaves).items() if digest != digests[path]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"data does not match its digest: {', '.join(wrong[:3])}{more}")


def table(rows: list[tuple[str, str, str]]) -> str:
    """Format differing leaves as aligned columns."""
    rows = [("leaf", "in the checkpoint", "in this run"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _describe(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
