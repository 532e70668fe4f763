"""Mesh and sharding rules on eight fake devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ear_jax.distributed.mesh import check_batch_size, make_mesh, partition_spec, put_batch, state_shardings
from ear_jax.errors import ConfigError


def test_minus_one_takes_the_rest():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(make_mesh(data=1, fsdp=4, tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"data": 3, "fsdp": 1}, "there are 8"),
        ({"data": -1, "fsdp": 3}, "there are 8"),
        ({"data": 2, "fsdp": 2}, "there are 8"),
        ({"data": -1, "fsdp": -1}, "more than one -1"),
        ({"data": 0}, "data=0"),
    ],
)
def test_sizes_that_do_not_fit_are_config_errors(sizes, text):
    with pytest.raises(ConfigError, match=text):
        make_mesh(**sizes)


def test_batch_size_must_divide():
    mesh = make_mesh(data=4, fsdp=2)
    assert check_batch_size(64, mesh, accumulation_steps=2) == 4
    with pytest.raises(ConfigError, match=r"multiple of 16. Use 48 or 64"):
        check_batch_size(60, mesh, accumulation_steps=2)
    with pytest.raises(ConfigError, match=r"Use 8,"):
        check_batch_size(3, mesh)


def test_put_batch_splits_rows_over_data_and_fsdp():
    rows = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    placed = put_batch({"image": rows, "index": np.arange(16, dtype=np.int64)}, make_mesh(data=2, fsdp=2, tensor=2))
    assert placed["index"].dtype == jnp.int32
    np.testing.assert_array_equal(placed["image"], rows)
    assert {shard.data.shape for shard in placed["image"].addressable_shards} == {(4, 3)}


def test_rules_follow_the_path_and_fall_back_on_the_largest_axis():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    assert partition_spec("params/blocks/attention/qkv/kernel", (3, 128, 384), mesh) == P(None, "fsdp", "tensor")
    assert partition_spec("params/blocks/mlp/contract/kernel", (3, 512, 128), mesh) == P(None, "tensor", "fsdp")
    assert partition_spec("params/class_embedding", (1001, 128), mesh) == P(None, "fsdp")
    assert partition_spec("params/decoder/conv/kernel", (3, 3, 64, 256), mesh) == P(None, None, None, "fsdp")
    assert partition_spec("params/decoder/conv/kernel", (3, 3, 17, 333), mesh) == P()
    assert partition_spec("params/norm/scale", (128,), mesh) == P()
    assert partition_spec("step", (), mesh) == P()


def test_parameters_moments_and_average_are_laid_out_alike_and_training_agrees_with_one_device():
    mesh = make_mesh(data=2, fsdp=4)
    params = {"mlp": {"expand": {"kernel": jnp.ones((64, 512))}, "contract": {"kernel": jnp.ones((512, 64)) * 0.01}}}
    optimiser = optax.adam(1e-2)

    def step(state, batch):
        def loss(params):
            hidden = jnp.tanh(batch["x"] @ params["mlp"]["expand"]["kernel"] * 0.01)
            return jnp.mean((hidden @ params["mlp"]["contract"]["kernel"] - batch["x"]) ** 2)

        value, gradients = jax.value_and_grad(loss)(state["params"])
        updates, opt_state = optimiser.update(gradients, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state["ema"], params)
        return {"params": params, "opt_state": opt_state, "ema": ema}, value

    state = {"params": params, "opt_state": optimiser.init(params), "ema": params}
    shardings = state_shardings(state, mesh)
    kernel = shardings["params"]["mlp"]["expand"]["kernel"]
    assert kernel.spec == P("fsdp", None)
    assert shardings["opt_state"][0].mu["mlp"]["expand"]["kernel"] == kernel
    assert shardings["opt_state"][0].nu["mlp"]["expand"]["kernel"] == kernel
    assert shardings["ema"]["mlp"]["expand"]["kernel"] == kernel

    batch = {"x": np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)}
    plain, sharded = jax.jit(step), jax.jit(step, out_shardings=(shardings, None))
    one, many = state, jax.device_put(state, shardings)
    for _ in range(5):
        one, expected = plain(one, batch)
        many, value = sharded(many, put_batch(batch, mesh))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert {shard.data.shape for shard in many["params"]["mlp"]["expand"]["kernel"].addressable_shards} == {(16, 512)}
