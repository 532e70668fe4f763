"""Protocols of measured numbers: recorded whole, read back, and compared."""

import dataclasses
import json

import numpy as np
import pytest

from ear_jax.errors import DataError
from ear_jax.folders.pictures import to_uint8
from ear_jax.metrics.protocol import (
    ROUNDING,
    FeatureProtocol,
    Protocol,
    SamplingProtocol,
    check_comparable,
    differences,
)
from ear_jax.sampling import Sampling

FEATURES = FeatureProtocol("inception-2015-12-05", "ab12", "bilinear-tensorflow1", 32)
SAMPLING = SamplingProtocol("cd34", 0, 1.5, (1.0, 0.9), (4, 1), True)
PROTOCOL = Protocol(FEATURES, 50_000, "cifar10 train", "ef56", 50_000, SAMPLING)


def test_a_protocol_survives_a_json_file():
    text = json.dumps(PROTOCOL.to_dict(), allow_nan=False)
    assert Protocol.from_dict(json.loads(text)) == PROTOCOL
    assert set(PROTOCOL.versions) >= {"jax", "numpy", "ear_jax", "python"}
    of_folder = Protocol(FEATURES, 10, "shapes", "00", source="samples/")
    assert Protocol.from_dict(json.loads(json.dumps(of_folder.to_dict()))) == of_folder
    for broken in ({"features": {"network": "x"}}, {"count": 3}, {**PROTOCOL.to_dict(), "surprise": 1}):
        with pytest.raises(DataError, match="stored protocol does not fit"):
            Protocol.from_dict(broken)


def test_every_option_of_sampling_is_a_part_of_the_protocol():
    options = {field.name for field in dataclasses.fields(Sampling)}
    assert options - {field.name for field in dataclasses.fields(SamplingProtocol)} == {"coarse_temperature"}
    for name, value in (("top_k", 3), ("top_p", 0.5), ("aggregate", 2), ("density_draws", 4)):
        other = dataclasses.replace(PROTOCOL, sampling=dataclasses.replace(SAMPLING, **{name: value}))
        assert differences(PROTOCOL, other) == [f"sampling.{name}: {getattr(SAMPLING, name)!r} against {value!r}"]


def test_different_protocols_are_not_compared():
    other = dataclasses.replace(
        PROTOCOL,
        features=dataclasses.replace(FEATURES, rounding="truncated"),
        count=10_000,
        sampling=dataclasses.replace(SAMPLING, steps=(8, 1), seed=1),
    )
    with pytest.raises(DataError) as caught:
        check_comparable(PROTOCOL, other)
    lines = str(caught.value).splitlines()
    assert lines[1:5] == [
        f"  features.rounding: {ROUNDING!r} against 'truncated'",
        "  count: 50000 against 10000",
        "  sampling.seed: 0 against 1",
        "  sampling.steps: [4, 1] against [8, 1]",
    ]
    assert differences(PROTOCOL, other, varied=("sampling", "features.rounding")) == ["count: 50000 against 10000"]


def test_what_is_varied_on_purpose_and_versions_do_not_forbid_a_comparison():
    steps = dataclasses.replace(PROTOCOL, sampling=dataclasses.replace(SAMPLING, steps=(1, 1)), versions={"jax": "9"})
    check_comparable(PROTOCOL, steps, varied=("sampling.steps",))
    with pytest.raises(DataError, match=r"sampling\.steps"):
        check_comparable(PROTOCOL, steps, varied=("sampling.step",))
    from_folder = dataclasses.replace(PROTOCOL, sampling=None, source="folder")
    assert any(line.startswith("sampling") for line in differences(PROTOCOL, from_folder))
    check_comparable(PROTOCOL, from_folder, varied=("sampling", "source"))


def test_the_recorded_rounding_is_the_one_that_is_done():
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 8, 8, 3)).astype(np.float32)
    formula = eval(ROUNDING.split(", ties")[0], {"round": np.rint, "clip": np.clip, "x": x})
    np.testing.assert_array_equal(to_uint8(x), formula)
