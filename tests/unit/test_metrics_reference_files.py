"""Files of reference statistics: every format read, every damage refused with its reason."""

import dataclasses
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch_files

from ear_jax.errors import DataError
from ear_jax.metrics.distances import frechet_distance
from ear_jax.metrics.protocol import FeatureProtocol
from ear_jax.metrics.reference_files import (
    ReferenceStatistics,
    check_reference,
    load_reference_statistics,
    save_reference_statistics,
)
from ear_jax.metrics.statistics import FeatureStatistics, statistics_of

WIDTH = 5
FEATURES = FeatureProtocol("inception-2015-12-05", "ab12", "bilinear-tensorflow1", 32)


def _statistics(seed: int = 0, width: int = WIDTH) -> FeatureStatistics:
    return statistics_of(np.random.default_rng(seed).normal(size=(100, width)).astype(np.float32))


def _reference() -> ReferenceStatistics:
    return ReferenceStatistics(_statistics(), _statistics(1, 7), FEATURES, "shapes train", "cd34")


def _arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    statistics = _statistics()
    return {"mu": statistics.mean, "sigma": statistics.covariance} | changes


def _write(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def test_our_own_file_keeps_everything(tmp_path):
    path = save_reference_statistics(tmp_path / "new" / "shapes.npz", _reference())
    found = load_reference_statistics(path)
    assert len(found.digest) == 64
    for one, other in ((found.pooled, _reference().pooled), (found.spatial, _reference().spatial)):
        assert one is not None and other is not None and one.count == other.count == 100
        np.testing.assert_array_equal(one.mean, other.mean)
        np.testing.assert_array_equal(one.covariance, other.covariance)
    assert (found.features, found.source, found.source_digest) == (FEATURES, "shapes train", "cd34")
    assert check_reference(found, FEATURES, WIDTH) == ()
    with np.load(path, allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "N", "protocol"} == set(file.files) and int(file["N"]) == 100


def test_flipped_bits_of_our_own_file_are_refused_or_change_nothing(tmp_path):
    path = save_reference_statistics(tmp_path / "shapes.npz", _reference())
    whole, before = path.read_bytes(), load_reference_statistics(path)
    names = [at for name in (b"N.npy", b"protocol.npy", b"mu_s.npy") for at in _places(whole, name)]
    rng = np.random.default_rng(0)
    places = {*names, *rng.integers(0, len(whole), 150).tolist(), *range(len(whole) - 80, len(whole))}
    for position in sorted(places):
        flipped = bytes([whole[position] ^ 1 << position % 3])
        path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        try:
            found = load_reference_statistics(path)
        except DataError:
            continue
        assert found.spatial is not None and before.spatial is not None
        assert (found.pooled.covariance == before.pooled.covariance).all() and found.pooled.count == 100
        assert (found.spatial.covariance == before.spatial.covariance).all() and found.features == before.features
        assert (found.source, found.source_digest) == (before.source, before.source_digest)


def _places(whole: bytes, name: bytes) -> list[int]:
    return [at for at in range(len(whole)) if whole.startswith(name, at)]


def test_a_file_put_together_from_two_is_refused_and_one_of_release_0_1_0_taken(tmp_path, capsys):
    path = save_reference_statistics(tmp_path / "shapes.npz", _reference())
    with np.load(path) as file:
        arrays = dict(file)
    with pytest.raises(DataError, match="put together from several"):
        load_reference_statistics(_write(tmp_path / "mixed.npz", **arrays | {"mu": arrays["mu"] + 1}))
    protocol = json.loads(str(arrays["protocol"]))
    edited = protocol | {"source": "others"}
    with pytest.raises(DataError, match="do not match their digest"):
        load_reference_statistics(_write(tmp_path / "e.npz", **arrays | {"protocol": np.asarray(json.dumps(edited))}))
    del protocol["seal"], protocol["arrays"]
    old = _write(tmp_path / "old.npz", **arrays | {"protocol": np.asarray(json.dumps(protocol))})
    assert load_reference_statistics(old).source == "shapes train"
    assert "without a digest" in capsys.readouterr().out


def test_statistics_without_their_protocol_are_not_written(tmp_path):
    for change in ({"features": None}, {"pooled": dataclasses.replace(_statistics(), count=None)}):
        with pytest.raises(DataError, match="without their feature network or image count"):
            save_reference_statistics(tmp_path / "x.npz", dataclasses.replace(_reference(), **change))
    spoiled = dataclasses.replace(_statistics(), mean=np.full(WIDTH, np.nan))
    with pytest.raises(DataError, match="5 values of mu and sigma are not finite"):
        save_reference_statistics(tmp_path / "x.npz", dataclasses.replace(_reference(), pooled=spoiled))
    assert not list(tmp_path.iterdir())


def test_foreign_files_give_the_same_distance_and_a_note(tmp_path):
    arrays = _arrays()
    single = {name: array.astype(np.float32) for name, array in arrays.items()}
    pickled = {
        protocol: _numpy_in_torch(tmp_path / f"fidelity{protocol}.pt", arrays, protocol) for protocol in (2, 3, 4)
    }
    files = {
        "pytorch-fid": _write(tmp_path / "fid.npz", **arrays),
        "float32": _write(tmp_path / "fid32.npz", **single),
        "adm": _write(tmp_path / "adm.npz", **arrays, mu_s=np.zeros(2), sigma_s=np.eye(2), arr_0=_images(3)),
        "tensors": torch_files.save(tmp_path / "tensors.pt", arrays),
        **pickled,
    }
    for kind, path in files.items():
        found = load_reference_statistics(path)
        assert frechet_distance(_statistics(), found.pooled).value == pytest.approx(0.0, abs=1e-5), kind
        assert (found.spatial is not None) == (kind == "adm") and found.pooled.count is None
        (note,) = check_reference(found, FEATURES, WIDTH)
        assert path.name in note and "does not say its feature network" in note


def _numpy_in_torch(path: Path, arrays: dict[str, np.ndarray], protocol: int) -> Path:
    """What torch.save makes of a dictionary of numpy arrays; numpy 1 named its module otherwise."""
    program = pickle.dumps(arrays, protocol=protocol)
    if protocol == 2:
        program = program.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
    return path


def test_pickles_with_anything_but_arrays_are_refused_and_not_run(tmp_path):
    marker = tmp_path / "was_run"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    cases = {
        "asks for 'posix": {"mu": np.zeros(3), "sigma": Hostile()},
        "elements of type 'O8'": {"mu": np.array([None]), "sigma": np.zeros(3)},
        "elements of type 'i8'": {"mu": np.arange(3), "sigma": np.zeros(3)},
        "'sigma' is a int": {"mu": np.zeros(3), "sigma": 3},
        "no table of tensors.*it is a Array": np.zeros(3),
        "'more' is a list": {"mu": np.zeros(3), "more": []},
    }
    for message, value in cases.items():
        for protocol in (2, 4):
            path = _numpy_in_torch(tmp_path / "x.pt", value, protocol)  # pyright: ignore[reportArgumentType]
            with pytest.raises(DataError, match=message):
                load_reference_statistics(path)
    assert not marker.exists()
    program = pickle.dumps(_arrays(), protocol=2)
    for end in range(120, len(program) - 1, 97):
        with zipfile.ZipFile(tmp_path / "cut.pt", "w") as archive:
            archive.writestr("archive/data.pkl", program[:end])
        with pytest.raises(DataError):
            load_reference_statistics(tmp_path / "cut.pt")


_SIGMA = _arrays()["sigma"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": np.zeros(4)}, r"mu has shape \(4,\) and sigma \(5, 5\)"),
        ({"sigma": np.zeros((5, 4))}, r"sigma \(5, 4\), expected"),
        ({"mu": np.zeros((1, 5))}, r"mu has shape \(1, 5\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu has shape \(0,\)"),
        ({"sigma": np.where(np.eye(5) > 0, np.nan, _SIGMA)}, "5 values of mu and sigma are not finite"),
        ({"mu": np.full(5, np.inf)}, "5 values of mu"),
        ({"sigma": _SIGMA + np.triu(np.ones((5, 5)), 1)}, "not symmetric"),
        ({"sigma": -_SIGMA}, "a variance of -"),
        ({"mu": np.arange(5)}, "int64 and float64, expected floats"),
        ({"N": np.float64(50)}, "N is float64"),
        ({"N": np.int64(1)}, "N is int64 1;"),
        ({"protocol": np.asarray("no json")}, "protocol is unreadable"),
        ({"protocol": np.asarray(json.dumps({"format": "other", "features": {}}))}, "its format is 'other'"),
    ],
)
def test_arrays_that_are_no_statistics_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_reference_statistics(_write(tmp_path / "x.npz", **_arrays(**changes)))


def test_files_that_are_no_statistics_are_refused(tmp_path):
    with pytest.raises(DataError, match="--task=stats"):
        load_reference_statistics(tmp_path / "absent.npz")
    with pytest.raises(DataError, match="It holds images"):
        load_reference_statistics(_write(tmp_path / "images.npz", arr_0=_images(2)))
    with pytest.raises(DataError, match="holds sigma; expected the arrays mu and sigma"):
        load_reference_statistics(_write(tmp_path / "half.npz", sigma=np.eye(2)))
    good = _write(tmp_path / "good.npz", **_arrays()).read_bytes()
    array = io.BytesIO()
    np.save(array, np.eye(3))
    objects = io.BytesIO()
    np.savez(objects, mu=np.array([None]), sigma=np.eye(1))
    for content in (b"", b"not a zip", good[: len(good) // 2], array.getvalue(), objects.getvalue()):
        for name in ("bad.npz", "bad.pt"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError):
                load_reference_statistics(tmp_path / name)
    for place in range(0, len(good) - 4, 61):
        (tmp_path / "bad.npz").write_bytes(good[:place] + b"\xff\xff\xff\xff" + good[place + 4 :])
        try:
            found = load_reference_statistics(tmp_path / "bad.npz")
        except DataError:
            continue
        np.testing.assert_array_equal(found.pooled.mean, _arrays()["mu"])


def test_a_reference_that_does_not_fit_is_refused_with_every_difference():
    reference = _reference()
    other = FeatureProtocol("classifier", "ab12", "none", 64, rounding="any")
    with pytest.raises(DataError) as caught:
        check_reference(reference, other, 9)
    assert str(caught.value).splitlines()[1:5] == [
        "  features: 5 in the reference, 9 here",
        "  network: 'inception-2015-12-05' in the reference, 'classifier' here",
        "  resize: 'bilinear-tensorflow1' in the reference, 'none' here",
        "  image_px: 32 in the reference, 64 here",
    ]
    assert check_reference(reference, dataclasses.replace(FEATURES, rounding="truncated"), WIDTH) == ()


def _images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 4, 6, 3), np.uint8)
