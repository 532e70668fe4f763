"""What every tokenizer, backbone, head and data source must do, run over every entry of the registries.

A part that is newly registered in `build.py` (or in `data/open.py`) is tested here without a line of this file
being changed: tokenizers, backbones and kinds of generator are chosen by name in the tiny recipe, heads by name from
`build.HEADS`. Only a new kind of data source needs an entry in `MAKE_SOURCE`, which says how to make a tiny one;
without it, its test fails.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from integration.tiny import tiny_config
from PIL import Image
from quick import QUICK
from random_weights import random_module, random_weights

from ear_jax import build
from ear_jax.config import derive, kinds
from ear_jax.config.schema import Config, DataConfig, ShapesConfig
from ear_jax.config.values import leaves
from ear_jax.data.open import SOURCES, open_split
from ear_jax.data.sources import SplitSource
from ear_jax.errors import ConfigError
from ear_jax.generators.kind import Generator, image_keys, sample
from ear_jax.levels import LevelSpec
from ear_jax.nn.functional import Keys, arrays_of, functional, merged_arrays, signature
from ear_jax.types import Group, Posterior, Tokens, cached_batch

IMAGE_PX, CLASSES, BATCH = 16, 4, 3
COARSE, FINE = LevelSpec("coarse", 2, "discrete", 8), LevelSpec("fine", 3, "continuous", 5)
GENERATOR = tiny_config().generator
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def test_the_schema_offers_exactly_what_is_registered():
    choices = {name: set(leaf.metadata["choices"]) for name, leaf in leaves().items() if leaf.metadata["choices"]}
    assert choices["tokenizer.name"] == set(build.TOKENIZERS)
    assert choices["generator.backbone.name"] == set(build.GENERATORS) == set(kinds.KINDS)
    assert {"softmax", *choices["generator.continuous_head"]} == set(build.HEADS)
    assert set(build.BACKBONES) <= set(build.GENERATORS)


# --- tokenizers ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class TokenizerCase:
    """A tokenizer with random weights, and its calls as compiled functions of arrays, so that all tests share them."""

    config: Config
    module: Any
    images: jax.Array

    def __post_init__(self) -> None:
        static, parameters, rest = functional(self.module)
        self.spec = self.module.spec
        self.arrays = {**parameters, **rest}
        self.posterior = jax.jit(lambda arrays, images: static.merge(arrays).posterior(images))
        self.decode = jax.jit(lambda arrays, tokens: static.merge(arrays).decode(tokens))
        self.merge = lambda arrays: static.merge(arrays)
        self.encoded = self.posterior(self.arrays, self.images)
        self.decoded = self.decode(self.arrays, self.encoded.sample(None))

    @property
    def is_continuous(self) -> bool:
        return self.spec.levels[-1].kind == "continuous"

    @property
    def discrete(self) -> list[LevelSpec]:
        return [level for level in self.spec.levels if level.kind == "discrete"]


@pytest.fixture(scope="module", params=sorted(build.TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> TokenizerCase:
    config = tiny_config(tokenizer__name=request.param)
    module = random_module(lambda keys: build.build_tokenizer(config, rngs=keys))
    images = jax.random.uniform(jax.random.key(0), (BATCH, IMAGE_PX, IMAGE_PX, 3), minval=-1.0)
    return TokenizerCase(config, module, images)


def test_a_tokenizer_keeps_what_its_spec_says(tokenizer):
    spec, tokens = tokenizer.spec, tokenizer.encoded.sample(None)
    assert spec.image_px == IMAGE_PX and len(tokens.levels) == len(spec.levels)
    of_levels = [level.kind for level in spec.levels]
    assert set(of_levels[:-1]) <= {"discrete"}, "ids first, a continuous level only at the end"
    assert spec.levels == derive.tokenizer_levels(tokenizer.config), "what the config said before"
    assert len({level.name for level in spec.levels}) == len(spec.levels)
    assert all(a.grid <= b.grid for a, b in itertools.pairwise(spec.levels)), "coarsest first"
    for level, values in zip(spec.levels, tokens.levels, strict=True):
        if level.kind == "discrete":
            assert (values.shape, values.dtype) == ((BATCH, level.tokens), jnp.int32)
            assert (values >= 0).all() and (values < level.size).all()
        else:
            assert (values.shape, values.dtype) == ((BATCH, level.tokens, level.size), jnp.float32)
    if tokenizer.is_continuous:
        assert (tokenizer.encoded.std >= 0).all() and np.isfinite(tokenizer.encoded.std).all()


def test_a_tokenizer_decodes_to_images_in_range(tokenizer):
    assert (tokenizer.decoded.shape, tokenizer.decoded.dtype) == (tokenizer.images.shape, jnp.float32)
    assert np.abs(tokenizer.decoded).max() <= 1.0
    assert np.asarray(tokenizer.decoded).std() > 1e-3, "not a constant"


def test_a_tokenizer_draws_from_its_posterior_with_a_key_only(tokenizer):
    mean, drawn = tokenizer.encoded.sample(None), tokenizer.encoded.sample(jax.random.key(1))
    for ids, same in zip(drawn.levels, mean.levels, strict=True):
        if ids.ndim == 2:
            np.testing.assert_array_equal(ids, same)
    if not tokenizer.is_continuous:
        return
    np.testing.assert_array_equal(mean.fine, tokenizer.encoded.mean)
    if (tokenizer.encoded.std == 0).all():  # a residual without spread
        np.testing.assert_array_equal(drawn.fine, mean.fine)
        return
    standardised = (drawn.fine - tokenizer.encoded.mean) / tokenizer.encoded.std
    assert 0.7 < float(standardised.std()) < 1.3


def test_latent_statistics_give_unit_scale_and_change_no_image(tokenizer):
    if not tokenizer.is_continuous:
        pytest.skip("has no continuous level")
    raw = tokenizer.encoded
    mean = raw.mean.mean((0, 1))
    std = jnp.sqrt((raw.mean**2 + raw.std**2).mean((0, 1)) - mean**2)
    module = tokenizer.merge(tokenizer.arrays)
    module.set_latent_statistics(mean, std)
    arrays = merged_arrays(module)
    unit = tokenizer.posterior(arrays, tokenizer.images)
    np.testing.assert_allclose(unit.mean.mean((0, 1)), 0.0, atol=2e-3)
    np.testing.assert_allclose((unit.mean**2 + unit.std**2).mean((0, 1)), 1.0, atol=5e-3)
    decoded = tokenizer.decode(arrays, unit.sample(None))
    np.testing.assert_allclose(decoded, tokenizer.decoded, atol=2e-3)


def test_every_level_of_a_tokenizer_shows_in_the_image(tokenizer):
    tokens = tokenizer.encoded.sample(None)
    for index, level in enumerate(tokenizer.spec.levels):
        values = list(tokens.levels)
        values[index] = (values[index] + 1) % level.size if level.kind == "discrete" else values[index] + 1.0
        changed = tokenizer.decode(tokenizer.arrays, Tokens(tuple(values)))
        assert np.abs(changed - tokenizer.decoded).max() > 1e-3, level.name


def test_the_coarse_levels_of_a_tokenizer_decode_alone(tokenizer):
    tokens = tokenizer.encoded.sample(None)
    for count in range(1, min(len(tokenizer.discrete) + 1, len(tokens.levels))):
        coarse = tokenizer.decode(tokenizer.arrays, Tokens(tokens.levels[:count]))
        assert coarse.shape == tokenizer.images.shape and np.isfinite(coarse).all() and np.abs(coarse).max() <= 1.0
        assert np.abs(coarse - tokenizer.decoded).max() > 1e-3, "the dropped levels must be missing"


def test_images_do_not_see_each_other_in_a_tokenizer(tokenizer):
    turned = tokenizer.posterior(tokenizer.arrays, tokenizer.images[::-1])
    for ids, other in zip(tokenizer.encoded.discrete, turned.discrete, strict=True):
        np.testing.assert_array_equal(ids, other[::-1])
    if tokenizer.is_continuous:
        np.testing.assert_allclose(turned.mean[::-1], tokenizer.encoded.mean, atol=1e-4)


@pytest.mark.parametrize("name", sorted(build.TOKENIZERS))
def test_a_tokenizer_in_bfloat16_keeps_float32_outside(name):
    config = tiny_config(tokenizer__name=name, tokenizer_training__compute_dtype="bfloat16")
    static, parameters, rest = functional(build.abstract_tokenizer(config))
    assert {leaf.dtype for leaf in parameters.values()} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((BATCH, IMAGE_PX, IMAGE_PX, 3), jnp.float32)

    def both(parameters: Any, rest: Any, images: jax.Array) -> Any:
        module = static.merge(parameters, rest)
        posterior = module.posterior(images)
        return [*jax.tree.leaves((posterior.mean, posterior.std)), module.decode(posterior.sample(None))]

    jaxpr, shapes = jax.make_jaxpr(both, return_shape=True)(parameters, rest, images)
    assert {leaf.dtype for leaf in shapes} == {FLOAT32}
    assert "bf16" in str(jaxpr), "no product runs in bfloat16"


# --- backbones -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(build.BACKBONES))
def hidden_states(request: pytest.FixtureRequest) -> Callable[..., jax.Array]:
    """A backbone of two levels as a compiled function (levels, mask, labels, drop), dropout off."""
    make = build.BACKBONES[request.param]
    static, parameters, rest = random_weights(lambda keys: make(GENERATOR, (COARSE, FINE), CLASSES, FLOAT32, keys))
    compiled = jax.jit(lambda p, r, *args: static.merge(p, r)(*args))
    return lambda *args: compiled(parameters, rest, *args)


IDS = jnp.asarray([[0, 3, 5, 7], [1, 1, 2, 6]])
VALUES = jax.random.normal(jax.random.key(3), (2, FINE.tokens, FINE.size))
COARSE_MASK, FINE_MASK = jnp.arange(4)[None] < jnp.asarray([[2], [2]]), jnp.arange(9)[None] < jnp.asarray([[4], [6]])
LABELS, KEEP = jnp.asarray([0, 2]), jnp.zeros((2,), bool)


def test_a_backbone_gives_hidden_states_of_the_last_level(hidden_states):
    width = GENERATOR.backbone.width
    coarse, fine = (
        hidden_states((IDS,), COARSE_MASK, LABELS, KEEP),
        hidden_states((IDS, VALUES), FINE_MASK, LABELS, KEEP),
    )
    assert (coarse.shape, coarse.dtype) == ((2, COARSE.tokens, width), jnp.float32)
    assert (fine.shape, fine.dtype) == ((2, FINE.tokens, width), jnp.float32)
    assert np.isfinite(coarse).all() and np.isfinite(fine).all()


def test_a_backbone_sees_visible_tokens_and_no_masked_ones(hidden_states):
    """By gradient for continuous tokens: exactly zero under the mask, anything else outside."""
    gradient = jax.grad(lambda v: (hidden_states((IDS, v), FINE_MASK, LABELS, KEEP) ** 2).sum())(VALUES)
    seen = np.abs(gradient).max(-1)
    assert (seen[np.asarray(FINE_MASK)] == 0).all() and (seen[~np.asarray(FINE_MASK)] > 0).all()
    plain = hidden_states((IDS,), COARSE_MASK, LABELS, KEEP)
    np.testing.assert_array_equal(hidden_states((IDS.at[:, 0].set(4),), COARSE_MASK, LABELS, KEEP), plain)
    assert np.abs(hidden_states((IDS.at[:, 3].set(4),), COARSE_MASK, LABELS, KEEP) - plain).max() > 1e-4


def test_a_backbone_sees_all_earlier_levels(hidden_states):
    plain = hidden_states((IDS, VALUES), FINE_MASK, LABELS, KEEP)
    for place in range(COARSE.tokens):
        changed = hidden_states((IDS.at[:, place].set(4), VALUES), FINE_MASK, LABELS, KEEP)
        assert np.abs(changed - plain).max() > 1e-4, place


def test_a_backbone_sees_the_label_unless_it_is_dropped(hidden_states):
    other = jnp.asarray([1, 3])
    plain, changed = (hidden_states((IDS,), COARSE_MASK, labels, KEEP) for labels in (LABELS, other))
    assert (np.abs(plain - changed).max((1, 2)) > 1e-4).all()
    dropped = [hidden_states((IDS,), COARSE_MASK, labels, jnp.ones((2,), bool)) for labels in (LABELS, other)]
    np.testing.assert_array_equal(*dropped)
    assert (np.abs(plain - dropped[0]).max((1, 2)) > 1e-4).all(), "no label is another condition than any label"


def test_images_do_not_see_each_other_in_a_backbone(hidden_states):
    plain = hidden_states((IDS, VALUES), FINE_MASK, LABELS, KEEP)
    changed = hidden_states((IDS.at[1].set(0), VALUES.at[1].set(9.0)), FINE_MASK, LABELS.at[1].set(3), KEEP)
    np.testing.assert_array_equal(plain[0], changed[0])


# --- heads -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class HeadCase:
    """A head with random weights (`at_start` are its own first ones), with tokens of its kind."""

    name: str
    level: LevelSpec

    def __post_init__(self) -> None:
        def make(keys: Keys) -> Any:
            return build.HEADS[self.name](GENERATOR, self.level, FLOAT32, keys)

        static, self.parameters, self.rest = random_weights(make)
        noisy = static.merge(self.parameters, self.rest)
        self.at_start = jax.jit(lambda: arrays_of(make(Keys(0)))[0])()
        self.guides, self.is_discrete = noisy.guides, self.level.kind == "discrete"
        self.loss = jax.jit(lambda p, *args: static.merge(p, self.rest).loss(*args))
        self.gradient = jax.jit(jax.value_and_grad(lambda p, *args: static.merge(p, self.rest).loss(*args)[0]))
        self.sample = jax.jit(lambda hidden, keys, temperature: noisy.sample(noisy.predict(hidden), keys, temperature))
        self.hidden = jax.random.normal(jax.random.key(0), (BATCH, self.level.tokens, GENERATOR.backbone.width))
        shape = (BATCH, self.level.tokens)
        self.target = jnp.arange(BATCH * self.level.tokens).reshape(shape) % self.level.size
        if not self.is_discrete:
            self.target = jax.random.normal(jax.random.key(1), (*shape, self.level.size))
        self.mask = jnp.arange(self.level.tokens)[None] < jnp.asarray([[1], [2], [self.level.tokens]])


@pytest.fixture(scope="module", params=sorted(build.HEADS))
def head(request: pytest.FixtureRequest) -> HeadCase:
    built = nnx.eval_shape(lambda: build.HEADS[request.param](GENERATOR, FINE, FLOAT32, Keys(0)))
    return HeadCase(request.param, FINE if built.token_kind == "continuous" else COARSE)


def test_a_head_starts_with_a_finite_loss_and_gradient(head):
    loss, gradients = head.gradient(head.at_start, head.hidden, head.target, head.mask, jax.random.key(0))
    assert np.isfinite(loss) and (loss.shape, loss.dtype) == ((), jnp.float32)
    assert all(np.isfinite(leaf).all() for leaf in gradients.values())
    assert max(np.abs(leaf).max() for leaf in gradients.values()) > 0


def test_the_loss_of_a_head_ignores_unmasked_tokens(head):
    def measure(hidden: jax.Array, target: jax.Array, mask: jax.Array) -> Any:
        return head.loss(head.parameters, hidden, target, mask, jax.random.key(0))

    loss, metrics = measure(head.hidden, head.target, head.mask)
    hidden_mask, tail = head.mask[..., None], () if head.is_discrete else (1,)
    shifted = (head.target + 1) % head.level.size if head.is_discrete else head.target + 10.0
    mask = head.mask.reshape(*head.mask.shape, *tail)
    elsewhere, _ = measure(jnp.where(hidden_mask, head.hidden, 7.0), jnp.where(mask, head.target, shifted), head.mask)
    np.testing.assert_allclose(elsewhere, loss, rtol=1e-6)
    there, _ = measure(head.hidden, jnp.where(mask, shifted, head.target), head.mask)
    assert abs(there - loss) > 1e-3
    assert all(value.shape == () and np.isfinite(value) for value in metrics.values())
    nothing, _ = measure(head.hidden, head.target, jnp.zeros_like(head.mask))
    assert nothing == 0.0, "and no division by an empty mask"


def test_a_head_draws_tokens_of_its_kind(head):
    drawn = head.sample(head.hidden, jax.random.split(jax.random.key(0), BATCH), 1.0)
    assert (drawn.shape, drawn.dtype) == (head.target.shape, jnp.int32 if head.is_discrete else jnp.float32)
    assert np.isfinite(drawn).all()
    if head.is_discrete:
        assert (drawn >= 0).all() and (drawn < head.level.size).all()
    assert head.guides in ("hidden", "logits", "score"), "what the sampler can mix"


def test_a_draw_depends_on_its_own_key_alone(head):
    hidden = jnp.broadcast_to(head.hidden[:1], head.hidden.shape)
    keys = jax.random.split(jax.random.key(5), BATCH)
    drawn = np.asarray(head.sample(hidden, keys, 1.0))
    np.testing.assert_allclose(head.sample(hidden, keys[::-1], 1.0)[::-1], drawn, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(head.sample(hidden, keys.at[1:].set(keys[0]), 1.0)[0], drawn[0])
    many = [head.sample(hidden, jax.random.split(jax.random.key(seed), BATCH), 1.0) for seed in range(3)]
    assert any((np.asarray(other) != drawn).any() for other in many), "and on no key it would be no draw"


@pytest.mark.parametrize("name", sorted(build.HEADS))
def test_a_head_in_bfloat16_computes_its_loss_in_float32(name):
    for level in (COARSE, FINE):
        make = lambda level=level: build.HEADS[name](GENERATOR, level, BFLOAT16, Keys(0))  # noqa: E731
        module = nnx.eval_shape(make)
        if module.token_kind != level.kind:
            continue
        static, parameters, rest = functional(module)
        assert {leaf.dtype for leaf in parameters.values()} == {jnp.dtype("float32")}
        shape = (BATCH, level.tokens)
        target = jax.ShapeDtypeStruct(shape, jnp.int32)
        if level.kind == "continuous":
            target = jax.ShapeDtypeStruct((*shape, level.size), jnp.float32)
        hidden = jax.ShapeDtypeStruct((*shape, GENERATOR.backbone.width), jnp.float32)
        arguments = (parameters, rest, hidden, target, jax.ShapeDtypeStruct(shape, jnp.bool_), jax.random.key(0))
        loss, _ = jax.eval_shape(lambda p, r, *own, s=static: s.merge(p, r).loss(*own), *arguments)
        assert loss.dtype == jnp.float32


# --- kinds of generator ----------------------------------------------------------------------------------------------


def generator_config(name: str) -> Config:
    """Return the tiny recipe of a kind, on the tokenizer of most kinds of levels that it can draw.

    Patches of two latent pixels a side and a weight of the coarse level keep what is done with them from hiding.
    """
    fitting = []
    for tokenizer, first in itertools.product(sorted(build.TOKENIZERS), ("continuous", "coarse")):
        config = tiny_config(
            tokenizer__name=tokenizer,
            generator__pyramid__first_scale=first,
            generator__backbone__name=name,
            generator__patch_size=2,
            generator__coarse__loss_weight=0.5,
        )
        if not list(kinds.KINDS[name].faults(config)):
            levels = kinds.levels(config)
            fitting.append((len({level.kind for level in levels}), -len(levels), len(fitting), config))
    assert fitting, f"no tokenizer has levels that {name} can draw"
    return max(fitting)[-1]


@dataclasses.dataclass
class GeneratorCase:
    """A kind of generator with random weights (`at_start` are its own first ones), and its calls as programs."""

    config: Config

    def __post_init__(self) -> None:
        self.abstract_tokenizer = build.abstract_tokenizer(self.config)
        self.spec = self.abstract_tokenizer.spec

        def make(keys: Keys) -> Any:
            return build.build_generator(self.config, self.spec, CLASSES, rngs=keys)

        static, self.parameters, self.rest = random_weights(make)
        self.arrays = {**self.parameters, **self.rest}
        self.module = static.merge(self.arrays)
        self.levels = self.module.levels
        self.at_start = jax.jit(lambda: arrays_of(make(Keys(0)))[0], compiler_options=QUICK)
        self.gradient = jax.jit(
            jax.value_and_grad(
                lambda p, batch, rng: static.merge(p, self.rest).loss(batch, rng, jnp.int32(0), {}), has_aux=True
            ),
            compiler_options=QUICK,
        )
        self.draw = jax.jit(lambda *args: self.module.draw(*args), compiler_options=QUICK)
        self.sampling = kinds.sampling_of(self.config, steps=3, guidance_scale=2.0, top_k=6, top_p=0.9, density_draws=3)
        self.tokens = Tokens(tuple(self._tokens(number) for number in range(len(self.spec.levels))))

    def _tokens(self, number: int) -> jax.Array:
        level, rng = self.spec.levels[number], np.random.default_rng(number)
        if level.kind == "discrete":
            return jnp.asarray(rng.integers(0, level.size, (BATCH, level.tokens)), jnp.int32)
        return jnp.asarray(rng.normal(size=(BATCH, level.tokens, level.size)), jnp.float32)

    def batch(self) -> dict[str, Any]:
        """Return cached tokens as training reads them."""
        ids = tuple(level for level in self.tokens.levels if level.ndim == 2)
        std = None if self.tokens.fine is None else jnp.full_like(self.tokens.fine, 0.1)
        named = {"label": jnp.arange(BATCH) % CLASSES, "index": jnp.arange(BATCH)}
        return named | Posterior(ids, self.tokens.fine, std).to_batch()

    def pieces(self, labels: Any, keys_B: jax.Array) -> list[tuple[jax.Array, ...]]:
        """Draw all levels, piece after piece."""
        found, labels_B = [], jnp.asarray(labels, jnp.int32)
        while sum(map(len, found)) < len(self.levels):
            found.append(self.draw(tuple(itertools.chain(*found)), labels_B, keys_B, self.sampling))
            assert found[-1], "a draw adds a level at least"
        return found

    def drawn(self, labels: Any, keys_B: jax.Array) -> list[np.ndarray]:
        """Return all levels."""
        return [np.asarray(level) for level in itertools.chain(*self.pieces(labels, keys_B))]


@pytest.fixture(scope="module", params=sorted(build.GENERATORS))
def generator(request: pytest.FixtureRequest) -> GeneratorCase:
    return GeneratorCase(generator_config(request.param))


def test_a_generator_draws_the_levels_that_its_kind_says_before_jax(generator):
    assert generator.levels == kinds.levels(generator.config)
    assert len({level.name for level in generator.levels}) == len(generator.levels)
    steps = kinds.level_steps(generator.config)
    assert len(steps) == len(generator.levels) and min(steps) >= 1
    abstract = build.abstract_generator(generator.config, generator.spec, CLASSES)
    assert abstract.levels == generator.levels and signature(abstract) == signature(generator.module)
    assert isinstance(generator.module, Generator)


def test_tokens_become_levels_of_a_generator_and_come_back(generator):
    levels = generator.module.to_levels(generator.tokens)
    assert [level.shape for level in levels] == [(BATCH, *level.token_shape) for level in generator.levels]
    tokens = generator.module.to_tokens(levels)
    for found, wanted in zip(tokens.levels, generator.tokens.levels, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype


def test_a_generator_starts_with_a_finite_loss_and_gradients(generator):
    shapes = {name: (leaf.shape, leaf.dtype.kind) for name, leaf in generator.batch().items()}
    promised = cached_batch(generator.spec.levels, BATCH)
    assert shapes == {name: (leaf.shape, leaf.dtype.kind) for name, leaf in promised.items()}
    (loss, metrics), gradients = generator.gradient(generator.at_start(), generator.batch(), jax.random.key(0))
    assert np.isfinite(loss) and (loss.shape, loss.dtype) == ((), jnp.float32)
    assert all(value.shape == () and np.isfinite(value) for value in metrics.values()), metrics
    assert all(np.isfinite(leaf).all() for leaf in gradients.values())
    assert max(np.abs(leaf).max() for leaf in gradients.values()) > 0


def test_the_weighted_losses_of_a_generator_sum_to_its_loss(generator):
    """And its random numbers are those of the key: the same one gives the same loss, another one another."""
    run = lambda seed: generator.gradient(generator.parameters, generator.batch(), jax.random.key(seed))[0]  # noqa: E731
    (loss, metrics), weights = run(0), generator.module.loss_weights
    assert {f"loss/{level.name}" for level in generator.levels} <= set(metrics)
    if weights:
        assert {f"loss/{name}" for name in weights} == {name for name in metrics if name.startswith("loss/")}
        total = sum(weight * float(metrics[f"loss/{name}"]) for name, weight in weights.items())
        np.testing.assert_allclose(loss, total, rtol=1e-6)
    assert run(0)[0] == loss and run(1)[0] != loss


def test_a_generator_has_a_group_for_every_parameter(generator):
    groups = {name: generator.module.group(name) for name in generator.parameters}
    assert all(isinstance(group, Group) for group in groups.values())
    assert any(group.decays for group in groups.values())
    assert not [name for name, group in groups.items() if name.endswith(("/bias", "/scale")) and group.decays]
    abstract = build.abstract_generator(generator.config, generator.spec, CLASSES)
    assert {name: abstract.group(name) for name in groups} == groups, "shapes are enough to know it"


def test_what_a_generator_freezes_is_the_tokenizers_and_no_parameter(generator):
    of_tokenizer, of_generator = signature(generator.abstract_tokenizer), signature(generator.module)
    assert isinstance(generator.module.frozen, tuple)
    for beginning in generator.module.frozen:
        names = {name for name in of_generator if name.startswith(beginning)}
        assert names and names.isdisjoint(generator.parameters), beginning
        assert {name: of_generator[name] for name in names} == {
            name: shape for name, shape in of_tokenizer.items() if name.startswith(beginning)
        }


def test_draws_of_a_generator_one_after_the_other_give_all_its_levels(generator):
    labels, keys_B = [0, 1, 0], image_keys(0, jnp.arange(BATCH))
    drawn = generator.drawn(labels, keys_B)
    for level, values in zip(generator.levels, drawn, strict=True):
        assert values.shape == (BATCH, *level.token_shape) and np.isfinite(values).all()
        if level.kind == "discrete":
            assert values.dtype == np.int32 and (values >= 0).all() and (values < level.size).all()
        else:
            # A token left at its empty value would be exactly zero.
            assert values.dtype == np.float32 and (np.abs(values).min(-1) > 0).all()
    shapes = jax.eval_shape(
        lambda keys: sample(generator.module, jnp.asarray(labels), keys, generator.sampling), keys_B
    )
    assert [(leaf.shape, leaf.dtype) for leaf in shapes] == [(values.shape, values.dtype) for values in drawn]
    tokens = generator.module.to_tokens(tuple(map(jnp.asarray, drawn)))
    assert [level.shape for level in tokens.levels] == [level.shape for level in generator.tokens.levels]


def test_an_image_of_a_generator_depends_on_its_own_key_and_label_alone(generator):
    def differ(first: list[np.ndarray], other: list[np.ndarray], row: int) -> bool:
        return bool(np.abs(first[-1][row] - other[-1][row]).max() > 1e-3)

    labels, keys_B = [0, 1, 0], image_keys(0, jnp.arange(BATCH))
    drawn = generator.drawn(labels, keys_B)
    assert differ(drawn, [level[::-1] for level in drawn], 0), "equal labels, other indices: other images"
    others = generator.drawn([0, 2, 3], keys_B.at[1].set(jax.random.key(9)).at[2].set(keys_B[0]))
    for level, other in zip(drawn, others, strict=True):
        if level.dtype == np.int32:
            np.testing.assert_array_equal(other[0], level[0])
        else:
            np.testing.assert_allclose(other[0], level[0], rtol=1e-4, atol=2e-5)
    assert differ(drawn, others, 1) and differ(drawn, others, 2)
    turned = generator.drawn(labels[::-1], keys_B[::-1])
    for level, other in zip(drawn, turned, strict=True):
        if level.dtype == np.int32:
            np.testing.assert_array_equal(other[::-1], level)
        else:
            np.testing.assert_allclose(other[::-1], level, rtol=1e-4, atol=2e-5)
    relabelled, reseeded = generator.drawn([1, 2, 3], keys_B), generator.drawn(labels, image_keys(1, jnp.arange(BATCH)))
    assert any(differ(drawn, relabelled, row) for row in range(BATCH)), "labels matter"
    assert all(differ(drawn, reseeded, row) for row in range(BATCH)), "and so does the seed"


def _wide(function: Callable[..., Any], *arguments: Any) -> set[str]:
    """Return what of 64 bits a function draws, computes (scalars of Python aside) or gives where it is allowed."""
    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(function)(*arguments)
    given = {str(leaf.dtype) for leaf in jaxpr.out_avals} & {"float64"}
    return given | set(re.findall(r"f64\[\d+[^\]]*\]|bit_width=64", str(jaxpr)))


def test_a_generator_computes_the_same_with_64_bits_allowed(generator):
    """JAX_ENABLE_X64 changes the dtype of every draw and carry that does not name its own."""
    batch = {name: np.asarray(values) for name, values in generator.batch().items()}
    assert not _wide(generator.gradient.__wrapped__, generator.parameters, batch, jax.random.key(0))
    drawn = generator.drawn([0, 1, 0], image_keys(0, jnp.arange(BATCH)))
    with jax.enable_x64(True):
        wide = generator.drawn([0, 1, 0], image_keys(0, jnp.arange(BATCH)))
    for level, other in zip(drawn, wide, strict=True):
        np.testing.assert_array_equal(other, level)
        assert other.dtype == level.dtype


@pytest.mark.slow
def test_a_generator_has_the_same_loss_with_64_bits_allowed(generator):
    batch = {name: np.asarray(values) for name, values in generator.batch().items()}
    (loss, _), _ = generator.gradient(generator.parameters, batch, jax.random.key(0))
    with jax.enable_x64(True):
        (wide, _), _ = generator.gradient(generator.parameters, batch, jax.random.key(0))
    assert wide == loss and wide.dtype == FLOAT32


@pytest.mark.parametrize("name", sorted(build.TOKENIZERS))
def test_training_a_tokenizer_computes_the_same_with_64_bits_allowed(name):
    config = tiny_config(tokenizer__name=name)
    static, parameters, rest = functional(nnx.eval_shape(lambda: build.build_tokenizer_objective(config, rngs=Keys(0))))
    ids = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    batch = {"image": jax.ShapeDtypeStruct((BATCH, IMAGE_PX, IMAGE_PX, 3), jnp.uint8), "label": ids, "index": ids}

    def loss(parameters: Any, rest: Any, batch: Any, rng: jax.Array) -> Any:
        return static.merge(parameters, rest).loss(batch, rng, jnp.int32(0), {})

    assert not _wide(loss, parameters, rest, batch, jax.random.key(0))


# --- data sources ----------------------------------------------------------------------------------------------------


def _folder(root: Path) -> DataConfig:
    for label, number in itertools.product(("cat", "dog"), range(6)):
        path = root / label / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        colours = np.random.default_rng([len(label), ord(label[0]), number]).integers(0, 255, (9, 12, 3), np.uint8)
        Image.fromarray(colours).save(path)
    return DataConfig(source=f"folder:{root}", eval_fraction=0.25)


def _tfds(root: Path) -> DataConfig:
    from test_data_tfds import write

    write(str(root), "pets", {"train": 12, "test": 5})
    return DataConfig(source="tfds:pets", tfds_directory=str(root))


MAKE_SOURCE: dict[str, Callable[[Path], DataConfig]] = {
    "shapes": lambda root: DataConfig(source="shapes", eval_images=6, shapes=ShapesConfig(images=12, classes=3)),
    "folder": _folder,
    "tfds": _tfds,
}


@pytest.fixture(scope="module", params=sorted(SOURCES))
def data_config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    assert request.param in MAKE_SOURCE, f"add to MAKE_SOURCE how to make a tiny {request.param!r} data set"
    config = MAKE_SOURCE[request.param](tmp_path_factory.mktemp(request.param))
    return dataclasses.replace(config, image_px=8, decode_threads=1)


pytest_tfds = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest_tfds
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_source_serves_labelled_images_of_one_size(data_config, split):
    source = open_split(data_config, split, seed=0)
    assert isinstance(source, SplitSource) and source.image_px == 8 and len(source) > 2
    assert len(set(source.class_names)) == len(source.class_names) > 1
    count = len(source)
    batch = source.batch(np.arange(count), np.zeros(count, bool))
    assert (batch["image"].shape, batch["image"].dtype) == ((count, 8, 8, 3), np.uint8)
    assert (batch["label"].dtype, batch["index"].dtype) == (np.int32, np.int64)
    assert batch["label"].min() >= 0 and batch["label"].max() < len(source.class_names)
    assert batch["index"].tolist() == list(range(count))
    assert len({image.tobytes() for image in batch["image"]}) > 2, "not all the same picture"
    for row in (0, count - 1):
        alone = source.batch(np.array([row]), np.array([False]))
        np.testing.assert_array_equal(alone["image"][0], batch["image"][row])
        assert (alone["label"][0], alone["index"][0]) == (batch["label"][row], row)


@pytest_tfds
def test_a_source_mirrors_what_it_is_asked_to(data_config):
    source = open_split(data_config, "train", seed=0)
    rows = np.asarray([2, 0, 1])
    plain, mixed = (source.batch(rows, np.asarray(flips)) for flips in ([False] * 3, [True, False, True]))
    np.testing.assert_array_equal(mixed["image"][[0, 2]], plain["image"][[0, 2], :, ::-1])
    np.testing.assert_array_equal(mixed["image"][1], plain["image"][1])
    np.testing.assert_array_equal(mixed["label"], plain["label"])


@pytest_tfds
def test_the_digest_of_a_source_names_its_content(data_config):
    digest = open_split(data_config, "train", seed=0).digest
    assert open_split(data_config, "train", seed=0).digest == digest
    assert open_split(data_config, "eval", seed=0).digest != digest
    assert open_split(dataclasses.replace(data_config, image_px=4), "train", seed=0).digest != digest


def test_an_unknown_source_is_refused_by_name():
    with pytest.raises(ConfigError, match="is not a data source"):
        open_split(DataConfig(source="video:clips"), "train", seed=0)
