"""Weights of the published feature networks: Inception, LPIPS-VGG16, EfficientNet-Lite0, from where they lie.

The digests are those that several independent projects print for these files; they begin as the publishers' file names
say (Inception, VGG16), and the sizes fit the networks' shapes in torch's format from before 2020.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ear_jax.errors import DataError
from ear_jax.files import file_sha256
from ear_jax.weights.download import PublicFile, fetch
from ear_jax.weights.entries import converted
from ear_jax.weights.families import inception, lpips
from ear_jax.weights.installed import EFFICIENTNET_PACKAGE, EFFICIENTNET_SHA256, efficientnet_arrays
from ear_jax.weights.tensor_file import read_tensors

INCEPTION = PublicFile(
    name="pt_inception-2015-12-05-6726825d.pth",
    what="the Inception network of FID",
    size=95_628_359,
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    urls=(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    ),
)
VGG16 = PublicFile(
    name="vgg16-397923af.pth",
    what="the VGG16 network under LPIPS",
    size=553_433_881,
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    urls=("https://download.pytorch.org/models/vgg16-397923af.pth",),
)
LPIPS_LINEAR = PublicFile(
    name="weights-vgg16-lpips.pth",
    what="the linear layers of LPIPS v0.1 on VGG16",
    size=7_289,
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    urls=(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
    ),
)

# The first digits of the SHA-256, as torch.hub writes them into file names.
_DIGITS_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")


@dataclasses.dataclass(frozen=True)
class FeatureWeights:
    """Weights as a network takes them, and what a result's protocol says of them.

    Attributes:
        arrays: float32 arrays by name.
        digest: SHA-256 of names, shapes and values: equal for the same weights, whatever file they came in.
        files: SHA-256 of every file read, by its name.
    """

    arrays: dict[str, np.ndarray]
    digest: str
    files: dict[str, str]


def inception_weights(path: str = "", *, setting: str = "config.evaluate.inception_weights") -> FeatureWeights:
    """Read the FID network from `path`, or from the cache, where it is downloaded once.

    Reads pytorch-fid's `pt_inception-2015-12-05-*.pth`, torch-fidelity's `weights-inception-2015-12-05-*.pth` (the same
    file) and a `.safetensors` of the same names. The arrays are named as `inception.Inception` names its own.

    Args:
        path: File with the weights; empty = the cache, or the publisher.
        setting: The key by which the user passes `path`, named in errors.

    Raises:
        DataError: the file is missing, damaged or of another network, or the download failed; says where to get it.
    """
    file = _given(path, INCEPTION, setting) if path else fetch(INCEPTION, setting=setting)
    tensors, digest = _read(file)
    return _weights(converted(tensors, inception.entries(), file, _expected(INCEPTION)), {file.name: digest})


def lpips_weights(
    path: str = "", linear_path: str = "", *, setting: str = "config.evaluate.lpips_weights"
) -> FeatureWeights:
    """Read LPIPS-VGG16 v0.1, under the names of the `lpips` package, as `PerceptualDistance` takes them.

    Args:
        path: One file with everything, or torchvision's `vgg16-397923af.pth`; empty = the cache, or the publisher.
        linear_path: The five linear layers (the package's `vgg.pth`) where `path` has none; empty = likewise.
        setting: The key by which the user passes `path`, named in errors.

    Raises:
        DataError: as `inception_weights`.
    """
    file = _given(path, VGG16, setting) if path else fetch(VGG16, setting=setting)
    tensors, digest = _read(file)
    files = {file.name: digest}
    if "lin0.model.1.weight" not in tensors:
        linear = _given(linear_path, LPIPS_LINEAR, setting) if linear_path else fetch(LPIPS_LINEAR, setting=setting)
        more, digest = _read(linear)
        tensors, files = {**tensors, **more}, {**files, linear.name: digest}
    return _weights(converted(tensors, lpips.entries(tensors), file, _expected(VGG16)), files)


def efficientnet_weights() -> FeatureWeights:
    """Read EfficientNet-Lite0 from its installed package; raises DataError where it is not there or damaged."""
    return _weights(efficientnet_arrays(), {EFFICIENTNET_PACKAGE: EFFICIENTNET_SHA256})


def weights_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of arrays by name, shape and values, independent of their order and of any file format."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name], "<f4")
        total.update(f"{name} {array.shape}\n".encode())
        total.update(array.data)
    return total.hexdigest()


def _given(path: str, public: PublicFile, setting: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(
            f"{setting}={path!r} is not a file. Expected {public.what}: get {public.name} from "
            f"{' or '.join(public.urls)}, or leave the path empty to download it."
        )
    return file


def _read(file: Path) -> tuple[dict[str, np.ndarray], str]:
    digest, named = file_sha256(file), _DIGITS_IN_NAME.search(file.name)
    if named and not digest.startswith(named.group(1)):
        raise DataError(
            f"{file} is damaged: its name promises a SHA-256 beginning with {named.group(1)}, but it is {digest}. "
            "Download it again."
        )
    return read_tensors(file), digest


def _expected(public: PublicFile) -> str:
    return f"{public.what}, for example {public.name}"


def _weights(arrays: Mapping[str, np.ndarray], files: dict[str, str]) -> FeatureWeights:
    own = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    return FeatureWeights(own, weights_digest(own), files)
