"""A finished run that is trained longer, and a run that starts from another model's weights."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import (
    SMALLEST,
    SMALLEST_ARGUMENTS,
    Programs,
    differing,
    one_device_mesh,
    quick_compilation,
    random_model,
    updates,
)

from ear_jax import build
from ear_jax.config import derive, read
from ear_jax.config.schema import Config, TrainingConfig
from ear_jax.errors import ConfigError, NonFiniteError
from ear_jax.main import main
from ear_jax.nn.functional import Keys, functional, signature
from ear_jax.stages import session, tokenizer
from ear_jax.stages.starting import Start
from ear_jax.tasks import stages
from ear_jax.training import ledger, loop, optim
from ear_jax.training.freezing import part_of
from ear_jax.training.report import readable_count
from ear_jax.training.step import StatePlan

RECIPE = (
    f"--config={tiny.__file__}",
    "--task=tokenizer",
    "--config.tokenizer.name=lite_vae",
    *SMALLEST_ARGUMENTS,
    "--config.tokenizer_training.final_phase_steps=0",
)


@pytest.fixture(autouse=True)
def _one_device(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "make_mesh", one_device_mesh)
    monkeypatch.chdir(repository)


@pytest.fixture
def programs() -> Iterator[None]:
    """Compile a training with a constant schedule once: its program does not know how long the run is."""
    with Programs().shared():
        yield


def train(folder: Path, steps: int, *arguments: str) -> int:
    """Train the tokenizer and leave out what comes after the last update."""
    with mock.patch.object(tokenizer, "with_statistics", side_effect=NonFiniteError("trained")):
        return main([*RECIPE, f"--config.tokenizer_training.steps={steps}", f"--workdir={folder}", *arguments])


def sealed(folder: Path, step: int) -> bytes:
    """Return the digests of every array of a checkpoint."""
    return (folder / "tokenizer" / "checkpoints" / str(step) / "digests" / "metadata").read_bytes()


def test_more_steps_are_bit_for_bit_the_run_that_was_longer_from_the_start(programs, tmp_path, capsys):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert train(once, 9) == 76
    assert train(twice, 6) == 76
    (twice / "tokenizer/complete.json").write_text("{}")  # as if what comes after the last update were there too
    assert train(twice, 6) == 0
    capsys.readouterr()
    assert train(twice, 9, "--config.sample.count=9") == 76
    said = capsys.readouterr().out
    assert "goes on from 6 updates to 9: exactly what the longer run would have been" in said
    assert not (twice / "tokenizer/complete.json").exists(), "the old result is not the result of these settings"
    assert updates(once) == updates(twice) and len(updates(once)) == 9
    assert sealed(once, 9) == sealed(twice, 9)
    assert [row["how"] for row in ledger.read(twice / "ledger.jsonl") if row["event"] == "longer"] == ["exact"]
    assert json.loads((twice / "config.json").read_text())["sample"]["count"] == 4, "of that call alone"

    refused = ["--config.tokenizer_training.schedule=cosine", "--config.tokenizer_training.steps=12"]
    assert main([*RECIPE, *refused, f"--workdir={twice}"]) == 64, "another schedule is another run"
    assert train(twice, 8) == 64
    assert "asks for 8 updates, but this stage was begun for 9" in capsys.readouterr().err


def test_nothing_is_recorded_before_the_data_and_the_models_are_there(tmp_path, capsys):
    for number, wrong in enumerate(
        ("data.source=folder:/no/such/folder", "tokenizer.start_from=/no/such/model", "tokenizer.source=/no/such/model")
    ):
        folder = tmp_path / str(number)
        assert main([*RECIPE, f"--config.{wrong}", f"--workdir={folder}"]) in (64, 65)
        assert "/no/such/" in capsys.readouterr().err
        assert not list(folder.rglob("made_from.json")) and not (folder / "config.json").exists()


def test_a_call_that_only_asks_leaves_the_config_of_the_run_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(read.to_dict(tiny.CONFIG)))
    before, asked = (tmp_path / "config.json").read_bytes(), []
    for name in ("evaluate_images", "make_stats"):
        monkeypatch.setattr(stages, name, lambda opened: asked.append(opened.config))
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["--task=evaluate", "--config.evaluate.images=x", "--config.data.eval_images=9"],
        ["--task=stats", "--config.stats.images=8", "--config.data.image_px=16"],
    ):
        assert main([*arguments, f"--workdir={tmp_path}"]) == 0
    assert (asked[0].evaluate.images, asked[1].stats.images) == ("x", 8)
    assert (tmp_path / "config.json").read_bytes() == before


def photographs(folder: Path) -> Path:
    """Write three classes of noise, in two shades."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog", "fish"):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            picture = random.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(picture).save(folder / name / f"{number}.png")
    return folder


def test_a_model_is_fine_tuned_on_a_folder_of_other_classes_and_resuming_does_not_read_it_again(tmp_path, capsys):
    model = random_model(tmp_path / "model", tiny.tiny_config(**SMALLEST), ("circle", "square", "triangle", "star"))
    run = tmp_path / "run"
    recipe = [
        f"--config={tiny.__file__}",
        *SMALLEST_ARGUMENTS,
        f"--config.data.source=folder:{photographs(tmp_path / 'photographs')}",
        f"--config.tokenizer.source={model}",
        f"--config.generator.start_from={model}",
        "--config.generator.freeze=trunk",
        "--config.generator_training.steps=2",
        "--config.generator_training.learning_rate=1e-6",
        "--config.generator_training.final_phase_steps=0",
        "--config.generator_training.checkpoint_every_steps=1",
        "--config.data.eval_fraction=0.3",
        f"--workdir={run}",
    ]
    with quick_compilation():
        for task in ("tokenizer", "latents"):
            assert main([*recipe, f"--task={task}"]) == 0, capsys.readouterr().err
        for wrong, why in (
            ("embeddings", "does not give: backbone/class_embedding ("),
            ("trunks", "no parameter is named 'trunks'. Known: trunk ("),
        ):
            other = [word.replace("freeze=trunk", f"freeze={wrong}") for word in recipe]
            assert main([*other, "--task=generator"]) == 64
            assert why in capsys.readouterr().err
        assert main([*recipe, "--task=generator"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert (
        f"taken from {model}" in said
        and "4 there (circle, square, triangle, star …) and 3 here (cat, dog, fish" in said
    )
    record = json.loads((run / "generator/start_from.json").read_text())
    assert record["new"] and all("class" in name for name in record["new"]), record["new"]
    assert record["path"] == str(model) and not record["left"]
    before, after = (load_file(path / "generator.safetensors") for path in (model, run / "generator/model"))
    for name in record["taken"]:
        np.testing.assert_allclose(after[name], before[name], atol=1e-4, err_msg=name)
    for name in record["new"]:
        assert after[name].shape != before[name].shape
    frozen = {name for name in after if part_of(name) == "trunk"}
    assert all(np.array_equal(after[name], before[name]) for name in frozen)
    assert not np.array_equal(after["heads/0/logits/bias"], before["heads/0/logits/bias"])
    assert f"frozen      {readable_count(sum(after[name].size for name in frozen))} of " in said
    assert [row["event"] for row in ledger.read(run / "ledger.jsonl")].count("start_from") == 1

    shutil.rmtree(model)  # and a cut in mid-training, after the first update
    (run / "generator/complete.json").unlink()
    shutil.rmtree(run / "generator/checkpoints/2")
    with quick_compilation():
        assert main([*recipe, "--task=generator"]) == 0, capsys.readouterr().err
    said, again = capsys.readouterr().out, load_file(run / "generator/model/generator.safetensors")
    assert "going on from the checkpoint of step 1" in said and "start  " not in said
    assert not differing(again, after)

    assert main([*recipe, "--task=generator", "--config.tokenizer_training.steps=9"]) == 64
    error = capsys.readouterr().err
    assert "was begun with other settings" in error and "config.tokenizer_training.steps: was 6, is 9" in error
    assert f"delete {run / 'generator'} to start this stage again" in error


def generator_start(path: Path, config: Config, names: Sequence[str], tokenizer: Any = None) -> Start:
    """Return what a generator of a configuration, with these classes, starts with from a model."""
    spec = build.abstract_tokenizer(config).spec
    own, more = (signature(build.abstract_generator(config, spec, len(names) + extra)) for extra in (0, 1))
    per_class = [name for name in own if own[name] != more[name]]
    return Start.read("generator", str(path), own, names, tokenizer, per_class, config)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("masked") / "model", tiny.tiny_config(**SMALLEST), NAMES)


@pytest.fixture(scope="module")
def next_scale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("next_scale") / "model", tiny.tiny_config(**VAR), NAMES)


NAMES = ("circle", "square", "triangle", "star")
VAR: dict[str, Any] = dict(tokenizer__name="vqvae", generator__backbone__name="next_scale")


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        (NAMES, (0, 1, 2, 3), ""),
        (NAMES[::-1], (3, 2, 1, 0), "4 of them start as those of the same name there (star, triangle, square, circle)"),
        (
            ("star", "cat", "square"),
            (3, None, 1),
            "2 of them start as those of the same name there (star, square), 1 a",
        ),
        (("star", "cat", "dog", "owl", "cow"), (3, None, None, None, None), "(star), 4 are new"),
        (("star", "cat", "dog", "owl"), (3, None, None, None), "(star), 3 are new"),
        (("owl", "cat", "dog", "cow"), (0, 1, 2, 3), "each class starts as the one of its number there"),
        (("owl", "cat"), (None, None), "classes are new"),
    ],
    ids=["same", "order", "fewer", "more", "as_many", "others", "fewer_others"],
)
@pytest.mark.parametrize("kind", ["masked", "next_scale"])
def test_classes_start_as_those_of_the_same_name(
    kind: str, names: tuple[str, ...], rows: tuple[int | None, ...], said: str, request: pytest.FixtureRequest
) -> None:
    model, table = request.getfixturevalue(kind), "backbone/class_embedding"
    start = generator_start(model, tiny.tiny_config(**(SMALLEST if kind == "masked" else VAR)), names)
    there, new = load_file(model / "generator.safetensors")[table], rows.count(None)
    if kind == "next_scale":
        rows = (*rows, len(NAMES))  # of images without a class
    assert said in " ".join(start.notes) and bool(start.notes) == bool(said)
    assert start.new == (
        {table: f"{new} of {len(rows)} rows, of classes that are not in the other model"} if new else {}
    )
    assert (table in start.taken) == (new < len(rows))
    for number, row in enumerate(rows if table in start.taken else ()):
        is_new = np.ma.getmaskarray(start.taken[table])[number]
        assert is_new.all() if row is None else not is_new.any()
        assert row is None or np.array_equal(np.asarray(start.taken[table])[number], there[row])


def test_a_stage_begins_with_what_is_given_and_masked_entries_as_they_would_alone() -> None:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    parts = ("params", "ema", "rest")
    static = functional(nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=Keys(0))))[0]
    shardings: Any = {part: dict.fromkeys("abc", place) for part in parts}
    fresh: Any = lambda: {part: {name: jnp.full((2, 2), 7.0) for name in "abc"} for part in parts}  # noqa: E731
    plan = StatePlan(static, shardings, shardings, fresh)
    rows = np.ma.masked_array([[1.0, 2.0], [3.0, 4.0]], [[False, False], [True, True]])
    state = loop._started_from(plan, {"a": rows, "b": np.ones((2, 2))})
    for part in (state["params"], state["ema"], state["rest"]):
        a, b, c = (np.asarray(part[name]).tolist() for name in ("a", "b", "c"))
        assert (a, b, c) == ([[1, 2], [7, 7]], [[1, 1], [1, 1]], [[7, 7], [7, 7]])


def test_a_scale_by_scale_trunk_keeps_its_weights_under_a_new_head(next_scale: Path, tmp_path: Path) -> None:
    new_codes = tiny.tiny_config(**VAR, tokenizer__vqvae__codes=16)
    start = generator_start(next_scale, new_codes, NAMES)
    lines, theirs = start.lines(), load_file(next_scale / "generator.safetensors")
    heads = {name for name in start.new if name.startswith("head/")}
    assert heads and f"new: {min(heads)} ({theirs[min(heads)].shape} there, " in "\n".join(lines)
    assert all(name in start.taken for name in theirs if "/transformer/" in name or "/blocks/" in name)
    assert all(np.array_equal(array, theirs[name]) for name, array in start.taken.items())
    assert start.taken.keys() | start.new.keys() >= theirs.keys() and not start.left
    values = sum(array.size for array in start.taken.values())
    assert lines[0] == f"{len(start.taken)} arrays ({values:,} values) taken from {next_scale}"

    other_head = {name.replace("head/", "another/"): array for name, array in theirs.items()}
    save_file({name: np.ascontiguousarray(array) for name, array in other_head.items()}, tmp_path / "x.safetensors")
    start = generator_start(tmp_path / "x.safetensors", tiny.tiny_config(**VAR), NAMES)
    left = [name for name in sorted(other_head) if name.startswith("another/")]
    assert start.left == tuple(left) and {*start.new.values()} == {"not in the other model"}
    assert f"left there: {len(left)} arrays ({', '.join(left)})" in start.lines()
    assert start.notes[0] == "it names no classes: each class starts as the one of its number there"
    assert "it names no sizes: heads and scales are not compared" in start.notes[1] and len(start.notes) == 2


def test_a_tokenizer_starts_from_a_model_and_from_a_file_of_one(masked: Path, tmp_path: Path, capsys) -> None:
    seen: list[Any] = []

    def look(stage: Any) -> None:
        seen.append(stage.initial)
        raise NonFiniteError("looked")

    theirs = load_file(masked / "tokenizer.safetensors")
    for number, path in enumerate((masked, masked / "tokenizer.safetensors")):
        # This one has no coarse part.
        arguments = [*RECIPE, f"--config.tokenizer.start_from={path}", f"--workdir={tmp_path / str(number)}"]
        with mock.patch.object(tokenizer, "train", look):
            assert main(arguments) == 76, capsys.readouterr().err
        assert f"start       {len(seen[-1])} arrays (" in (said := capsys.readouterr().out) and "left there: " in said
        config = read.from_dict(json.loads((tmp_path / str(number) / "config.json").read_text()))
        trained = signature(nnx.eval_shape(lambda c=config: build.build_tokenizer_objective(c, rngs=Keys(0))))
        assert seen[-1] and seen[-1].keys() <= trained.keys()
        for name, array in seen[-1].items():
            assert np.array_equal(array, theirs[name.removeprefix(tokenizer.PREFIX)])
    assert seen[0].keys() == seen[1].keys()


def test_a_model_of_which_nothing_fits_is_refused(masked: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"none of its \d+ arrays fits this generator, by name and shape \(there backb"
    ):
        Start.read("generator", str(masked), {"a": ((2,), np.dtype(np.float32))})
    with pytest.raises(ConfigError, match=r"holds no generator|none of its"):
        Start.read("generator", str(masked / "tokenizer.safetensors"), {"a": ((2,), np.dtype(np.float32))})
    with pytest.raises(ConfigError, match=r"start_from=/no/such: .* does not exist"):
        Start.read("generator", "/no/such", {})


def test_fine_tuning_recipes_are_short_and_can_be_made_longer() -> None:
    for variant in ("lite_hybrid_demo", "lite_hybrid_cifar10", "ear_b", "mar_b", "var_d16", "dit_xl2"):
        config = read.resolve(read.load(f"configs/finetune.py:{variant}")[0])
        training = config.generator_training
        longer = dataclasses.replace(training, steps=3_000)
        assert session.longer_training("generator", training, longer, 1_000)[:2] == (2_000, 3_000)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(), None),
        (dict(warmup_steps=4), None),
        (dict(schedule="cosine"), "schedule=cosine spans the whole run"),
        (dict(schedule="linear"), "schedule=linear spans the whole run"),
        (dict(warmup_steps=20), "the warm-up was 10 updates, and would have been 15"),
        (dict(final_phase_steps=2), "the last phase of 2 updates began at 8"),
        (dict(final_weight_decay=0.1), "final_weight_decay"),
    ],
)
def test_a_longer_run_goes_on_exactly_or_says_why_not(changes: dict[str, Any], why: str | None) -> None:
    old = TrainingConfig(batch_size=4, steps=10, **changes)
    new = dataclasses.replace(old, steps=15)
    recipes = [optim.resolve(training, derive.stage_lengths(training, 40)) for training in (old, new)]

    def rate(recipe: optim.Recipe, step: jax.Array) -> jax.Array:
        return optim.learning_rate(recipe)(step)

    schedules = [
        [
            [float(part(recipe, jnp.asarray(step))) for part in (rate, optim.weight_decay, optim.train_temperature)]
            for step in range(10)
        ]
        for recipe in recipes
    ]
    assert (schedules[0] == schedules[1]) == (why is None)
    if why is None:
        assert "exactly" in session.longer_training("generator", old, new, 40)[2]
    else:
        with pytest.raises(ConfigError, match=why):
            session.longer_training("generator", old, new, 40)
        stretched = dataclasses.replace(new, longer="stretch")
        assert "stretched" in session.longer_training("generator", old, stretched, 40)[2]
    with pytest.raises(ConfigError, match="as many or more"):
        session.longer_training("generator", new, old, 40)


SCALES: dict[str, Any] = dict(tokenizer__name="lite_vae", generator__backbone__name="continuous_next_scale")


def test_a_continuous_pyramid_starts_from_the_trunk_of_discrete_scales(tmp_path: Path) -> None:
    var = tiny.tiny_config(**VAR, tokenizer__vqvae__scales=(1, 2, 3, 4))
    model = random_model(tmp_path / "var", var, NAMES)
    theirs, tokenizer = (load_file(model / f"{part}.safetensors") for part in ("generator", "tokenizer"))
    config = tiny.tiny_config(**SCALES, generator__pyramid__targets="residual")
    tokenizer |= {"latent_mean": np.arange(1, 5, dtype=np.float32), "latent_std": np.arange(2, 6, dtype=np.float32)}
    start = generator_start(model, config, NAMES, tokenizer)

    rows = [0, *range(1, 5), *range(14, 30)]  # of scales 1, 2 and 4; that of side 3 is left out
    assert np.array_equal(start.taken["backbone/position"], theirs["backbone/position"][rows])
    assert np.array_equal(start.taken["backbone/level_embedding"], theirs["backbone/level_embedding"][[0, 1, 3]])
    assert "21 rows of 30, grids 1, 2, 4 of its 1, 2, 3, 4" in start.adapted["backbone/position"]
    tokens = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    seen = np.concatenate([tokens, np.ones((5, 1), np.float32)], 1)  # with how much is left of a noisy scale
    ours, raw = start.taken, tokens * tokenizer["latent_std"] + tokenizer["latent_mean"]
    embedded = raw @ theirs["backbone/embed/kernel"] + theirs["backbone/embed/bias"]
    assert np.allclose(seen @ ours["backbone/embed/kernel"] + ours["backbone/embed/bias"], embedded, atol=1e-4)

    trunk = [name for name in theirs if "/blocks/" in name or "modulation" in name or "class" in name]
    assert all(np.array_equal(start.taken[name], theirs[name]) for name in [*trunk, "backbone/start_position"])
    assert all(name.startswith(("heads/", "scale_")) for name in start.new) and "scale_mean" in start.new
    assert all(name.startswith(("head/", "quantiser/")) for name in start.left) and not start.notes
    assert "adapted: backbone/position (21 rows of 30" in "\n".join(start.lines())

    other = {**tokenizer, **{name: array + 1 for name, array in tokenizer.items() if name.startswith("encoder/")}}
    start = generator_start(model, config, NAMES, other)
    assert start.new["backbone/embed/kernel"] == "its latents are not those of this run's tokenizer"
    absolute = dataclasses.replace(
        config,
        generator=dataclasses.replace(
            config.generator, pyramid=dataclasses.replace(config.generator.pyramid, targets="absolute", scales=(1, 4))
        ),
    )
    assert "unit scale" in generator_start(model, absolute, NAMES, tokenizer).notes[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(generator__backbone__width=32), "width=16, config.generator.backbone width=32. Give --config.generator"),
        (dict(generator__backbone__heads=4), "its trunk has heads=2, config.generator.backbone heads=4"),
        (dict(generator__backbone__depth=3), "--config.generator.backbone.depth=2, or start from a model of this size"),
        (
            dict(generator__backbone__name="masked"),
            "its generator is next_scale; config.generator.backbone.name=masked starts from masked. Use next_scale or "
            "continuous_next_scale, or",
        ),
    ],
)
def test_a_trunk_of_another_size_or_kind_is_refused_with_what_would_fit(
    next_scale: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        generator_start(next_scale, tiny.tiny_config(**{**SCALES, **changes}), NAMES)
    assert f"config.generator.start_from={next_scale}: its " in str(caught.value) and said in str(caught.value)


MAR: dict[str, Any] = dict(tokenizer__name="kl_vae", generator__backbone__name="mar")


def test_mars_trunk_takes_an_energy_head_and_nothing_of_its_diffusion_head(tmp_path: Path) -> None:
    model = random_model(tmp_path / "mar", tiny.tiny_config(**MAR, generator__continuous_head="diffusion"), NAMES)
    theirs = load_file(model / "generator.safetensors")
    config = tiny.tiny_config(**MAR)
    assert config.generator.continuous_head == "energy"
    start = generator_start(model, config, NAMES)
    assert {name for name in theirs if name.startswith("backbone/")} == start.taken.keys()
    assert all(np.array_equal(array, theirs[name]) for name, array in start.taken.items())
    assert start.new.keys() and all(name.startswith("heads/0/") for name in start.new)
    assert start.new["heads/0/output/bias"] == "of the energy head; a diffusion head there"
