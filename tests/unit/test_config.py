"""Configuration: strictness, suggestions, cross-checks, round trips, derived sizes, and every recipe."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from ear_jax.config import derive, kinds, read, suggest
from ear_jax.config.schema import Config, TrainingConfig
from ear_jax.config.values import flatten, leaves
from ear_jax.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
SOUND = {"tokenizer_training": {"steps": 10}, "generator_training": {"steps": 10}}


def faults(overrides: dict[str, str], values: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read.resolve(SOUND if values is None else values, list(overrides.items()))
    return str(caught.value)


def resolved(**overrides: str) -> Config:
    return read.resolve(SOUND, [(path.replace("__", "."), text) for path, text in overrides.items()])


def merged(**groups: dict[str, Any]) -> dict[str, Any]:
    return {**SOUND, **{name: {**SOUND.get(name, {}), **group} for name, group in groups.items()}}


def recipes() -> list[str]:
    found = []
    for file in sorted((REPOSITORY / "configs").glob("[a-z]*.py")):
        variants = re.search(r"VARIANTS = (.*)", file.read_text("utf-8"))
        assert variants, f"{file} lists no variants"
        if file.name in ("convert.py", "finetune.py"):  # the other recipes again, without sizes of their own
            continue
        found += [f"configs/{file.name}:{name}" for name in read._execute(file).VARIANTS]
    return found


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


# Single values


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("seed", "7", 7),
        ("seed", "1_000", 1000),
        ("tokenizer_training.learning_rate", "3e-4", 3e-4),
        ("tokenizer_training.learning_rate", "1", 1.0),
        ("data.use_flip", "False", False),
        ("data.source", "folder:a=b, c", "folder:a=b, c"),
        ("sample.labels", "(1,2)", (1, 2)),
        ("sample.labels", "1, 2", (1, 2)),
        ("sample.labels", "[3,]", (3,)),
        ("sample.labels", "()", ()),
        ("sample.labels", "", ()),
        ("tokenizer.fusion", "attention", "attention"),
    ],
)
def test_override_texts_become_typed_values(path: str, text: str, expected: Any) -> None:
    value = flatten(read.resolve(SOUND, [(path, text)]))[path]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("tokenizer_training.batch_size", "1e9", "write 1000000000"),
        ("tokenizer_training.batch_size", "2.5", "expected an integer"),
        ("tokenizer_training.batch_size", "true", "is not an integer"),
        ("tokenizer_training.batch_size", "1" * 50, "too large"),
        ("tokenizer_training.learning_rate", "inf", "not finite"),
        ("tokenizer_training.learning_rate", "nan", "not finite"),
        ("tokenizer_training.learning_rate", "1e400", "not finite"),
        ("tokenizer_training.learning_rate", "fast", "is not a number"),
        ("tokenizer_training.learning_rate", "0", "expected a number > 0"),
        ("generator.energy.alpha", "2", "expected a number > 0 and < 2"),
        ("data.use_flip", "1", "expected true or false"),
        ("data.image_px", "4", "expected an integer >= 8 and <= 4096"),
        ("tokenizer.coarse.grids", "(1,x)", "list of integers"),
        ("tokenizer.coarse.grids", "(1,2.5)", "list of integers"),
        ("sample.guidance_interval", "(0,x)", "list of numbers"),
        ("tokenizer.name", "lite_hybird", "Did you mean 'lite_hybrid'?"),
    ],
)
def test_bad_texts_are_refused_with_a_hint(path: str, text: str, words: str) -> None:
    message = faults({path: text})
    assert message.startswith(f"config.{path}=")
    assert words in message
    assert "\n" not in message, "one fault must not cause a second complaint"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, "a truth value, expected an integer"),
        (64.0, "write 64"),
        ("64", "write it without quotes"),
        (None, "empty"),
        (10**30, "64 bits"),
        ([64], "type list"),
    ],
)
def test_values_from_files_keep_their_types(value: Any, words: str) -> None:
    message = faults({}, merged(tokenizer_training={"batch_size": value}))
    assert message.startswith("config.tokenizer_training.batch_size=")
    assert words in message


def test_integers_fit_numbers_and_lists_fit_tuples_from_files() -> None:
    values = merged(tokenizer_training={"learning_rate": 1}, tokenizer={"coarse": {"grids": [4]}})
    config = read.resolve(values)
    assert isinstance(config.tokenizer_training.learning_rate, float)
    assert config.tokenizer.coarse.grids == (4,)


def test_numbers_and_arrays_of_numpy_and_jax_are_values() -> None:
    values = merged(
        tokenizer_training={"learning_rate": jnp.asarray(0.5, jnp.bfloat16), "batch_size": np.int32(8)},
        tokenizer={"coarse": {"grids": np.asarray([4])}},
        sample={"count": jnp.int32(3), "temperature": np.float32(0.5), "labels": [jnp.asarray(1), np.str_("star")]},
        data={"use_flip": np.bool_(False), "eval_images": np.asarray(7), "eval_fraction": np.float64(0.25)},
    )
    config = read.resolve(values)
    found = config.tokenizer_training, config.sample, config.data
    assert (found[0].learning_rate, found[0].batch_size, config.tokenizer.coarse.grids) == (0.5, 8, (4,))
    assert (found[1].count, found[1].temperature, found[1].labels) == (3, 0.5, (1, "star"))
    assert (found[2].use_flip, found[2].eval_images, found[2].eval_fraction) == (False, 7, 0.25)
    assert read.from_dict(json.loads(json.dumps(read.to_dict(config)))) == config
    for value, words in ((np.float32(8), "write 8"), (np.bool_(True), "a truth value"), (np.asarray([8]), "type list")):
        assert words in faults({}, merged(tokenizer_training={"batch_size": value}))


# Keys


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("data.imge_px", "config.data.image_px"),
        ("data.image_size", "config.data.image_px"),
        ("sample.cfg", "config.sample.guidance_scale"),
        ("generator.guidance_scale", "config.sample.guidance_scale"),
        ("tokeniser.vae.encoder", "config.tokenizer.vae.encoder"),
        ("generator_training.lr", "config.generator_training.learning_rate"),
        ("vae.latent_chanels", "config.tokenizer.vae.latent_channels"),
        ("gridz", "config.tokenizer.coarse.grids"),
    ],
)
def test_unknown_keys_name_the_nearest(path: str, suggestion: str) -> None:
    message = faults({path: "1"})
    assert f"config.{path}: unknown key" in message
    assert re.search(rf"Did you mean {re.escape(suggestion)}( or|\?)", message), message


def test_a_key_like_no_other_lists_its_group() -> None:
    assert "config.mesh has data, fsdp, tensor" in faults({"mesh.qqqq": "1"})


def test_an_unknown_group_is_one_fault_and_a_group_takes_no_value() -> None:
    message = faults({"data": "shapes"}, {**SOUND, "tokeniser": {"name": "x", "fusion": "y"}, "bench": 3})
    assert "config.tokeniser: unknown key. Did you mean config.tokenizer" in message
    assert "tokeniser.name" not in message
    assert "config.data: is a group of keys" in message
    assert "config.bench=3 is a group of keys" in message


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="given twice, as '1' and '2'"):
        read.resolve(SOUND, [("seed", "1"), ("seed", "2")])


def test_all_faults_are_reported_at_once() -> None:
    message = faults(
        {"data.imge_px": "3", "seed": "-1", "tokenizer.vae.wavelet_levels": "x", "sample.labels": "(-1,)"},
        {"tokenizer_training": {"steps": 5, "epochs": 2.0}, "generator_training": {"steps": 1}},
    )
    assert message.splitlines()[0] == "5 faults:"
    assert len(message.splitlines()) == 6
    for words in ("imge_px", "config.seed", "wavelet_levels", "negative class ids", "both set"):
        assert words in message


def test_overrides_win_and_repair_values_of_the_file() -> None:
    values = merged(data={"image_px": 64, "eval_images": 5})
    config = read.resolve(values, [("data.image_px", "128")])
    assert (config.data.image_px, config.data.eval_images) == (128, 5)


def test_nested_defaults_of_a_group_survive_a_partial_override() -> None:
    config = resolved(generator__coarse__steps="3")
    assert config.generator.coarse.mask_ratio == "cosine", "the default of generator.coarse, not of LevelConfig"


def test_config_dicts_are_accepted() -> None:
    values = ml_collections.ConfigDict({**SOUND, "sample": {"labels": (1, 2)}})
    assert read.resolve(values).sample.labels == (1, 2)


# What keys imply for each other

SCALES = {
    "data.image_px": "64",
    "tokenizer.name": "vqvae",
    "tokenizer.vqvae.scales": "(1,2,4)",
    "generator.patch_size": "1",
    "generator.fine.steps": "1",
}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data.image_px": "36"}, "not a multiple of 8"),
        ({"tokenizer.coarse.grids": "(3,)"}, "does not divide the latent grid of 4"),
        ({"tokenizer.coarse.grids": "(4,2)"}, "must be positive and increase"),
        ({"tokenizer.coarse.grids": "()"}, "is empty"),
        ({"tokenizer.coarse.grids": "(0,)"}, "must be positive"),
        ({"generator.patch_size": "3"}, "does not divide the latent grid of 4"),
        ({"tokenizer_training.accumulation_steps": "3"}, "not a multiple of"),
        ({"tokenizer_training.steps": "0"}, "has no length"),
        ({"generator_training.epochs": "2", "generator_training.steps": "2"}, "both set"),
        ({"generator_training.warmup_epochs": "2", "generator_training.warmup_steps": "2"}, "both set"),
        ({"generator_training.final_phase_epochs": "2", "generator_training.final_phase_steps": "2"}, "both set"),
        ({"generator_training.final_phase_steps": "11"}, "longer than the run"),
        ({"generator_training.warmup_steps": "11"}, "longer than the run"),
        ({"generator.backbone.heads": "7"}, "is not a multiple of"),
        ({"tokenizer.vae.decoder_multipliers": "(1,2)"}, "has 2 entries, expected 4"),
        ({"tokenizer.vae.encoder_multipliers": "()"}, "one or more integers"),
        ({"tokenizer.vae.conv_groups": "3"}, "does not divide every decoder width"),
        ({"tokenizer.fine.multipliers": "(1,1,1,1)"}, "halves the latent grid of 4 3 times"),
        ({"tokenizer.loss.lpips": "1"}, "needs config.tokenizer.loss.vgg_weights"),
        ({"tokenizer.loss.r1": "1"}, "regularises a discriminator that is not"),
        ({"tokenizer.loss.l1": "0"}, "no reconstruction term"),
        ({"tokenizer.hybrid_start_steps": "10"}, "not before the end of the run"),
        (SCALES | {"generator.backbone.name": "next_scale", "tokenizer.name": "hart"}, "vqvae, not hart"),
        ({"sample.labels": "(-1,)"}, "negative class ids"),
        ({"sample.labels": "(6,)"}, "beyond the 6 classes"),
        ({"sample.coarse_steps": "17"}, "more than the level's 16 tokens"),
        ({"generator.fine.steps": "17"}, "more than the level's 16 tokens"),
        ({"generator.fine.mask_ratio_low": "1"}, "leaves nothing to draw from"),
        ({"data.source": "folders:x"}, "Did you mean 'folder'?"),
        ({"data.source": "folder:"}, "lacks its PATH"),
        ({"data.source": "tfds"}, "lacks its NAME"),
        ({"data.shapes.size_low": "0.4"}, "is above config.data.shapes.size_high"),
        ({"latents.source": "cache"}, "write 'latents:PATH'"),
        ({"mesh.data": "-1", "mesh.fsdp": "-1"}, "only one of"),
        ({"mesh.tensor": "0"}, "leaves no device"),
        ({"name": "../up"}, "names folders"),
        ({"seed": str(2**32)}, "config.seed=4294967296: expected an integer from 0 to 4294967295"),
    ],
)
def test_contradictions_are_found(overrides: dict[str, str], words: str) -> None:
    message = faults(overrides)
    assert words in message
    assert "\n" not in message, message


def test_one_key_shortens_a_run_and_what_follows_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    values = merged(
        tokenizer={"hybrid_start_steps": 400},
        tokenizer_training={"steps": 1000, "warmup_steps": 100},
        generator_training={"steps": 0, "epochs": 800.0, "warmup_epochs": 80.0, "final_phase_epochs": 40.0},
    )
    overrides = [("tokenizer_training.steps", "50"), ("generator_training.steps", "20")]
    config = read.resolve(values, overrides)
    tokenizer, generator = config.tokenizer_training, config.generator_training
    assert (tokenizer.warmup_steps, config.tokenizer.hybrid_start_steps) == (5, 20)
    assert (generator.epochs, generator.warmup_epochs, generator.warmup_steps) == (0.0, 0.0, 2)
    assert (generator.final_phase_epochs, generator.final_phase_steps) == (0.0, 1)
    said = capsys.readouterr().out
    assert "notice      config.tokenizer_training.warmup_steps: 100 becomes 5, 10% of the run" in said
    assert "since config.generator_training.steps=20" in said
    assert read.resolve(values) and not capsys.readouterr().out, "nothing follows where nothing was given"
    assert read.resolve(values, [("tokenizer_training.steps", "900")]).tokenizer.hybrid_start_steps == 400
    with pytest.raises(ConfigError, match="longer than the run"):
        read.resolve(values, [*overrides, ("tokenizer_training.warmup_steps", "60")])


def test_classes_are_asked_for_by_id_or_name() -> None:
    labels = lambda text: resolved(data__source="folder:x", sample__labels=text).sample.labels  # noqa: E731
    assert labels("star,ring") == ("star", "ring") and labels("(1,star)") == (1, "star")
    assert labels("'7',7") == ("7", 7) and labels("()") == ()
    names = ("star", "ring", "7")
    assert suggest.class_label_faults(("star", 2), names) == "" == suggest.doubtful_ids(("star", 1), names)
    assert "Did you mean 'star'?" in suggest.class_label_faults(("stra",), names)
    assert "labels 3, 1.5 are not classes" in suggest.class_label_faults((3, 1.5), names)
    assert "7 is the id of class 'none' and the name of class 2" not in suggest.doubtful_ids(("7",), names)
    assert "1 is the id of class '1' and the name" not in suggest.doubtful_ids((1,), ("0", "1", "2"))
    assert "2 is the id of class '10' and the name of class 3" in suggest.doubtful_ids((2,), ("0", "1", "10", "2"))


def test_a_tokenizer_without_coarse_levels_is_not_held_to_them() -> None:
    config = resolved(tokenizer__name="lite_vae", tokenizer__coarse__grids="(3,)")
    assert derive.coarse_grids(config) == ()


# Derived sizes


def tokens_per_level(config: Config) -> dict[str, int]:
    """Return the number of tokens of each level of the generator by its name."""
    return {level.name: level.tokens for level in kinds.levels(config)}


def test_a_scale_takes_no_more_passes_than_it_has_tokens() -> None:
    config = read.resolve(SOUND, list((SCALES | {"generator.coarse.steps": "8"}).items()))
    assert kinds.level_steps(config) == (1, 4, 8)
    assert kinds.level_steps(config, coarse_steps=3) == (1, 3, 3)


def test_levels_follow_from_the_config() -> None:
    config = read.resolve(
        merged(
            data={"image_px": 512},
            tokenizer={
                "vae": {"wavelet_levels": 4, "latent_channels": 32, "decoder_multipliers": (1, 1, 1, 1, 1)},
                "coarse": {"grids": (4, 8)},
            },
            generator={"patch_size": 2},
        )
    )
    assert derive.latent_grid(config) == 32
    assert tokens_per_level(config) == {"coarse_4": 16, "coarse_8": 64, "fine": 256}
    assert [level.size for level in kinds.levels(config)] == [1024, 1024, 128]


def test_stage_lengths_of_the_published_recipe() -> None:
    training = TrainingConfig(epochs=800.0, warmup_epochs=100.0, final_phase_epochs=50.0, reference_batch_size=256)
    lengths = derive.stage_lengths(training, 1_281_167)
    assert (lengths.total_steps, lengths.warmup_steps, lengths.final_phase_steps) == (500_456, 62_557, 31_279)
    assert derive.peak_learning_rate(training) == pytest.approx(8e-4)
    assert derive.peak_learning_rate(dataclasses.replace(training, reference_batch_size=0)) == 1e-4


def test_a_last_phase_longer_than_the_run_is_refused_once_the_data_is_known() -> None:
    with pytest.raises(ConfigError, match="The last phase has 50 updates"):
        derive.stage_lengths(TrainingConfig(batch_size=10, epochs=1.0, final_phase_steps=50), 100)


# Stored configs


def test_every_key_survives_json() -> None:
    config = resolved(sample__labels="(1,2)", tokenizer__fusion="attention", tokenizer_training__learning_rate="1e-7")
    stored = json.dumps(read.to_dict(config))
    assert read.from_dict(json.loads(stored)) == config
    assert json.loads(stored) == read.to_dict(config)


def test_stored_configs_are_checked_like_others() -> None:
    stored = read.to_dict(resolved())
    stored["data"]["colour"] = 1
    with pytest.raises(ConfigError, match="unknown key"):
        read.from_dict(stored)


def test_every_key_has_a_meaning() -> None:
    assert len(leaves()) > 100
    assert not [path for path, leaf in leaves().items() if not leaf.metadata.get("help")]


# Recipes


@pytest.mark.parametrize("modifier", ["", ",tiny"])
@pytest.mark.parametrize("reference", recipes())
def test_every_recipe_resolves(reference: str, modifier: str) -> None:
    values, _ = read.load(reference + modifier)
    config = read.resolve(values)
    full = read.resolve(read.load(reference)[0])
    if modifier:
        assert config.tokenizer_training.steps <= 4 and config.generator.backbone.width <= 64
        assert kinds.levels(config) == kinds.levels(full), "tiny must not change what is modelled"
        assert config.tokenizer.loss.l1 == full.tokenizer.loss.l1
    assert read.from_dict(read.to_dict(config)) == config


def test_the_published_recipe_is_complete() -> None:
    config = read.resolve(read.load("configs/lite_hybrid.py:imagenet256")[0])
    training = config.generator_training
    assert tokens_per_level(config) == {"coarse": 16, "fine": 256}
    assert config.tokenizer.coarse.codes == 1024
    assert config.tokenizer.vae.latent_channels == 32
    assert (training.epochs, training.final_phase_epochs, training.warmup_epochs) == (800, 50, 100)
    assert derive.peak_learning_rate(training) == pytest.approx(8e-4)
    final = derive.peak_learning_rate(training) * training.final_phase_learning_rate_multiplier
    assert final == pytest.approx(5.6e-4)
    assert (training.train_temperature, training.final_phase_train_temperature) == (1.0, 0.99)
    assert (training.clip_norm, training.weight_decay, training.ema_decay) == (3.0, 0.02, 0.9999)
    assert training.head_learning_rate_multiplier == 0.25
    assert config.generator.label_drop == 0.1


def test_sequences_stay_short_at_any_resolution() -> None:
    for pixels in (256, 512, 1024):
        config = read.resolve(read.load(f"configs/lite_hybrid.py:imagenet{pixels}")[0])
        assert config.data.image_px == pixels
        assert sum(tokens_per_level(config).values()) <= 16 + 64 + 256


def test_wrong_references_list_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"no recipe configs/lite_hybrd.py. Did you mean 'lite_hybrid'(?s:.)*cifar10",
    ):
        read.load("configs/lite_hybrd.py")
    with pytest.raises(ConfigError, match="Did you mean 'imagenet256'"):
        read.load("configs/lite_hybrid.py:imagnet256")
    with pytest.raises(ConfigError, match="no variant 'cifar10,demo'"):
        read.load("configs/lite_hybrid.py:cifar10,demo")
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\nraise KeyError('k')\n")
    with pytest.raises(ConfigError, match=r"broken.py:2 fails with KeyError"):
        read.load(str(broken))
    broken.write_text("def get_config(variant):\n    return 3\n")
    with pytest.raises(ConfigError, match="returned int"):
        read.load(str(broken))


def test_run_folders_are_named_after_file_and_variant() -> None:
    assert read.load("configs/lite_hybrid.py")[1] == "lite_hybrid"
    assert read.load("configs/lite_hybrid.py:imagenet256,tiny")[1] == "lite_hybrid_imagenet256_tiny"


def test_a_recipe_is_found_by_file_and_by_name_from_any_folder(tmp_path, monkeypatch):
    expected = read.load(str(REPOSITORY / "configs" / "lite_hybrid.py") + ":imagenet256")
    monkeypatch.chdir(tmp_path)
    for name in ("lite_hybrid", "lite_hybrid.py", "configs/lite_hybrid.py", "configs/lite_hybrid"):
        assert read.load(f"{name}:imagenet256") == expected
    assert read.load("studies/fidelity")[1] == "fidelity"
    for name in ("../lite_hybrid", "lite_hybrd", "configs", "_recipes/x"):
        with pytest.raises(ConfigError, match="there is no file and no recipe"):
            read.load(name)
    # Files of a package are no neighbours of its recipes: ear_jax/types.py would hide a library's own.
    package = tmp_path / "package"
    (package / "recipes").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "hidden.py").touch()
    (package / "recipes" / "mine.py").write_text("import hidden")
    with pytest.raises(ConfigError, match="No module named 'hidden'"):
        read.load(str(package / "recipes" / "mine.py"))


def test_seeds_of_a_study_are_in_range():
    for seeds in ("(0,-1)", "(0,4294967296)"):
        with pytest.raises(ConfigError, match=r"config.study.seeds\[1\]=.*expected an integer from 0 to 4294967295"):
            read.resolve({}, [("study.seeds", seeds)])
