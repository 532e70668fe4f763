"""ParScale: copies of the backbone's input behind learned prefixes, joined by learned weights."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integration.tiny import tiny_config
from random_weights import random_weights

from ear_jax import build
from ear_jax.backbones.parallel import ParallelBackbone
from ear_jax.config import kinds, read, uses
from ear_jax.config.validate import cross_faults
from ear_jax.config.values import flatten, unflatten
from ear_jax.errors import ConfigError
from ear_jax.generators.kind import image_keys
from ear_jax.nn.flops import count_flops
from ear_jax.nn.functional import functional, signature

BATCH, GRID, CHANNELS, COPIES, SMOOTHING = 3, 4, 4, 3, 0.1
NAME: dict[str, Any] = dict(
    generator__backbone__name="continuous_next_scale",
    tokenizer__name="lite_vae",
    generator__aggregate__prefix_tokens=2,
    generator__aggregate__smoothing=SMOOTHING,
)
PLAIN, PARALLEL = tiny_config(**NAME), tiny_config(**NAME, generator__aggregate__streams=COPIES)
INPUTS, LABELS, DROP = jnp.ones((BATCH, 20, CHANNELS + 1)), jnp.arange(BATCH), jnp.zeros(BATCH, bool)


def weights_of(config: Any) -> Any:
    spec = build.abstract_tokenizer(config).spec
    return random_weights(lambda keys: build.build_generator(config, spec, 4, rngs=keys))


@pytest.fixture(scope="module")
def model() -> Any:
    return weights_of(PARALLEL)


@functools.cache
def abstract(config: Any) -> Any:
    return build.abstract_generator(config, build.abstract_tokenizer(config).spec, 4)


def test_one_copy_is_todays_backbone_and_more_add_parameters_of_their_own_alone():
    plain, parallel = signature(abstract(PLAIN)), signature(abstract(PARALLEL))
    assert not isinstance(abstract(PLAIN).backbone, ParallelBackbone)
    assert {name: parallel[name] for name in plain} == plain
    own = parallel.keys() - plain.keys()
    assert all(name.startswith(("backbone/prefix_", "backbone/aggregation/")) for name in own)
    depth, width, heads = 2, 16, 2
    assert parallel["backbone/prefix_keys"][0] == (depth, COPIES, 2, heads, width // heads)
    assert parallel["backbone/aggregation/expand/kernel"][0] == (COPIES * width, width)
    groups = {name: abstract(PARALLEL).group(name) for name in own}
    assert {name for name, group in groups.items() if group.decays} == {
        "backbone/aggregation/expand/kernel",
        "backbone/aggregation/contract/kernel",
    }


def test_the_work_of_the_backbone_is_done_once_for_each_copy_that_is_run():
    def flops(config: Any, aggregate: int = 0) -> float:
        static, *arrays = functional(abstract(config).backbone)

        def last_scale(named: Any) -> Any:
            backbone = static.merge(named)
            backbone = backbone.first(aggregate) if aggregate else backbone
            condition, cache = backbone.condition(LABELS, DROP), backbone.empty_cache(BATCH)
            return backbone.extend(condition, jnp.ones((BATCH, GRID**2, CHANNELS + 1)), 2, cache)

        return count_flops(last_scale, arrays[0] | arrays[1])

    plain, one, two, three = flops(PLAIN), *(flops(PARALLEL, count) for count in (1, 2, 0))
    assert two - one == three - two > 0.95 * plain and flops(PARALLEL, COPIES) == three < 1.2 * COPIES * plain


def test_cached_passes_are_the_whole_pass_with_all_copies_or_fewer(model):
    static, *arrays = model
    keys_B = image_keys(0, jnp.arange(BATCH))

    def both() -> Any:
        module = static.merge(*arrays)
        found, head = {}, module.heads[0]
        original = head.predict
        for asked in (0, 2):
            predicted: list[jax.Array] = []
            head.predict = lambda hidden, kept=predicted: kept.append(hidden) or original(hidden)
            drawn = module.draw((), LABELS, keys_B, kinds.sampling_of(PARALLEL, guidance_scale=1.0, aggregate=asked))
            empty = jnp.zeros((BATCH, GRID, GRID, CHANNELS))
            _, inputs = module._pyramid(empty, lambda _, k, own=drawn: (own[k], jnp.ones(BATCH)))
            backbone = module.backbone.first(asked) if asked else module.backbone
            found[asked] = (jnp.concatenate(predicted, 1), backbone(inputs, LABELS, DROP))
        return found

    found = jax.jit(both)()
    for cached, whole in found.values():
        np.testing.assert_allclose(cached, whole, atol=2e-5)
    assert np.abs(np.asarray(found[0][0] - found[2][0])).max() > 1e-3


def test_weights_of_copies_sum_to_one_and_none_is_below_its_share_of_the_smoothing(model):
    aggregation = model[0].merge(*model[1:]).backbone.aggregation
    hidden = 9 * jax.random.normal(jax.random.key(0), (BATCH, 5, COPIES, 16))
    for copies in (COPIES, 2, 1):
        weights = np.asarray(aggregation.weights(hidden[:, :, :copies]))
        assert weights.shape == (BATCH, 5, copies) and weights.dtype == np.float32
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
        assert weights.min() >= SMOOTHING / copies - 1e-7
    joined = jnp.moveaxis(hidden, 2, 1).reshape(BATCH * COPIES, 5, 16)
    expected = (np.asarray(aggregation.weights(hidden))[..., None] * np.asarray(hidden)).sum(2)
    np.testing.assert_allclose(aggregation(joined, COPIES), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(aggregation(joined[::COPIES], 1), hidden[:, :, 0])


def test_prefixes_part_the_copies_and_are_learned_with_the_weights_that_join_them(model):
    static, parameters, rest = model

    def copies_and_gradients(parameters: Any) -> Any:
        def loss(parameters: Any) -> tuple[jax.Array, jax.Array]:
            backbone, seen = static.merge(parameters, rest).backbone, []
            joined = backbone.aggregation
            backbone.aggregation = Spy(joined, seen)
            hidden = backbone(INPUTS, LABELS, DROP)
            return jnp.square(hidden).sum(), seen[0]

        return jax.grad(loss, has_aux=True)(parameters)

    run = jax.jit(copies_and_gradients)
    gradients, hidden = run(parameters)
    apart = np.asarray(hidden).reshape(BATCH, COPIES, -1)
    assert np.abs(apart[:, 0] - apart[:, 1]).max(-1).min() > 1e-3
    own = [name for name in gradients if "/prefix_" in name or "/aggregation/" in name]
    assert len(own) == 6
    for name in own:
        assert np.isfinite(gradients[name]).all() and np.abs(gradients[name]).max() > 0, name
    same = {
        name: jnp.broadcast_to(leaf[:, :1], leaf.shape) if "/prefix_" in name else leaf
        for name, leaf in parameters.items()
    }
    alike = np.asarray(run(same)[1]).reshape(BATCH, COPIES, -1)
    np.testing.assert_allclose(alike[:, 0], alike[:, 1], atol=1e-6)


class Spy:
    """Stands in for the aggregation and keeps what it is given."""

    def __init__(self, inner: Any, seen: list[jax.Array]):
        self.inner, self.seen = inner, seen

    def __call__(self, hidden: jax.Array, copies: int) -> jax.Array:
        self.seen.append(hidden)
        return self.inner(hidden, copies)


def test_copies_where_there_are_none_or_not_so_many_are_refused_with_the_key():
    def faults(**overrides: Any) -> str:
        texts = [(path.replace("__", "."), str(value)) for path, value in overrides.items()]
        with pytest.raises(ConfigError) as refused:
            read.resolve(read.to_dict(PARALLEL), texts)
        return str(refused.value)

    said = faults(generator__backbone__name="masked")
    assert "aggregate.streams=3 is not for" in said and "only for continuous_next_scale" in said
    for key, bad in (("prefix_tokens", 0), ("streams", 0), ("smoothing", 1.5)):
        assert f"config.generator.aggregate.{key}={str(bad)!r}" in faults(**{f"generator__aggregate__{key}": bad})


def test_fewer_copies_are_asked_for_by_an_option_that_other_models_refuse():
    assert uses.sampling_asked(PARALLEL, {"aggregate": 2}).aggregate == 2
    with pytest.raises(
        ConfigError, match=r"^aggregate=4: is more than the .*streams=3 .*; use at most 3, or 0 for all"
    ):
        uses.sampling_asked(PARALLEL, {"aggregate": 4})
    many = unflatten({**flatten(PARALLEL), "sample.aggregate": 4})
    # A recipe that says nothing of copies, beside a model that has learned them: the model counts.
    recipe = unflatten({**flatten(PLAIN), "sample.aggregate": 2})
    assert not cross_faults(recipe) and not list(uses.refusals("sample", ["sample.aggregate"], recipe, PARALLEL))
    for said in (uses.refusals("sample", ["sample.aggregate"], many, PARALLEL), uses.idle([], many)):
        assert [text.partition(" ")[0] for text in said] == ["config.sample.aggregate=4:"]
    asked = dataclasses.replace(recipe, once={"sample.aggregate": 0})
    for config, paths, reason in ((recipe, [], "use at most 1"), (asked, ["sample.aggregate"], "is one copy")):
        (said,) = uses.idle(paths, config)
        assert reason in said
    (said,) = uses.idle(["generator.aggregate.streams", "generator.aggregate.smoothing"], PLAIN)
    assert said.startswith("config.generator.aggregate.smoothing=0.1: has no effect")
    assert not list(uses.idle(["generator.aggregate.smoothing"], PARALLEL))
    for model, reason in ((PLAIN, "is one copy"), (tiny_config(), "only continuous_next_scale reads it")):
        asked = unflatten({**flatten(model), "sample.aggregate": 2})
        with pytest.raises(ConfigError) as refused:
            uses.sampling_asked(model, {"aggregate": 2})
        (said,) = uses.refusals("sample", ["sample.aggregate"], asked, model)
        assert str(refused.value) == said.removeprefix("config.sample.") and reason in said
