"""What a call may ask of a finished model: every key of the schema is applied, or refused with the reason."""

import dataclasses
from typing import Any

import pytest
from integration.tiny import tiny_config

from ear_jax import build
from ear_jax.config import kinds, read, uses
from ear_jax.config.schema import IMAGES, USES, Config
from ear_jax.config.validate import cross_faults
from ear_jax.config.values import Leaf, flatten, leaves, unflatten
from ear_jax.errors import ConfigError
from ear_jax.nn.functional import functional
from ear_jax.sampling import Sampling
from ear_jax.stages.session import inputs


def test_every_key_says_who_reads_it_of_a_finished_model_and_whether_it_is_of_one_call() -> None:
    for path, leaf in leaves().items():
        assert set(leaf.metadata["read_by"]) <= {*USES, IMAGES}, path
        assert leaf.metadata["is_asked"] in (True, False), path
        assert not (leaf.metadata["is_asked"] and path in inputs(Config(), "generator")), path


STEPS = {"tokenizer_training": {"steps": 9}, "generator_training": {"steps": 9}}


def _another(leaf: Leaf) -> Any:
    choices = [choice for choice in leaf.metadata["choices"] if choice != leaf.default]
    if choices:
        return choices[0]
    if isinstance(leaf.default, bool):
        return not leaf.default
    if isinstance(leaf.default, str):
        return "another"
    if isinstance(leaf.default, tuple):
        return (*leaf.default, "another" if "str" in str(leaf.kind) else 1)
    moved, high = leaf.default + 3, leaf.metadata["high"]
    is_beyond = isinstance(moved, float) and high is not None and leaf.default < high < moved
    return (leaf.default + high) / 2 if is_beyond else moved


def _asked(config: Config) -> Any:
    """Return what `--task=sample` reads of a configuration itself: the sampling, what is drawn and how it runs."""
    own = config.sample
    what = own.labels, own.count, own.seed, own.batch_size, own.format, config.run.program_cache
    return kinds.sampling_of(config).record(), what


def _modules(model: Config, config: Config) -> Any:
    """Return what draws, without its weights."""
    drawn = uses.drawn_as(model, config)
    tokenizer = build.abstract_tokenizer(drawn)
    generator = build.abstract_generator(drawn, tokenizer.spec, 4)
    return functional(tokenizer)[0].graphdef, functional(generator)[0].graphdef


KINDS_OF_MODEL: dict[str, dict[str, Any]] = {
    "masked": {},
    "mar": dict(tokenizer__name="kl_vae", generator__backbone__name="mar", generator__continuous_head="diffusion"),
    "next_scale": dict(tokenizer__name="vqvae", generator__backbone__name="next_scale"),
    "continuous_next_scale": dict(tokenizer__name="lite_vae", generator__backbone__name="continuous_next_scale"),
    "coarse_first": dict(generator__backbone__name="continuous_next_scale", generator__pyramid__first_scale="coarse"),
    "dit": dict(tokenizer__name="kl_vae", generator__backbone__name="dit", generator__diffusion__guided_channels=1),
}


@pytest.mark.parametrize("changes", KINDS_OF_MODEL.values(), ids=KINDS_OF_MODEL)
def test_every_key_given_to_a_finished_model_is_applied_or_refused_with_a_reason(changes: dict[str, Any]) -> None:
    model = tiny_config(**changes)
    values, modules, applied = flatten(model), _modules(model, model), []
    for path, leaf in leaves().items():
        value = _another(dataclasses.replace(leaf, default=values[path]))
        config = unflatten({**values, path: value})
        said = list(uses.refusals("sample", [path], config, model))
        if said:
            assert said[0].startswith(f"config.{path}={value!r}: ") and said[0].endswith("."), said
        else:
            is_seen = _asked(config) != _asked(model) or _modules(model, config) != modules
            assert is_seen, f"{path} is ignored"
            applied.append(path)
    assert {"sample.guidance_scale", "sample.seed", "generator_training.compute_dtype"} <= set(applied)
    own = {"mar": "sample_steps", "dit": "sampler"}.get(model.generator.backbone.name)
    assert own is None or f"generator.diffusion.{own}" in applied


@pytest.mark.parametrize("changes", KINDS_OF_MODEL.values(), ids=KINDS_OF_MODEL)
def test_python_refuses_an_option_where_the_command_line_does(changes: dict[str, Any]) -> None:
    model, seen = tiny_config(**changes), []
    asked = dict(guidance_schedule="constant", temperature=0.5, coarse_temperature=0.5, top_k=3, top_p=0.5)
    asked |= dict(guidance_interval=(0.5, 1.0), density_draws=3, density_keep=0.5)
    for name, value in asked.items():
        path = f"sample.{name}"
        said = list(uses.refusals("sample", [path], unflatten({**flatten(model), path: value}), model))
        seen.append(bool(said))
        for given, unsaid in (({name: value}, None), (dataclasses.asdict(_whole(model, name, value)), Sampling(()))):
            record = unsaid and unsaid.record()
            if not said:
                uses.sampling_asked(model, given, unsaid=record)
                continue
            with pytest.raises(ConfigError) as refused:
                uses.sampling_asked(model, given, unsaid=record)
            assert str(refused.value) == said[0].removeprefix("config.sample.")
    assert True in seen and False in seen
    own = kinds.sampling_of(model).record()
    assert uses.sampling_asked(model, own).record() == own, "what it has already is no question"
    assert uses.sampling_asked(model, dict.fromkeys(own)).record() == own, "nor is what is left out"
    both = dict(guidance_scale=2, guidance_schedule="constant")
    assert uses.sampling_asked(model, both).guidance_schedule == "constant"
    both = dict(guidance_scale=2, guidance_schedule="interval", guidance_interval=[0.5, 1])
    assert uses.sampling_asked(model, both).guidance_interval == (0.5, 1.0)
    if model.generator.backbone.name in ("masked", "continuous_next_scale"):
        both = dict(density_draws=3, density_keep=0.5)
        assert uses.sampling_asked(model, both).density_keep == 0.5
    if model.generator.backbone.name == "next_scale":
        with pytest.raises(
            ConfigError, match=r"steps=5: has no effect on this model: each of its levels takes one pass"
        ):
            uses.sampling_asked(model, {"steps": 5})
    assert uses.sampling_asked(model, {"steps": 1}).steps == (1,) * len(kinds.levels(model))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (dict(density_draws=2), "density_draws=2: of two draws none lies denser"),
        (dict(density_draws=257), "density_draws=257: expected an integer from 1 to 256"),
        (dict(density_draws=4, density_keep=0), "density_keep=0: expected a number above 0"),
        (dict(density_draws=4, density_keep=1.1), "density_keep=1.1: expected a number above 0, up to 1"),
        (dict(density_keep=0.5), "density_keep=0.5: has no effect on this model: density_draws=1 leaves no choice"),
        (dict(guidance_interval=(0.8, 0.2)), "guidance_interval=(0.8, 0.2): expected two numbers from 0 to 1"),
        (dict(guidance_interval=0.5), "guidance_interval=0.5: expected two numbers"),
        (dict(guidance_interval=(0.1, 0.2, 0.3)), "expected two numbers"),
        (dict(guidance_interval=("a", 1)), "expected two numbers"),
        (dict(guidance_interval=(0.4, 0.6)), "no pass lies in it, and none would be guided; the first of 2 is at 0"),
    ],
)
def test_nonsense_of_intervals_and_densities_is_refused(asked: dict[str, Any], why: str) -> None:
    model = tiny_config(**KINDS_OF_MODEL["continuous_next_scale"], generator__pyramid__scales=(2, 4))
    guided = dict(guidance_scale=2, guidance_schedule="interval") if "guidance_interval" in asked else {}
    with pytest.raises(ConfigError) as refused:
        uses.sampling_asked(model, asked | guided)
    assert why in str(refused.value)


def test_an_interval_without_a_pass_is_refused_before_a_run_trains_for_it() -> None:
    own = dict(sample__guidance_scale=2.0, sample__guidance_schedule="interval", sample__guidance_interval=(0.4, 0.4))
    (fault,) = cross_faults(tiny_config(**KINDS_OF_MODEL["continuous_next_scale"], **own))
    assert fault.text.startswith("config.sample.guidance_interval=(0.4, 0.4): no pass lies in it")


def test_what_only_an_energy_head_reads_is_refused_for_others() -> None:
    mar = tiny_config(**KINDS_OF_MODEL["mar"])
    with pytest.raises(ConfigError, match="density_draws=4: has no effect on this model: only an energy head reads it"):
        uses.sampling_asked(mar, dict(density_draws=4))
    energy = tiny_config(**KINDS_OF_MODEL["mar"] | dict(generator__continuous_head="energy"))
    assert uses.sampling_asked(energy, dict(density_draws=4)).density_draws == 4


def _whole(model: Config, name: str, value: Any) -> Sampling:
    return dataclasses.replace(Sampling(kinds.sampling_of(model).steps), **{name: value})


def test_what_one_call_asks_for_is_not_kept() -> None:
    overrides = [("sample.count", "3"), ("data.image_px", "64")]
    config = read.resolve({"sample": {"count": 5}, **STEPS}, overrides, is_once=lambda path: path.startswith("sample."))
    kept = read.to_dict(config)
    assert (config.sample.count, kept["sample"]["count"], kept["data"]["image_px"]) == (3, 5, 64)
