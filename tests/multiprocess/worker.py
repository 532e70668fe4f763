"""One process of the two-process tests: a sharded training loop over a real collective backend."""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax.checkpoint.manifest import leaf_digests
from ear_jax.checkpoint.store import CheckpointStore
from ear_jax.distributed.mesh import make_mesh, put_batch, state_shardings
from ear_jax.distributed.process import barrier, check_agreement, exit_now, guard_exits, initialise, on_first_process
from ear_jax.distributed.stop_signal import StopSignal
from ear_jax.errors import ConfigError, DataError

WIDTH, BATCH = 256, 16


def make_state():
    """Parameters large enough for the rules to split them."""
    values = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32)
    kernel = jnp.asarray(values / WIDTH**0.5)
    return {"step": jnp.int32(0), "params": {"kernel": kernel}, "momentum": {"kernel": jnp.zeros_like(kernel)}}


def update(state, batch):
    """Take one momentum step of a linear autoencoder."""
    loss, slope = jax.value_and_grad(lambda kernel: jnp.mean((batch["x"] @ kernel - batch["x"]) ** 2))(
        state["params"]["kernel"]
    )
    momentum = 0.9 * state["momentum"]["kernel"] + slope
    kernel = state["params"]["kernel"] - 0.1 * momentum
    return {"step": state["step"] + 1, "params": {"kernel": kernel}, "momentum": {"kernel": momentum}}, loss


def batch_rows(step: int) -> np.ndarray:
    """Return the global batch of a step."""
    return np.random.default_rng(step).normal(size=(BATCH, WIDTH)).astype(np.float32)


def train(folder: Path) -> None:
    """Train, agree, save, damage, fall back, and stop together at a SIGTERM that one process gets."""
    rank, count = jax.process_index(), jax.process_count()
    check_agreement({"jax": jax.__version__})
    try:
        check_agreement({"same": 1, "config": rank})
    except ConfigError as error:
        assert "config: differs on process 1" in str(error) and "same:" not in str(error), error
    else:
        raise AssertionError("disagreement was not seen")
    assert on_first_process(lambda: {"rank": rank}) == {"rank": 0}
    try:
        on_first_process(lambda: (_ for _ in ()).throw(DataError("only process 0 knows")))
    except DataError as error:
        assert "only process 0 knows" in str(error)

    mesh = make_mesh(data=2, fsdp=2)
    shardings = state_shardings(jax.eval_shape(make_state), mesh)
    state = jax.jit(make_state, out_shardings=shardings)()
    step_function = jax.jit(update, out_shardings=(shardings, None))
    rows = slice(rank * BATCH // count, (rank + 1) * BATCH // count)
    store = CheckpointStore(folder)
    for step in range(1, 5):
        state, loss = step_function(state, put_batch({"x": batch_rows(step)[rows]}, mesh))
        if step in (2, 4):
            store.save(step, state, {"loader": {"next_index": step * BATCH}, "rank": rank})
            print(f"digest {step} {leaf_digests({'k': state['params']['kernel']})['k'][2]}")
        print(f"loss {step} {float(loss):.6f}")
    store.wait()
    if rank == 0:
        for path in (folder / "4").rglob("d/*"):
            path.write_bytes(bytes(path.stat().st_size))
    barrier("damaged")
    restored = store.restore_latest(
        jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), jax.eval_shape(make_state), shardings
        )
    )
    assert restored is not None and restored.step == 2 and restored.host["rank"] == 0, restored
    state = restored.state
    with StopSignal() as stop:
        for step in range(3, 1000):
            state, loss = step_function(state, put_batch({"x": batch_rows(step)[rows]}, mesh))
            # Several steps in flight can fill the CPU backend's few threads with waiting collectives: a deadlock.
            loss.block_until_ready()
            if step == 20 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.requested(step):
                break
    store.save(step, state, {"loader": {"next_index": step * BATCH}}, wait=True)
    store.close()
    print(f"stopped {step}", flush=True)
    barrier("all saved")
    exit_now(75)


def fail() -> None:
    """Raise on process 1 while process 0 waits in a collective."""
    barrier("both here")
    if jax.process_index() == 1:
        raise ValueError("a fault on one process")
    barrier("never reached by both")


if __name__ == "__main__":
    initialise(join_s=60)
    guard_exits()
    train(Path(sys.argv[2])) if sys.argv[1] == "train" else fail()
