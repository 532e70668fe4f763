"""How close reconstructions are to their originals, one by one and as a set, and how much of a codebook they use."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from ear_jax.errors import DataError
from ear_jax.metrics.collector import Collector, Collects, ImageBatch, ScoreSettings, image_numbers
from ear_jax.metrics.distances import distance_name, frechet_distance
from ear_jax.metrics.features import FeatureNetwork, feature_protocol
from ear_jax.metrics.protocol import ROUNDING, Protocol
from ear_jax.metrics.reference import Reference
from ear_jax.metrics.scores import Scores, collapse_alarm
from ear_jax.metrics.statistics import gather_arrays, gather_rows
from ear_jax.nn.resize import check_signed, to_signed

METRICS = ("fd", "psnr", "ssim", "lpips", "class_accuracy", "codebook")
"""What is measured of reconstructions."""

LEAST_CODES_USED = 0.1
_FAIR_SHARE = 0.1
_DATA_RANGE = 2.0
_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03
_LEAST_ERROR = 1e-10
_ROWS = 32

Distance = Callable[[jax.Array, jax.Array], jax.Array]
"""(images, originals) in [-1, 1] -> one number a pair, compiled by whoever makes it; LPIPS is one."""


class Reconstructions(NamedTuple):
    """Originals, what a tokenizer makes of them, the ids of each of its discrete levels, `numbers` as of ImageBatch."""

    originals: UInt8[np.ndarray, "n h w 3"]
    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"] | None = None
    codes: tuple[Int[np.ndarray, "n _"], ...] = ()
    numbers: Int[np.ndarray, " n"] | None = None


class ReconstructionScorer:
    """Takes up originals with their reconstructions batch by batch; `scores` measures them."""

    def __init__(
        self,
        network: FeatureNetwork | None,
        *,
        lpips: Distance | None = None,
        codebook_sizes: Sequence[int] = (),
        reference: Reference | None = None,
        settings: ScoreSettings | None = None,
    ) -> None:
        """Choose what is measured.

        Args:
            network: What turns images into features; None leaves the distances between sets out.
            lpips: LPIPS of (images, originals) in [-1, 1]; None leaves it out.
            codebook_sizes: Size of the codebook of each discrete level.
            reference: With it, the distance of the originals from it is measured too, to compare that of samples with.
            settings: Names of metrics.

        Raises:
            ValueError: there is no metric of that name.
        """
        asked = (settings or ScoreSettings()).metrics or METRICS
        if unknown := [name for name in asked if name not in METRICS]:
            raise ValueError(f"{unknown[0]!r} is not measured of reconstructions; known are {', '.join(METRICS)}")
        self.network, self._reference = network, reference
        collects: list[Collects] = ["moments"] if "fd" in asked else []
        self._sets = {"originals": Collector(network, collects)} if network is not None and collects else {}
        if network is not None and network.classes and "class_accuracy" in asked:
            collects = [*collects, "answers"]
        if network is not None and collects:
            self._sets["images"] = Collector(network, collects)
        self._codes = [np.zeros(size, np.int64) for size in codebook_sizes] if "codebook" in asked else []
        available = {"psnr": _psnr, "ssim": _ssim} | ({"lpips": lpips} if lpips is not None else {})
        self._distances = {name: distance for name, distance in available.items() if name in asked}
        self._values: list[np.ndarray] = []
        self._numbers: list[np.ndarray] = []
        self._count = 0
        self._image_px = 0

    def update(self, batch: Reconstructions | tuple) -> None:
        """Take up a batch.

        Raises:
            DataError: originals and reconstructions of other shapes, ids outside a codebook, features not finite.
            ValueError: another number of levels than codebook sizes.
        """
        batch = batch if isinstance(batch, Reconstructions) else Reconstructions(*batch)
        originals, images, labels, codes, numbers = batch
        if originals.shape != images.shape:
            raise DataError(
                f"originals {list(originals.shape)} and reconstructions {list(images.shape)} have other shapes; "
                "expected pairs."
            )
        numbers = image_numbers(numbers, self._count, len(images))
        self._count, self._image_px = self._count + len(images), images.shape[1]
        if self._image_px < _WINDOW:
            self._distances.pop("ssim", None)
        for start in range(0, len(images), _ROWS):
            rows = slice(start, start + _ROWS)
            self._values.append(self._measured(images[rows], originals[rows]))
        self._numbers.append(np.asarray(numbers, np.int64))
        for side, collector in self._sets.items():
            collector.update(ImageBatch({"originals": originals, "images": images}[side], labels, numbers))
        if self._codes and len(codes) != len(self._codes):
            raise ValueError(f"{len(codes)} levels of ids for {len(self._codes)} codebooks; expected one each")
        for counts, ids in zip(self._codes, codes, strict=False):
            counts += count_ids(ids, len(counts))

    def scores(self, *, source: str = "", source_digest: str = "", rounding: str = ROUNDING) -> Scores:
        """Measure what was taken up; every process must call.

        Args:
            source: What the originals are, for the protocol.
            source_digest: Identifies them.
            rounding: How reconstructions became uint8.

        Raises:
            DataError: no images.
        """
        if not self._count:
            raise DataError("there are no reconstructions to score.")
        means = gather_rows(np.concatenate(self._values), np.concatenate(self._numbers)).mean(axis=0, dtype=np.float64)
        found = Scores({name: float(mean) for name, mean in zip(self._distances, means, strict=True)})
        if self._image_px < _WINDOW:
            found |= Scores(
                warnings=(f"ssim was not measured: images of {self._image_px} pixels are smaller than its window.",)
            )
        found |= self._of_sets()
        for level, counts in enumerate(self._codes):
            suffix = f"_{level}" if len(self._codes) > 1 else ""
            found |= codebook_usage(gather_arrays(counts).sum(axis=0), suffix=suffix)
        if self.network is None:
            return found
        count = int(gather_arrays(np.asarray([self._count])).sum())
        protocol = Protocol(
            features=feature_protocol(self.network, self._image_px, rounding=rounding),
            count=count,
            source=source or None,
            reference=source or "the originals",
            reference_digest=source_digest,
            reference_count=count,
        )
        return found | Scores(protocol=protocol.to_dict())

    def _of_sets(self) -> Scores:
        if self.network is None or not self._sets:
            return Scores()
        found, sets = Scores(), {side: collector.gathered() for side, collector in self._sets.items()}
        images, name = sets["images"], distance_name(self.network, "rfd")
        originals = sets["originals"].statistics if "originals" in sets else None
        if images.statistics is not None and originals is not None:
            found |= Scores.of(frechet_distance(images.statistics, originals, name=name))
            if self._reference is not None:
                name = f"{distance_name(self.network)}_of_originals"
                found |= Scores.of(frechet_distance(originals, self._reference.statistics.pooled, name=name))
        elif "originals" in sets:
            found |= Scores(warnings=(f"{name} was not measured: a single image has no covariance.",))
        asked, right = images.answers.sum(axis=0)
        return found | Scores({"class_accuracy": float(right / asked)}) if asked else found

    def _measured(self, images: np.ndarray, originals: np.ndarray) -> np.ndarray:
        count = len(images)
        filled = [np.concatenate([side, np.repeat(side[-1:], _ROWS - count, axis=0)]) for side in (images, originals)]
        first, second = (to_signed(side) for side in filled)
        values = [np.asarray(distance(first, second))[:count] for distance in self._distances.values()]
        return np.stack(values, axis=1) if values else np.zeros((count, 0))


def psnr(images: Float[Array, "B h w c"], originals: Float[Array, "B h w c"]) -> Float[Array, " B"]:
    """Return the peak signal-to-noise ratio of each image in [-1, 1] in dB, 10 log10(4 / mean squared error).

    Equal images give 106 dB, not infinity, so that means stay finite.
    """
    check_signed(images, originals)
    # Not `tokenizers/losses.psnr`, which clamps: training logs it of raw outputs; here images are in range already, and
    # a pair of any precision is measured in float32.
    difference = images.astype(jnp.float32) - originals.astype(jnp.float32)
    error = jnp.mean(difference**2, axis=(1, 2, 3))
    return 10.0 * jnp.log10(_DATA_RANGE**2 / jnp.maximum(error, _LEAST_ERROR))


def ssim(images: Float[Array, "B h w c"], originals: Float[Array, "B h w c"]) -> Float[Array, " B"]:
    """Return the structural similarity of each image in [-1, 1], the mean over channels and windows (Wang et al. 2004).

    Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, windows wholly inside the image, weighted
    moments without the sample correction, intensities shifted to [0, 2].

    Raises:
        ValueError: The images are smaller than the window.
    """
    check_signed(images, originals)
    height, width = images.shape[1:3]
    if min(height, width) < _WINDOW:
        raise ValueError(f"SSIM needs images of at least {_WINDOW} pixels a side, got {height} x {width}.")
    rows, columns = _filter_matrix(height), _filter_matrix(width)

    def local_mean(values: jax.Array) -> jax.Array:
        return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, values, precision=jax.lax.Precision.HIGHEST)

    # SSIM is defined for intensities from 0 up: with negative means the luminance term would change sign.
    a, b = images.astype(jnp.float32) + 1.0, originals.astype(jnp.float32) + 1.0
    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a = local_mean(a * a) - mean_a**2
    variance_b = local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * _DATA_RANGE) ** 2, (_K2 * _DATA_RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def count_ids(ids: Int[np.ndarray, "..."] | Int[Array, "..."], size: int) -> Int[np.ndarray, " V"]:
    """Return how often each of `size` codes occurs; add the results of batches up.

    Raises:
        DataError: An id outside [0, size).
    """
    flat = np.asarray(ids).ravel()
    outside = flat[(flat < 0) | (flat >= size)]
    if outside.size:
        raise DataError(
            f"{outside.size} of {flat.size} ids lie outside the codebook of {size} codes, such as {int(outside[0])}. "
            "Expected the ids and the codebook of one tokenizer."
        )
    return np.bincount(flat, minlength=size).astype(np.int64)


def codebook_usage(counts: Int[np.ndarray, " V"] | Int[Array, " V"], *, suffix: str = "") -> Scores:
    """Return `codebook_usage` and `codebook_perplexity` of a codebook by how often each code occurs.

    Usage is the fraction of codes with a tenth of a fair share of the ids or more, as training logs it; perplexity is
    exp of the entropy of the frequencies, in [1, V]. `suffix` is added to the names.

    Raises:
        DataError: No ids were counted, or a count is negative.
    """
    numbers = np.asarray(counts, np.float64)
    if (numbers < 0).any():
        raise DataError("Counts of codes are negative; expected the result of count_ids.")
    total, size = numbers.sum(), numbers.size
    if not total > 0:
        raise DataError(f"No ids were counted for a codebook of {size} codes. Give at least one image.")
    shares = numbers / total
    present = shares[shares > 0]
    used = float(np.mean(shares * size >= _FAIR_SHARE))
    perplexity = float(np.exp(-(present * np.log(present)).sum()))
    note = f"{int(total)} ids for {size} codes: usage and perplexity read low with fewer than ten ids a code."
    where = "Look at how the codebook starts and revives codes, and at the weight of its losses."
    return Scores(
        {f"codebook_usage{suffix}": used, f"codebook_perplexity{suffix}": perplexity},
        warnings=(note,) if total < 10 * size else (),
        alarms=(
            *collapse_alarm(used, LEAST_CODES_USED, "Fraction of codes in use", where),
            *collapse_alarm(perplexity / size, LEAST_CODES_USED, "Perplexity over the number of codes", where),
        ),
    )


def _filter_matrix(side: int) -> Float[np.ndarray, "out side"]:
    # One matrix an axis: a matrix product is faster than a depthwise convolution on every backend met so far.
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    matrix = np.zeros((side - _WINDOW + 1, side), np.float32)
    for row in range(len(matrix)):
        matrix[row, row : row + _WINDOW] = weights
    return matrix


_psnr, _ssim = jax.jit(psnr), jax.jit(ssim)
