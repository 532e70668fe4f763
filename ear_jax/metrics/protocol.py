"""What a measured number depends on, stored with it; numbers of different protocols are never compared.

`FeatureProtocol` is how images become features, `SamplingProtocol` how generated images were drawn, and `Protocol` has
both with the number of images and the reference.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Collection, Mapping
from typing import Any

from ear_jax.errors import DataError

ROUNDING = "round(clip((x + 1) * 127.5, 0, 255)), ties to even"
"""The one formula, `folders/pictures.to_uint8`; images that come from files were rounded before: `ROUNDED_BEFORE`."""

ROUNDED_BEFORE = "uint8 as stored"

_PACKAGES = ("ear_jax", "jax", "jaxlib", "flax", "numpy")
# Recorded to explain, not to forbid: every release of a library would end comparability.
_NEVER_COMPARED = ("versions",)


@dataclasses.dataclass(frozen=True)
class FeatureProtocol:
    """How images become features.

    Attributes:
        network: Name of the feature network, such as "inception-2015-12-05" or "classifier".
        network_digest: Digest of its weights.
        resize: How images are brought to the network's size.
        image_px: Side of the images before that.
        rounding: How generated images became uint8.
    """

    network: str
    network_digest: str
    resize: str
    image_px: int
    rounding: str = ROUNDING


@dataclasses.dataclass(frozen=True)
class SamplingProtocol:
    """How the images to score were drawn.

    Attributes:
        model: Digest of the model's weights, or its folder.
        seed: Seed of the samples.
        guidance_scale: Guidance scale, 1 for none.
        temperature: Sampling temperature of each level.
        steps: Backbone passes of each level.
        use_ema: Whether averaged weights were used.
        labels: How the classes were chosen, such as "balanced" or "as in the data".
        guidance_schedule: How guidance changes over the steps.
        guidance_interval: First and last place of the guided steps, for the schedule `interval`.
        density_draws: Draws that each continuous token is chosen from.
        density_keep: Fraction of them, where draws are densest, that it is chosen from.
        top_k: Codes that discrete levels are drawn among, 0 for all.
        top_p: Probability that those hold, 0 for all.
        aggregate: Copies of the input that were run, 0 for all.
    """

    model: str
    seed: int
    guidance_scale: float
    temperature: tuple[float, ...]
    steps: tuple[int, ...]
    use_ema: bool
    labels: str = "balanced"
    guidance_schedule: str = "constant"
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    density_draws: int = 1
    density_keep: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    aggregate: int = 0


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that a number depends on.

    Attributes:
        features: How images become features.
        count: Images scored.
        reference: The real images or statistics compared with.
        reference_digest: Digest of that data or file.
        reference_count: Real images in it; None where it does not say.
        sampling: How images were drawn; None for images from a file or folder.
        source: The file or folder for those.
        versions: Versions of what computed the number.
    """

    features: FeatureProtocol
    count: int
    reference: str
    reference_digest: str
    reference_count: int | None = None
    sampling: SamplingProtocol | None = None
    source: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: current_versions())

    def to_dict(self) -> dict[str, Any]:
        """Return the protocol as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Protocol":
        """Undo `to_dict`; raises DataError where keys are missing or unknown."""
        try:
            given = dict(values)
            given["features"] = FeatureProtocol(**given["features"])
            if given.get("sampling") is not None:
                items = given["sampling"].items()
                sampling: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in items}
                given["sampling"] = SamplingProtocol(**sampling)
            return cls(**given)
        except (TypeError, KeyError) as error:
            raise DataError(
                f"A stored protocol does not fit: {error}. Expected what this version writes; evaluate again."
            ) from error


def current_versions() -> dict[str, str]:
    """Return the versions of Python, this library and those that compute."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        # A checkout that was not installed has no version on record.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def differences(a: Protocol, b: Protocol, *, varied: Collection[str] = ()) -> list[str]:
    """Return a line for every part in which two protocols differ, as `key: value against value`.

    `varied` are keys (`sampling.steps`, or the beginning of one: `sampling`) whose difference is the point.
    """
    first, second = _flat(a.to_dict()), _flat(b.to_dict())
    ignored = (*varied, *_NEVER_COMPARED)
    return [
        f"{key}: {first.get(key)!r} against {second.get(key)!r}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key) and not any(key == name or key.startswith(f"{name}.") for name in ignored)
    ]


def check_comparable(a: Protocol, b: Protocol, *, varied: Collection[str] = ()) -> None:
    """Refuse to compare numbers that were measured differently but for what is `varied` on purpose (see `differences`).

    Raises:
        DataError: The protocols differ elsewhere; the message lists every difference.
    """
    found = differences(a, b, varied=varied)
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise DataError(
            f"These numbers cannot be compared, their protocols differ:\n{listed}\n"
            "Expected one protocol. Evaluate both again with the same settings, or say what is varied on purpose."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
