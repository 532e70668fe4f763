"""Files of reference statistics: our own, and those of ADM, pytorch-fid and torch-fidelity.

Every one becomes a `ReferenceStatistics`; what a foreign file does not say stays unknown and is noted with the number.
Nothing is ever unpickled.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ear_jax.array_files import open_archive
from ear_jax.errors import DataError
from ear_jax.files import atomic_file, file_sha256, is_sound, sealed
from ear_jax.metrics.protocol import FeatureProtocol
from ear_jax.metrics.statistics import FeatureStatistics
from ear_jax.weights.tensor_file import open_tensors

FORMAT = "ear_jax reference statistics 1"
_ADVICE = "Build the reference again with --task=stats, or copy the file again."
_ASYMMETRY = 1e-5
_LONGEST_PROTOCOL = 1 << 18


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of real images and where they come from.

    Attributes:
        pooled: Mean and covariance of the network's pooled features (FID).
        spatial: The same of its spatial features (sFID), where there are any.
        features: How images became features; None where the file does not say.
        source: The images: a data source, or the file that the statistics were read from.
        source_digest: Digest of the images; None where the file does not say.
        digest: SHA-256 of the file that was read; empty for statistics that were not read from one.
    """

    pooled: FeatureStatistics
    spatial: FeatureStatistics | None
    features: FeatureProtocol | None
    source: str
    source_digest: str | None
    digest: str = ""


def save_reference_statistics(path: str | os.PathLike[str], reference: ReferenceStatistics) -> Path:
    """Write statistics as an .npz, which pytorch-fid and (with spatial ones) ADM's evaluator read as well.

    Its arrays are `mu`, `sigma`, `mu_s`, `sigma_s` (spatial), `N`, and `protocol`: a JSON text with the feature
    network, its digest, the image size, the source and its digest.

    Raises:
        DataError: The statistics are not what may be read again (not finite, or without count or protocol).
        StorageError: The file cannot be written.
    """
    if reference.features is None or reference.pooled.count is None:
        raise DataError("Statistics without their feature network or image count are not written; measure them again.")
    protocol = {
        "format": FORMAT,
        "source": reference.source,
        "source_digest": reference.source_digest,
        "features": dataclasses.asdict(reference.features),
    }
    arrays: dict[str, Any] = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    _statistics(arrays, "mu", "sigma", reference.pooled.count, Path(path))
    arrays["N"] = np.asarray(reference.pooled.count)
    text = np.asarray(json.dumps(sealed(protocol | {"arrays": _array_digests(arrays)}), sort_keys=True))
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, protocol=text)
    return Path(path)


def load_reference_statistics(path: str | os.PathLike[str]) -> ReferenceStatistics:
    """Read statistics from our .npz, ADM's (`mu`, `sigma`, `mu_s`, `sigma_s`), pytorch-fid's or torch-fidelity's .pt.

    Raises:
        DataError: No such file, damaged, of another kind, or its arrays are no mean and covariance.
        StorageError: The file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"No reference statistics at {path}. Build them: --task=stats --config.data.source=SOURCE.")
    # torch-fidelity keeps numpy arrays in its cache; its forks also tensors.
    is_torch = path.suffix in (".pt", ".pth")
    arrays = open_tensors(path, is_numpy_allowed=True).arrays if is_torch else _npz_arrays(path)
    digest = file_sha256(path)
    if "mu" not in arrays or "sigma" not in arrays:
        images = " It holds images: give it as what to compare with, not as statistics." if "arr_0" in arrays else ""
        names = ", ".join(name[:80] for name in sorted(arrays)[:8]) or "nothing"
        raise DataError(f"{path} holds {names}; expected the arrays mu and sigma.{images}")
    protocol = _protocol(arrays, path)
    count = _count(arrays, path)
    has_spatial = "mu_s" in arrays and "sigma_s" in arrays
    return ReferenceStatistics(
        pooled=_statistics(arrays, "mu", "sigma", count, path),
        spatial=_statistics(arrays, "mu_s", "sigma_s", count, path) if has_spatial else None,
        features=FeatureProtocol(**protocol["features"]) if protocol else None,
        source=protocol["source"] if protocol else path.name,
        source_digest=protocol["source_digest"] if protocol else None,
        digest=digest,
    )


def check_reference(reference: ReferenceStatistics, features: FeatureProtocol, width: int) -> tuple[str, ...]:
    """Make sure that images measured as `features` can be compared with a reference; return what it leaves unsaid.

    Raises:
        DataError: Another width, feature network, weights, resize or image size; every difference is listed.
    """
    faults = []
    if reference.pooled.width != width:
        faults.append(f"features: {reference.pooled.width} in the reference, {width} here")
    if reference.features is not None:
        # Real images are uint8 before they are measured, so the rounding of generated ones is not theirs.
        pairs = {
            field.name: (getattr(reference.features, field.name), getattr(features, field.name))
            for field in dataclasses.fields(FeatureProtocol)
            if field.name != "rounding"
        }
        faults += [f"{name}: {a!r} in the reference, {b!r} here" for name, (a, b) in pairs.items() if a != b]
    if faults:
        listed = "\n".join(f"  {line}" for line in faults)
        raise DataError(
            f"The reference {reference.source} does not fit the images to score:\n{listed}\n"
            "Expected one feature network and one image size. Build a fitting reference with --task=stats."
        )
    if reference.features is None:
        return (
            f"{reference.source} does not say its feature network, image size or number of images: taken to be those "
            "of the images scored.",
        )
    return ()


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    with open_archive(path, _ADVICE) as archive:
        limits = {"mu": None, "sigma": None, "mu_s": None, "sigma_s": None, "N": 64, "protocol": _LONGEST_PROTOCOL}
        # Images may be many gigabytes; that they are there is all that matters.
        return {name: archive.read(name, most_bytes=limits[name]) for name in limits if name in archive.names} | {
            name: np.empty(0) for name in archive.names if name not in limits
        }


def _protocol(arrays: Mapping[str, np.ndarray], path: Path) -> dict[str, Any] | None:
    if "protocol" not in arrays:
        return None
    try:
        protocol = json.loads(str(arrays["protocol"]))
        fields = {field.name for field in dataclasses.fields(FeatureProtocol)}
        is_known = protocol["format"] == FORMAT and protocol["features"].keys() == fields
        if is_known and isinstance(protocol["source"], str) and isinstance(protocol["source_digest"], str | None):
            if is_sound(protocol) is None:
                print(f"{path} is of release 0.1.0, without a digest: taken as it is.", flush=True)
                return protocol
            if is_sound(protocol) and protocol["arrays"] == _array_digests(arrays):
                return protocol
            raise DataError(
                f"{path} is not what was written: its arrays or its protocol do not match their digest; the file was "
                f"damaged, edited or put together from several. {_ADVICE}"
            )
        what = f"its format is {protocol['format']!r:.80}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"its protocol is unreadable: {error!s:.200}"
    raise DataError(f"{path}: {what}; expected {FORMAT!r}. {_ADVICE}")


def _array_digests(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the SHA-256 of the type, shape and values of each array that has a meaning here."""
    names = ("mu", "sigma", "mu_s", "sigma_s", "N")
    return {
        name: hashlib.sha256(
            f"{array.dtype.str} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()
        ).hexdigest()
        for name, array in arrays.items()
        if name in names
    }


def _count(arrays: Mapping[str, np.ndarray], path: Path) -> int | None:
    if "N" not in arrays:
        return None
    count = arrays["N"]
    if count.shape or count.dtype.kind not in "iu" or count < 2:
        raise DataError(f"{path}: N is {count.dtype} {count!s:.40}; expected one integer of at least 2. {_ADVICE}")
    return int(count)


def _statistics(
    arrays: Mapping[str, np.ndarray], mean_key: str, covariance_key: str, count: int | None, path: Path
) -> FeatureStatistics:
    """Return a mean and a covariance as float64 after checking that they are; raises DataError."""
    mean, covariance = arrays[mean_key], arrays[covariance_key]
    fault = None
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        fault = f"{mean_key} and {covariance_key} are {mean.dtype} and {covariance.dtype}, expected floats"
    elif mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        fault = f"{mean_key} has shape {mean.shape} and {covariance_key} {covariance.shape}, expected [D] and [D, D]"
    elif not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        bad = int((~np.isfinite(mean)).sum() + (~np.isfinite(covariance)).sum())
        fault = f"{bad} values of {mean_key} and {covariance_key} are not finite"
    elif (np.diagonal(covariance) < 0).any():
        fault = f"{covariance_key} has a variance of {np.diagonal(covariance).min():.3g}, expected none below zero"
    else:
        asymmetry = float(np.abs(covariance - covariance.T).max())
        if asymmetry > _ASYMMETRY * float(np.diagonal(covariance).max()):
            fault = f"{covariance_key} is not symmetric (it differs by {asymmetry:.3g} from its transpose)"
    if fault is not None:
        raise DataError(f"{path}: {fault}. {_ADVICE}")
    return FeatureStatistics(mean.astype(np.float64), covariance.astype(np.float64), count)
