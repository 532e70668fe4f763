"""Digests: the same on every layout and in both implementations, different after any flipped bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ear_jax.checkpoint import manifest as digest
from ear_jax.checkpoint.manifest import leaf_digests
from ear_jax.distributed.mesh import make_mesh

DTYPES = ("float32", "bfloat16", "float16", "int8", "uint8", "int32", "bool", "complex64", "float8_e4m3fn")


def sample(dtype: str, shape: tuple[int, ...] = (6, 8)) -> jax.Array:
    values = np.random.default_rng(0).normal(size=shape) * 50
    return jnp.asarray(values).astype(dtype)


def sums_by_hand(array: np.ndarray) -> str:
    """The definition, word by word in Python integers."""
    first = second = 0
    for position, word in enumerate(array.ravel().view(np.uint32).tolist()):
        mixed = ((word ^ (word >> 16)) * int(digest.MULTIPLIER)) % 2**32
        mixed ^= mixed >> 15
        first += word * (2 * position + 1)
        second += mixed * (int(digest.SECOND_STRIDE) * position + 1)
    return f"{first % 2**32:08x}{second % 2**32:08x}"


def test_matches_the_definition():
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    assert leaf_digests({"x": jnp.asarray(array)}) == {"x": ((3, 5), "float32", sums_by_hand(array))}


@pytest.mark.parametrize("dtype", DTYPES)
def test_host_and_device_agree_and_every_single_bit_counts(dtype):
    array = sample(dtype)
    digits = leaf_digests({"x": array})["x"][2]
    words_per_element = max(1, array.dtype.itemsize // 4)
    strides = np.array([8 * words_per_element, words_per_element, 1], np.uint32)
    on_device = np.asarray(digest._sums_on_device(array, np.uint32(0), strides))
    assert digits == f"{on_device[0]:08x}{on_device[1]:08x}"
    raw = np.asarray(array)
    bits = [0] if dtype == "bool" else range(8)
    for byte in range(0, raw.nbytes, 7):
        for bit in bits:
            flipped = bytearray(raw.tobytes())
            flipped[byte] ^= 1 << bit
            changed = np.frombuffer(bytes(flipped), raw.dtype).reshape(raw.shape)
            sums = digest._sums_on_host(changed, [0, 0], raw.shape)
            assert f"{sums[0]:08x}" != digits[:8] and f"{sums[1]:08x}" != digits[8:]


def test_two_flipped_signs_do_not_cancel():
    array = np.ones(1000, np.float32)
    before = digest._sums_on_host(array, [0], array.shape)
    for other in range(1, 1000):
        array[[0, other]] = -1
        assert (digest._sums_on_host(array, [0], array.shape) != before).any()
        array[[0, other]] = 1


@pytest.mark.parametrize("shape", [(16, 24), (8, 3, 40), (64,)])
def test_layout_does_not_matter(shape, monkeypatch):
    monkeypatch.setattr(digest, "CHUNK", 7)
    array = sample("float32", shape)
    expected = leaf_digests({"x": array})
    mesh = make_mesh(data=2, fsdp=4)
    specs = [PartitionSpec("fsdp"), PartitionSpec(), PartitionSpec(("data", "fsdp"))]
    specs += [PartitionSpec(*[None] * (len(shape) - 1), "fsdp")]
    specs += [PartitionSpec("data", None, "fsdp")] if len(shape) > 2 else []
    for spec in specs:
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert leaf_digests({"x": placed}) == expected, spec


def test_blocks_on_devices_add_up():
    array = np.asarray(sample("float32", (16, 24)))
    whole = digest._sums_on_host(array, [0, 0], array.shape)
    strides = np.array([24, 1, 1], np.uint32)
    parts = [
        np.asarray(digest._sums_on_device(jnp.asarray(array[:, start : start + 8]), np.uint32(start), strides))
        for start in (0, 8, 16)
    ]
    np.testing.assert_array_equal(np.sum(parts, 0, np.uint32), whole)


def test_scalars_and_empty_arrays_have_digests():
    digests = leaf_digests({"scalar": jnp.float32(2), "empty": jnp.zeros((0, 3))})
    assert digests["scalar"][0] == () and digests["empty"] == ((0, 3), "float32", "0" * 16)
    assert leaf_digests({}) == {}
