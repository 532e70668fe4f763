"""Checkpoints: exact round trips, damage found and passed over, storage faults named, other models refused."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ear_jax import files
from ear_jax.checkpoint.store import CheckpointStore
from ear_jax.distributed.mesh import make_mesh
from ear_jax.errors import ConfigError, DataError, StorageError

HOST = {"loader": {"next_index": 640}, "config": {"seed": 3, "name": "tiny"}}


def make_state(seed: int = 0):
    """A state with every kind of leaf a train state may hold."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "step": jnp.int32(5),
        "params": {
            "kernel": jax.random.normal(keys[0], (64, 32)),
            "blocks": [jax.random.normal(keys[1], (8,), jnp.bfloat16), jnp.zeros((0, 4))],
        },
        "rest": {"ids": jnp.arange(50, dtype=jnp.uint8), "flags": jnp.array([True, False]), "half": jnp.float16(0.1)},
        "ema": {"zeros": jnp.zeros((16, 16)), "odd": jnp.array([jnp.nan, -0.0, jnp.inf])},
    }


def same_bits(one, other) -> bool:
    """Say whether two trees are equal bit for bit (NaN and -0.0 included)."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in pairs
    )


def save_steps(folder: Path, steps: tuple[int, ...]) -> None:
    with CheckpointStore(folder, keep=5) as store:
        for step in steps:
            store.save(step, make_state(step), {**HOST, "at": step})


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def array_files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file() and path.parent.name == "d")


def spoil(step: Path) -> None:
    """Zero the data of a step without changing any file's size."""
    for path in array_files(step):
        path.write_bytes(bytes(path.stat().st_size))


def test_round_trip_is_exact_and_the_newest_are_kept(tmp_path):
    with CheckpointStore(tmp_path / "checkpoints", keep=2) as store:
        assert store.restore_latest(make_state()) is None
        for step in (1, 2, 3):
            store.save(step, make_state(step), {**HOST, "at": (step,)})
        store.wait()
        assert store.steps() == [2, 3]
        restored = store.restore_latest(jax.eval_shape(make_state))
    assert restored is not None and restored.step == 3 and restored.notes == ()
    assert same_bits(restored.state, make_state(3))
    assert restored.host == {**HOST, "at": [3]}


def test_arrays_donated_right_after_save_are_stored_as_they_were(tmp_path):
    state = {"x": jax.random.normal(jax.random.key(0), (512, 512))}
    before = np.asarray(state["x"]).copy()
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, {})
        jax.block_until_ready(overwrite(state))
        restored = store.restore_latest(jax.eval_shape(lambda: {"x": jnp.zeros((512, 512))}))
    assert restored is not None
    np.testing.assert_array_equal(restored.state["x"], before)


def test_saving_a_committed_step_again_changes_nothing(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, make_state(1), HOST, wait=True)
        store.save(1, make_state(2), HOST, wait=True)
        restored = store.restore(1, make_state())
    assert same_bits(restored.state, make_state(1))


def test_restores_on_another_topology(tmp_path):
    split = NamedSharding(make_mesh(data=1, fsdp=8), PartitionSpec(None, "fsdp"))
    state = {"x": jax.device_put(jnp.arange(32.0).reshape(2, 16), split)}
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, {}, wait=True)
        restored = store.restore(1, {"x": jax.ShapeDtypeStruct((2, 16), jnp.float32)})
        other = NamedSharding(make_mesh(data=4, fsdp=2), PartitionSpec("fsdp"))
        again = store.restore(1, {"x": jax.ShapeDtypeStruct((2, 16), jnp.float32, sharding=other)})
    np.testing.assert_array_equal(restored.state["x"], state["x"])
    np.testing.assert_array_equal(again.state["x"], state["x"])
    assert again.state["x"].sharding == other


def test_a_damaged_newest_step_is_passed_over_and_later_saved_again(tmp_path):
    folder = tmp_path / "checkpoints"
    save_steps(folder, (1, 2, 3))
    spoil(folder / "3")
    with CheckpointStore(folder, keep=2) as store:
        restored = store.restore_latest(make_state())
        assert restored is not None and restored.step == 2 and same_bits(restored.state, make_state(2))
        assert "step 3" in restored.notes[0] and "step 2" in restored.notes[-1]
        assert (tmp_path / "checkpoints-damaged" / "3").is_dir()
        store.save(3, make_state(33), HOST, wait=True)
        assert store.steps() == [2, 3]
        again = store.restore_latest(make_state())
    assert again is not None and again.step == 3 and same_bits(again.state, make_state(33)) and again.notes == ()


@pytest.mark.parametrize("damage", ["truncate", "delete", "host", "digests", "host file"])
def test_each_kind_of_damage_is_found(tmp_path, damage):
    save_steps(tmp_path / "c", (1, 2))
    step = tmp_path / "c" / "2"
    if damage == "truncate":
        for path in array_files(step):
            os.truncate(path, path.stat().st_size // 2)
    elif damage == "delete":
        shutil.rmtree(step / "state")
    elif damage in ("host", "digests"):
        flip_bit(step / damage / "metadata", random.Random(0))
    else:
        (step / "host" / "metadata").unlink()
    with CheckpointStore(tmp_path / "c") as store:
        with pytest.raises(DataError, match="step 2"):
            store.restore(2, make_state())
        restored = store.restore_latest(make_state())
    assert restored is not None and restored.step == 1 and same_bits(restored.state, make_state(1))


def test_a_step_that_lost_its_commit_marker_is_proven_by_its_digests(tmp_path):
    save_steps(tmp_path, (1, 2))
    for marker in (tmp_path / "2").rglob("commit_success.txt"):
        marker.unlink()
    with CheckpointStore(tmp_path) as store:
        restored = store.restore_latest(make_state())
    assert restored is not None and restored.step == 2 and same_bits(restored.state, make_state(2))


def test_when_all_are_damaged_each_is_named_and_none_is_moved(tmp_path):
    save_steps(tmp_path / "c", (1, 2))
    for step in "12":
        spoil(tmp_path / "c" / step)
    with CheckpointStore(tmp_path / "c") as store:
        with pytest.raises(DataError) as caught:
            store.restore_latest(make_state())
        assert "step 1 " in str(caught.value) and "step 2 " in str(caught.value)
        assert store.steps() == [1, 2]


def test_read_only_store_passes_over_damage_and_touches_nothing(tmp_path):
    save_steps(tmp_path / "c", (1, 2))
    spoil(tmp_path / "c" / "2")
    (tmp_path / "c" / "9.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with CheckpointStore(tmp_path / "c", read_only=True) as store:
        restored = store.restore_latest(make_state())
    assert restored is not None and restored.step == 1
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(StorageError, match="nowhere"):
        CheckpointStore(tmp_path / "nowhere", read_only=True)


def test_another_model_is_refused_with_the_differing_leaves(tmp_path):
    save_steps(tmp_path, (1,))
    other = make_state()
    other["params"]["kernel"] = jnp.zeros((64, 33))
    other["extra"] = jnp.zeros(1, jnp.int32)
    del other["ema"]["zeros"]
    with CheckpointStore(tmp_path) as store, pytest.raises(ConfigError) as caught:
        store.restore_latest(other)
    lines = [line.split() for line in str(caught.value).splitlines()]
    assert ["params/kernel", "float32[64,32]", "float32[64,33]"] in lines
    assert ["extra", "-", "int32[1]"] in lines
    assert ["ema/zeros", "float32[16,16]", "-"] in lines
    assert "step" not in {line[0] for line in lines if line}


def test_leaves_that_are_not_arrays_are_refused(tmp_path):
    with CheckpointStore(tmp_path) as store:
        for leaf in (3, np.zeros(2), jax.random.key(0)):
            with pytest.raises(TypeError, match="params/x"):
                store.save(1, {"params": {"x": leaf}}, {})
        with pytest.raises(TypeError, match="JSON"):
            store.save(1, {"x": jnp.zeros(1)}, {"key": object()})
        assert store.steps() == []


def test_too_little_space_is_refused_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(StorageError, match=r"needs 10\.9 KiB, there are 1000 bytes free"):
            store.save(1, make_state(), HOST)
        assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_during_a_background_save_is_reported_and_survived(tmp_path):
    """A file size limit stands in for the full disk; it is per process, hence lifted in `finally`."""
    state = {"x": jax.random.normal(jax.random.key(0), (256, 256))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, {}, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            store.save(2, state, {})
            with pytest.raises(StorageError, match="disk is full"):
                for _ in range(100):
                    store.poll()
                    time.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.steps() == [1]
    with CheckpointStore(tmp_path) as store:
        restored = store.restore_latest(state)
    assert restored is not None and restored.step == 1 and same_bits(restored.state, state)
    assert "left by a save that was interrupted" in restored.notes[0]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, NotADirectoryError)):
        CheckpointStore(tmp_path / "file" / "checkpoints")
    for number, text in ((30, "Read-only"), (13, "Permission"), (28, "No space")):
        found = files.as_storage_error(OSError(number, os.strerror(number)), "saving in X")
        assert isinstance(found, StorageError) and text in str(found)
    assert files.as_storage_error(ValueError("shapes differ"), "saving in X") is None
    assert files.is_out_of_memory(MemoryError())


SAVE_FOREVER = textwrap.dedent("""
    import sys, jax, jax.numpy as jnp
    from ear_jax.checkpoint.store import CheckpointStore
    store = CheckpointStore(sys.argv[1], keep=2)
    for step in range(1, 10_000):
        state = {"step": jnp.int32(step), "x": jnp.full((400, 400), step, jnp.float32)}
        store.save(step, state, {"step": step})
        print(step, *store.steps()[-1:], flush=True)
""")


def test_kill_in_the_middle_of_saves_loses_no_committed_step(tmp_path):
    for attempt in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert child.stdout is not None
        with child.stdout:
            committed = 0
            for _ in range(4 + attempt):
                seen = child.stdout.readline().split()
                committed = int(seen[-1]) if len(seen) == 2 else committed
            deadline = time.monotonic() + 0.5
            while time.monotonic() < deadline and not list(tmp_path.glob("*tmp*")):
                time.sleep(0.0005)
            child.send_signal(signal.SIGKILL)
            child.wait()
        like = {"step": jnp.int32(0), "x": jnp.zeros((400, 400))}
        with CheckpointStore(tmp_path) as store:
            restored = store.restore_latest(like)
        assert restored is not None and restored.step >= committed > 0
        assert restored.host == {"step": restored.step} and restored.state["step"] == restored.step
        assert bool((restored.state["x"] == restored.step).all())
        assert not list(tmp_path.glob("*tmp*"))
        shutil.rmtree(tmp_path)


def count_flips(folder: Path, state, files_of, flips: int) -> dict[str, int]:
    """Flip single bits one after the other, spread over the files' bytes, and count what a restore makes of each."""
    rng = random.Random(flips)
    with CheckpointStore(folder) as store:
        store.save(5, state, HOST, wait=True)
    files = files_of(folder / "5")
    counts = {"detected": 0, "harmless": 0, "silent": 0}
    for _ in range(flips):
        path = rng.choices(files, [path.stat().st_size for path in files])[0]
        original = path.read_bytes()
        flip_bit(path, rng)
        try:
            with CheckpointStore(folder, read_only=True) as store:
                restored = store.restore(5, state)
            equal = same_bits(restored.state, state) and restored.host == HOST
            counts["harmless" if equal else "silent"] += 1
        except DataError:
            counts["detected"] += 1
        path.write_bytes(original)
    return counts


FLIPS = pytest.mark.parametrize("flips", [10, pytest.param(200, marks=pytest.mark.slow)])


@FLIPS
def test_every_flipped_bit_in_array_data_is_detected(tmp_path, flips):
    """The state is large enough for the data to outweigh the unused bytes of the storage format's own tables."""
    state = {"kernel": jax.random.normal(jax.random.key(0), (768, 768))}
    counts = count_flips(tmp_path, state, lambda step: [max(array_files(step), key=lambda p: p.stat().st_size)], flips)
    assert counts == {"detected": flips, "harmless": 0, "silent": 0}


@FLIPS
def test_no_flipped_bit_of_any_file_is_ever_loaded(tmp_path, flips):
    """What a restore does not notice is in bytes it does not use (sharding hints, markers, times): nothing changes."""
    counts = count_flips(
        tmp_path, make_state(), lambda step: sorted(path for path in step.rglob("*") if path.is_file()), flips
    )
    assert counts["silent"] == 0 and counts["detected"] > 0
