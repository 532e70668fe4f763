"""The torch format from before 2020: a genuine file is read without torch, everything else about it is refused."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from legacy_torch_file import CONTENT

from ear_jax.errors import DataError
from ear_jax.weights.torch_legacy import MAGIC, is_legacy, read_legacy


@pytest.fixture
def read(tmp_path: Path):
    def write_and_read(content: bytes) -> dict[str, np.ndarray]:
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        return read_legacy(path)

    return write_and_read


def test_a_genuine_file_gives_its_arrays(read, tmp_path: Path):
    arrays = read(CONTENT)
    assert is_legacy(tmp_path / "weights.pth")
    assert list(arrays) == [*(f"lin{i}.model.1.weight" for i in range(5)), "count", "transposed"]
    for index in range(5):
        weight = arrays[f"lin{index}.model.1.weight"]
        assert weight.dtype == np.float32
        assert weight.tolist() == [[[[index + 0.5]], [[-index]]]]
    assert arrays["count"].dtype == np.int64
    assert arrays["count"] == 7
    assert arrays["transposed"].dtype == np.float16
    assert arrays["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert not arrays["transposed"].flags.writeable


@pytest.mark.parametrize("cut", [len(MAGIC), len(MAGIC) + 3, 100, 400, len(CONTENT) - 20, len(CONTENT) - 1])
def test_a_cut_file_is_refused(read, cut: int):
    with pytest.raises(DataError, match="not usable"):
        read(CONTENT[:cut])


def test_bytes_behind_the_last_storage_are_refused(read):
    with pytest.raises(DataError, match="1 bytes follow"):
        read(CONTENT + b"\0")


def test_a_storage_of_another_size_is_refused(read):
    # The last storage: eight bytes that count six elements, then the elements.
    start = len(CONTENT) - 12 - 8
    assert struct.unpack_from("<q", CONTENT, start) == (6,)
    with pytest.raises(DataError, match="should have 6 elements of 2 bytes; the file says 5"):
        read(CONTENT[:start] + struct.pack("<q", 5) + CONTENT[start + 8 :])


def test_code_in_a_pickle_is_named_and_not_run(read, tmp_path: Path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    begin = MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    with pytest.raises(DataError, match="neither a tensor nor a plain container"):
        read(begin + pickle.dumps(Harm(), 2) + pickle.dumps([], 2))
    assert not (tmp_path / "harm").exists()
    with pytest.raises(DataError, match="not one table"):
        read(begin + pickle.dumps({"step": 3}, 2) + pickle.dumps([], 2))
    with pytest.raises(DataError, match="not those it lists"):
        read(begin + pickle.dumps({}, 2) + pickle.dumps(["1"], 2))


def test_other_formats_are_told_apart(read, tmp_path: Path):
    with pytest.raises(DataError, match="not as torch's format"):
        read(b"PK\x03\x04" + bytes(100))
    assert not is_legacy(tmp_path / "weights.pth")
