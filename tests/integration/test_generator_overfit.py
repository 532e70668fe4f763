"""The generator learns one batch by heart, and sampling gives it back: the whole path from loss to drawn tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from integration.tiny import tiny_config
from random_weights import random_weights

from ear_jax import build
from ear_jax.generators.kind import image_keys, sample
from ear_jax.levels import LevelSpec, TokenizerSpec
from ear_jax.sampling import Sampling
from ear_jax.types import Tokens

CLASSES = 6
SPEC = TokenizerSpec(16, (LevelSpec("coarse", 2, "discrete", 8), LevelSpec("fine", 4, "continuous", 2)))
STEPS = 400


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    """One image a class, whose tokens follow from the class alone."""
    rng = np.random.default_rng(0)
    return {
        "level_0": jnp.asarray(rng.integers(0, 8, (CLASSES, 4), np.int32)),
        "mean": jnp.asarray(rng.normal(size=(CLASSES, 16, 2)), jnp.float32),
        "std": jnp.zeros((CLASSES, 16, 2)),
        "label": jnp.arange(CLASSES, dtype=jnp.int32),
        "index": jnp.arange(CLASSES),
    }


@pytest.fixture(scope="module")
def trained(batch):
    """Return the generator after `STEPS` updates on the batch, and its metrics along the way."""
    config = tiny_config(
        generator__backbone__width=32,
        generator__backbone__dropout=0.0,
        generator__energy__width=48,
        generator__energy__depth=2,
        generator__patch_size=2,
        generator__label_drop=0.0,
        generator__fine__mask_ratio="uniform",
        generator__fine__full_mask_probability=0.5,
    )
    static, parameters, rest = random_weights(lambda keys: build.build_generator(config, SPEC, CLASSES, rngs=keys))
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, STEPS))

    def update(carry, number):
        parameters, state = carry

        def loss(parameters):
            module = static.merge(parameters, rest)
            return module.loss(batch, jax.random.fold_in(jax.random.key(0), number), number, {})

        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(parameters, updates), state), metrics

    run = jax.jit(lambda carry: jax.lax.scan(update, carry, jnp.arange(STEPS)))
    (parameters, _), metrics = run((parameters, optimizer.init(parameters)))
    return static.merge(parameters, rest), {name: np.asarray(values) for name, values in metrics.items()}


def test_both_levels_are_learned(trained):
    _, metrics = trained
    assert metrics["accuracy/coarse"][:20].mean() < 0.5
    assert metrics["accuracy/coarse"][-50:].mean() > 0.99
    start, end = metrics["loss/fine"][:20].mean(), metrics["loss/fine"][-50:].mean()
    assert end < 0.2 * start, (start, end)


def test_sampling_with_the_true_class_gives_the_batch_back(trained, batch):
    generator, _ = trained
    labels = jnp.asarray([3, 0, 5, 1])
    sampling = Sampling((3, 2), guidance_schedule="linear")

    @jax.jit
    def draw(labels: jax.Array, keys: jax.Array) -> Tokens:
        return generator.to_tokens(sample(generator, labels, keys, sampling))

    tokens = draw(labels, image_keys(0, jnp.arange(len(labels))))
    np.testing.assert_array_equal(tokens.coarse, batch["level_0"][labels])
    assert np.abs(tokens.fine - batch["mean"][labels]).mean() < 0.25
