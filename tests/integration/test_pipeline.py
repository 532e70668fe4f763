"""A model folder in use: from Python by `ear_jax.load`, and from the command line by sample, bench and show."""

import dataclasses
import json
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integration.tiny import SMALLEST, random_model, tiny_config
from PIL import Image

import ear_jax
from ear_jax import main
from ear_jax.config import kinds, read
from ear_jax.errors import ConfigError
from ear_jax.folders import model_folder
from ear_jax.inference import pipeline
from ear_jax.inference.pipeline import Pipeline
from ear_jax.sampling import Sampling
from ear_jax.stages.sample import sample
from ear_jax.types import Tokens

NAMES = ("circle", "square", "triangle", "star")
REPOSITORY = Path(__file__).resolve().parents[2]
PX = SMALLEST["data__image_px"]
CONFIG = tiny_config(
    **SMALLEST,
    sample__batch_size=16,
    bench__repeats=3,
    bench__warmup_repeats=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    return random_model(tmp_path_factory.mktemp("models") / "tiny", CONFIG, NAMES)


@pytest.fixture(scope="module")
def model(folder: Path) -> Pipeline:
    return ear_jax.load(folder)


def programs_compiled(model: Pipeline) -> int:
    sample: Any = model.programs.sample
    return sample._cache_size()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the rounding of another batch shape."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b).max()) <= 1


def test_sampling_by_id_and_by_name_is_the_same(model):
    by_id = model.sample([2, 0])
    assert (by_id.shape, by_id.dtype) == ((2, PX, PX, 3), np.uint8)
    assert by_id.std() > 1
    np.testing.assert_array_equal(model.sample(["triangle", "circle"]), by_id)
    np.testing.assert_array_equal(model.sample(np.asarray([2, 0], np.int64)), by_id)
    np.testing.assert_array_equal(model.sample(2), by_id[:1])
    np.testing.assert_array_equal(model.sample("triangle"), by_id[:1])
    for labels in (jnp.asarray([2, 0]), jnp.asarray([2.0, 0.0], jnp.bfloat16), [jnp.int32(2), np.array(0)], (2.0, 0)):
        np.testing.assert_array_equal(model.label_ids(labels), [2, 0])
    for label in (jnp.asarray(2), np.array(2), np.array("triangle"), Fraction(2), np.uint8(2)):
        np.testing.assert_array_equal(model.label_ids(label), [2])


def test_numbers_of_any_library_are_options(model):
    plain = model.sample([2], seed=3, guidance_scale=2.0, temperature=0.5, steps=(2, 1), start_index=4)
    for number in (jnp.asarray, np.array, Fraction):
        options = {"guidance_scale": number(2), "temperature": number(1) / 2, "steps": [number(2), number(1)]}
        drawn = model.sample([number(2)], seed=number(3), start_index=number(4), batch_size=number(16), **options)
        np.testing.assert_array_equal(drawn, plain)


def test_empty_batches_give_empty_results_without_compiling(folder):
    model = ear_jax.load(folder)
    for labels in ([], np.zeros(0), jnp.zeros(0, jnp.int32), ()):
        assert model.sample(labels).shape == (0, PX, PX, 3)
    assert model.sample([0], images_per_class=0).shape == (0, PX, PX, 3) and model.sample([], output="pil") == []
    for images in (np.zeros((0, PX, PX, 3), np.uint8), np.zeros((0, PX, PX, 3), np.float32), []):
        tokens = model.encode(images)
        assert [(level.shape, level.dtype) for level in tokens.levels] == [((0, 4), "int32"), ((0, 16, 4), "float32")]
    assert model.decode(tokens).shape == (0, PX, PX, 3) and model.decode(tokens.coarse).shape == (0, PX, PX, 3)
    programs: tuple[Any, ...] = (model.programs.sample, model.programs.encode, model.programs.decode)
    assert [program._cache_size() for program in programs] == [0, 0, 0]


def test_pictures_in_and_out(model):
    images = model.sample([1, 1, 3, 3], seed=2)
    pictures = model.sample([1, 3], images_per_class=2, seed=2, output="pil", progress=True)
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in pictures]), images)
    single = model.sample("square", seed=2, output="pil")
    assert isinstance(single, Image.Image) and single.size == (PX, PX)
    assert len(model.sample(seed=2)) == 4, "every class"
    tokens = model.encode(images)
    for given in (pictures, list(images)):
        np.testing.assert_array_equal(model.encode(given).coarse, tokens.coarse)
    assert model.encode(single).coarse.shape == (1, 4)
    again = model.decode(tokens, output="pil")
    np.testing.assert_array_equal(np.asarray(again[1]), model.decode(tokens)[1])
    for odd, fault in (
        (single.convert("RGBA"), "mode RGBA; expected RGB or L"),
        (single.resize((4, 4)), r"shape \(1, 4, 4, 3\)"),
        ([images[0], images[0, :4]], "several shapes"),
    ):
        with pytest.raises(ConfigError, match=fault):
            model.encode(odd)
    with pytest.raises(ConfigError, match="output='png'"):
        model.sample([0], output="png")


def test_coarse_tokens_alone_decode(model):
    tokens = model.encode(np.zeros((2, PX, PX, 3), np.uint8))
    expected = model.decode(Tokens(tokens.levels[:1]))
    for given in (tokens.coarse, np.asarray(tokens.coarse), tokens.levels[:1]):
        np.testing.assert_array_equal(model.decode(given), expected)
    for given, fault in ((tokens.fine, "tokens.fine alone is no image"), (None, "not NoneType"), ([1, 2], "not list")):
        with pytest.raises(ConfigError, match=fault):
            model.decode(given)


def test_a_model_says_what_it_is_and_is_saved_and_loaded_again(model, folder, tmp_path):
    info = model.info()
    assert json.loads(json.dumps(info)) == info
    assert info["classes"] == 4 and info["parameters"] == model.parameters and info["path"] == str(folder)
    assert repr(model).startswith("Pipeline(name=") and f"image_px={PX}" in repr(model)
    saved = ear_jax.load(model.save(tmp_path / "copy"), devices=jax.devices()[:1])
    assert saved.devices == (saved.device,) == (jax.devices()[0],) and len(model.devices) == 8
    for part in ("tokenizer_arrays", "generator_arrays"):
        own, again = getattr(model, part), getattr(saved, part)
        assert own.keys() == again.keys() and all(np.array_equal(own[name], again[name]) for name in own)
    assert (saved.config, saved.class_names) == (model.config, model.class_names)
    assert ear_jax.load(folder, devices=jax.devices()[0]).devices == (jax.devices()[0],)
    for wrong in ([], "cpu", 1):
        with pytest.raises(ConfigError, match=r"devices=.*expected jax devices"):
            ear_jax.load(folder, devices=wrong)


def test_an_image_depends_on_seed_index_and_label_alone(model):
    labels = [0, 1, 2, 3, 0, 1, 2, 3, 3, 2]
    images = model.sample(labels, seed=5)
    np.testing.assert_array_equal(model.sample(labels, seed=5), images)
    assert not close(model.sample(labels, seed=6), images)
    assert not close(images[:1], images[4:5]), "the same label at another index is another image"
    others = [3, 3, 3, 3, 3, 3, 3, 3, 3, 2]
    assert close(model.sample(others, seed=5)[9:], images[9:]), "neighbours do not matter"
    assert not close(model.sample(others, seed=5)[:1], images[:1]), "labels do"


def test_batch_size_and_padding_do_not_change_images(model):
    labels = [0, 1, 2, 3, 0, 1, 2, 3, 3, 2]
    images = model.sample(labels, seed=5)
    assert close(model.sample(labels, seed=5, batch_size=3), images)
    assert close(model.sample(labels[7:], seed=5, start_index=7), images[7:])
    done = []
    parts = list(model.sample_batches(labels, seed=5, batch_size=4, on_batch=done.append))
    assert [len(part) for _, part in parts] == [4, 4, 2] and done == [4, 8, 10]
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in parts]), labels)
    assert close(np.concatenate([part for _, part in parts]), images)


def test_scales_temperatures_and_seeds_compile_nothing(model):
    plain = model.sample([0, 1], guidance_scale=2.0)
    before = programs_compiled(model)
    changed = [
        model.sample([0, 1], guidance_scale=3.5),
        model.sample([0, 1], guidance_scale=2.0, temperature=0.3),
        model.sample([0, 1], guidance_scale=2.0, seed=9),
        model.sample([0, 1], guidance_scale=2.0, coarse_temperature=9.0, seed=4),
    ]
    assert programs_compiled(model) == before
    assert all((image != plain).any() for image in changed)
    model.sample([0, 1, 2], guidance_scale=2.0)
    assert programs_compiled(model) == before, "one program for a whole range of counts"


def test_unguided_sampling_equals_guidance_scale_one(model):
    """Scale 1 runs no unconditional branch; the limit from above is the same image."""
    assert close(model.sample([0, 1], guidance_scale=1.0), model.sample([0, 1], guidance_scale=1.0 + 1e-6))


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (-1, ["-1"]),
        (1000, ["1000"]),
        ("cat", ["'cat'"]),
        (np.asarray([0.0, np.nan]), ["nan"]),
        (np.asarray([1.5]), ["1.5"]),
        (True, ["True"]),
        ([0, "cat", 4, "star", -7], ["'cat'", "4", "-7"]),
    ],
)
def test_labels_that_are_no_class_are_all_named(model, labels, named):
    with pytest.raises(ConfigError, match="are not classes of this model or data") as fault:
        model.sample(labels)
    start = str(fault.value).split(" are not classes")[0]
    assert all(name in start for name in named) and start.count(",") == len(named) - 1
    assert "Expected ids 0 to 3 or names: 0 circle, 1 square" in str(fault.value)


def test_steps_are_checked_against_the_levels(model):
    assert model.sampling().steps == (2, 1)
    assert model.sampling(steps=3).steps == (3, 3)
    assert model.sampling(steps=12).steps == (4, 12), "no level has more passes than tokens"
    assert model.sampling(steps=[4, 16]).steps == (4, 16)
    for steps in (0, -1, [1], [1, 2, 3], [0, 1], [5, 1], [1, 17], [True, 1]):
        with pytest.raises(ConfigError, match="steps="):
            model.sample([0], steps=steps)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": -1.0},
        {"guidance_scale": float("nan")},
        {"temperature": float("inf")},
        {"coarse_temperature": -0.1},
        {"guidance_schedule": "quadratic"},
        {"batch_size": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"start_index": -1},
        {"start_index": 2**31},
    ],
)
def test_options_out_of_range_are_refused_by_name(model, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        model.sample([0], **options)


def test_images_go_to_tokens_and_back(model):
    images = np.random.default_rng(0).integers(0, 256, (2, PX, PX, 3), np.uint8)
    tokens = model.encode(images)
    assert [level.shape for level in tokens.levels] == [(2, 4), (2, 16, 4)]
    decoded = model.decode(tokens)
    assert (decoded.shape, decoded.dtype) == (images.shape, np.uint8)
    floats = model.encode(images.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(floats.fine, tokens.fine, atol=1e-4)
    ringing = images / 255 * 1.03 - 0.03, np.array([-1, 1])
    for bright, value_range in (
        (images.astype(np.float32) / 255, [0, 1]),
        (np.abs(images / 127.5 - 1), (-1, 1)),
        ringing,
        (images / 255 - 0.5, (-1, 1)),
    ):
        with pytest.raises(ConfigError, match=r"may be meant in \[0, 1\] or in \[-1, 1\]. Say which with value_range="):
            model.encode(bright)
        model.encode(bright, value_range=value_range)
    np.testing.assert_allclose(model.encode(jnp.asarray(images) / 255, value_range=(0, 1)).fine, tokens.fine, atol=1e-4)
    for pixels, value_range, reason in (
        (images, (0, 1), "is for floats; these images are uint8"),
        (images / 127.5 - 1, (0, 255), "expected (-1, 1) or (0, 1)"),
        (images / 127.5 - 1, (0, 1), "outside [0, 1]"),
    ):
        with pytest.raises(ConfigError, match=re.escape(reason)):
            model.encode(pixels, value_range=value_range)
    assert list(map(len, model.encode(np.full((2, PX, PX, 3), -0.5), value_range=np.array([-1.0, 1.0])).levels)) == [
        2,
        2,
    ]
    assert (model.decode(Tokens(tokens.levels[:1])) != decoded).any()
    drawn = [np.asarray(model.encode(images, seed=seed).fine) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3 and np.abs(drawn[0] - tokens.fine).max() > 1e-3


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        (np.zeros((2, 4, 4, 3), np.uint8), r"shape \(2, 4, 4, 3\); this model encodes \[n, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"shape \(8, 8, 3\)"),
        (np.zeros((1, PX, PX, 4), np.uint8), r"shape \(1, 8, 8, 4\)"),
        (np.zeros((1, PX, PX, 3), np.int32), "dtype int32"),
        (np.full((1, PX, PX, 3), 255.0, np.float32), r"values 255 to 255, outside \[-1, 1\]; expected uint8"),
        (np.full((1, PX, PX, 3), np.nan, np.float32), "values nan"),
    ],
)
def test_images_that_cannot_be_encoded_are_refused(model, images, fault):
    with pytest.raises(ConfigError, match=fault):
        model.encode(images)


def test_seeds_have_one_range_everywhere(model):
    for seed in (-1, 2**32, 1.5, True, jnp.asarray(-1)):
        with pytest.raises(ConfigError, match=r"seed=.*expected an integer from 0 to 4294967295"):
            model.encode(np.zeros((1, PX, PX, 3), np.uint8), seed=seed)
        with pytest.raises(ConfigError, match=r"seed=.*expected an integer from 0 to 4294967295"):
            model.sample([0], seed=seed)


def test_a_seed_where_nothing_is_drawn_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "spec", dataclasses.replace(model.spec, levels=model.spec.levels[:1]))
    with pytest.raises(ConfigError, match=r"seed=3: has no effect, this tokenizer has discrete tokens alone"):
        model.encode(np.zeros((1, PX, PX, 3), np.uint8), seed=3)


def test_tokens_that_cannot_be_decoded_are_refused(model):
    ids, fine = np.zeros((2, 4), np.int32), np.zeros((2, 16, 4), np.float32)
    for levels, fault in (
        ((), "0 levels"),
        ((ids, fine, fine), "3 levels"),
        ((ids[:, :3], fine), r"coarse has shape \(2, 3\), expected \('n', 4\)"),
        ((ids, fine[:, :, :3]), "fine has shape"),
        ((ids, fine[:1]), "fine has shape"),
        ((fine,), "coarse has shape"),
        ((ids + 8, fine), "coarse has ids 8 to 8, expected 0 to 7"),
        ((ids - 1, fine), "ids -1 to -1"),
        ((ids.astype(np.float32), fine), "dtype float32"),
    ):
        with pytest.raises(ConfigError, match=fault):
            model.decode(Tokens(tuple(map(jax.numpy.asarray, levels))))


def test_a_tokenizer_alone_reconstructs_but_does_not_sample(folder):
    stored = model_folder.read(folder)
    alone = Pipeline(read.from_dict(stored.config_dict), stored.class_names, {"tokenizer": stored.tensors["tokenizer"]})
    with pytest.raises(ConfigError, match="holds a tokenizer only"):
        alone.sample([0])
    assert not alone.has_generator and alone.parameters == sum(a.size for a in stored.tensors["tokenizer"].values())
    images = np.random.default_rng(0).integers(0, 256, (2, PX, PX, 3), np.uint8)
    assert alone.decode(alone.encode(images)).shape == images.shape


def test_weights_of_another_model_are_named(folder):
    stored = model_folder.read(folder)
    wider = read.from_dict(stored.config_dict | {"generator": stored.config_dict["generator"] | {"patch_size": 2}})
    with pytest.raises(ConfigError, match="do not fit the model its config describes"):
        Pipeline(wider, stored.class_names, stored.tensors)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_sample_task_takes_the_config_of_the_model(model, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default workdir is below the current folder
    labels = "--config.sample.labels=(1,3)"
    assert main.main(["--task=sample", f"--model={folder}", labels, "--config.sample.count=5"]) == 0, (
        capsys.readouterr()
    )
    made = tmp_path / "runs" / "model_tiny" / "samples"
    assert "5 images in" in capsys.readouterr().out
    singles = sorted(path.relative_to(made) for path in made.rglob("*.png") if path.name != "grid.png")
    assert len(singles) == 5 and (made / "grid.png").is_file()
    expected = model.sample([1, 3, 1, 3, 1], seed=CONFIG.sample.seed)
    assert close(np.asarray(Image.open(made / singles[0])), expected[0])


def test_the_sample_task_writes_one_file_for_evaluators(folder, tmp_path, capsys):
    arguments = ["--config.sample.format=npz", "--config.sample.count=6", f"--workdir={tmp_path}"]
    assert main.main(["--task=sample", f"--model={folder}", *arguments]) == 0, capsys.readouterr()
    (path,) = (tmp_path / "samples").glob("*.npz")
    stored = np.load(path)
    images = next(value for value in stored.values() if value.ndim == 4)
    assert (images.shape, images.dtype) == ((6, PX, PX, 3), np.uint8)
    assert any(value.tolist() == [0, 1, 2, 3, 0, 1] for value in stored.values() if value.ndim == 1)


@pytest.mark.parametrize("format", ["png", "npz"])
def test_an_interrupted_set_goes_on_where_it_was_and_other_requests_go_elsewhere(
    format, model, tmp_path, capsys, monkeypatch
):
    config = dataclasses.replace(
        CONFIG, sample=dataclasses.replace(CONFIG.sample, count=19, batch_size=4, format=format)
    )
    monkeypatch.setattr(pipeline, "load", lambda path, **_: model)
    draw, drawn, limit = model.sample_batches, [], 9

    def interrupted(labels: np.ndarray, **options: Any) -> Any:
        for ids, images in draw(labels, **options):
            if len(drawn) == limit:
                raise KeyboardInterrupt
            drawn.append(len(ids))
            yield ids, images

    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    monkeypatch.setattr(model, "sample_batches", interrupted)
    whole = sample(config, str(model.path), tmp_path / "whole")
    assert drawn == [4, 4, 4, 4, 3]
    limit = 7
    with pytest.raises(KeyboardInterrupt):
        sample(config, str(model.path), tmp_path / "parts")
    half = tmp_path / "parts"
    if format == "png":
        (half / "000007_star.png").unlink()  # a killed process leaves part of a batch
    else:
        os.truncate(half / "samples_19.partial", 7 * PX * PX * 3 + 5)
    (half / ".samples_19.npz.1.writing").write_bytes(b"cut")
    limit = 99
    assert sample(config, str(model.path), half) == half
    assert drawn[5:] == [4, 4, 4, 4, 4, 3], "the batch that was cut is drawn again"
    assert "goes on: 4 of 19 images are there" in capsys.readouterr().out
    assert content(half) == content(whole), "the same bytes as without an interruption"
    assert sample(config, str(model.path), half) == half and len(drawn) == 11
    assert "complete: 19 images" in capsys.readouterr().out
    other = dataclasses.replace(config, sample=dataclasses.replace(config.sample, seed=5, count=2))
    before = content(half)
    beside = sample(other, str(model.path), half)
    assert beside.parent == half.parent and beside.name.startswith("parts-") and content(half) == before
    assert "of another request (count 19 → 2; seed 0 → 5); they are kept" in capsys.readouterr().out
    assert sample(other, str(model.path), half) == beside and len(drawn) == 12, "found again"
    once = read.resolve(
        read.to_dict(config), [("generator_training.compute_dtype", "bfloat16")], is_once=lambda path: True
    )
    assert sample(once, str(model.path), half) not in (half, beside), "what draws is part of a request, once or not"
    assert 'generator_training.compute_dtype "float32" → "bfloat16"' in capsys.readouterr().out
    (half / "made_from.json").unlink()
    assert sample(config, str(model.path), half) not in (half, beside), "images of an earlier version are kept too"


def test_every_option_of_sampling_reaches_the_generator_from_the_command_line_and_from_python(
    model, tmp_path, monkeypatch
):
    """An option that is accepted has its effect: one was dropped on the way once."""
    options: dict[str, Any] = dict(
        steps=(3, 2),
        guidance_scale=2.5,
        guidance_schedule="interval",
        guidance_interval=(0.25, 1.0),
        temperature=0.5,
        coarse_temperature=0.25,
        top_k=3,
        top_p=0.75,
        density_draws=4,
        density_keep=0.5,
        aggregate=0,  # of a model with copies: unit/test_aggregate.py
    )
    for asked in ({"top_k": 3}, {"sampling": Sampling((2, 1), top_k=3)}):
        with pytest.raises(
            ConfigError,
            match=r"top_k=3: has no effect on this model: only next_scale or ",
        ):
            model.sample([0], **asked)
    own = kinds.KINDS["masked"]
    reads_all = dataclasses.replace(own, options=(*own.options, "sample.top_k", "sample.top_p"))
    monkeypatch.setitem(kinds.KINDS, "masked", reads_all)  # the only kind that reads them needs another model
    wanted = Sampling(**options)
    assert model.sampling(**options) == wanted and set(options) == {
        field.name for field in dataclasses.fields(Sampling)
    }
    seen: list[Sampling] = []

    def sample_batches(self: Pipeline, labels: np.ndarray, *, sampling: Sampling, **_: Any) -> Any:
        seen.append(sampling)
        yield labels, np.zeros((len(labels), PX, PX, 3), np.uint8)

    monkeypatch.setattr(Pipeline, "sample_batches", sample_batches)
    steps = ["--config.sample.coarse_steps=3", "--config.sample.fine_steps=2"]
    rest = [f"--config.sample.{name}={value}" for name, value in options.items() if name != "steps"]
    assert main.main(["--task=sample", f"--model={model.path}", f"--workdir={tmp_path}", *steps, *rest]) == 0
    assert seen == [wanted]


def test_keys_of_the_weights_are_refused_and_those_of_drawing_change_the_model_that_draws(
    folder, tmp_path, capsys, monkeypatch
):
    own = f"--model={folder}"
    for key, why in (
        ("generator.backbone.width=32", "belongs to the weights, which were made with 16"),
        ("generator_training.log_every_steps=1", "says how training runs, and --task=sample trains nothing"),
        ("evaluate.samples=9", "--task=sample does not read it, --task=evaluate does"),
        (
            "sample.top_k=3",
            "has no effect on this model: only next_scale or continuous_next_scale",
        ),
        ("run.wandb_project=mine", "--task=sample does not read it, --task=evaluate does"),
        ("generator.fine.steps=2 sample.fine_steps=1", "no effect beside config.sample.fine_steps=1. Drop one"),
    ):
        assert main.main(["--task=sample", own, *(f"--config.{one}" for one in key.split())]) == 64
        assert f"{why}" in capsys.readouterr().err
    recipe = f"--config={REPOSITORY / 'configs/lite_hybrid.py'}:demo,tiny"
    assert main.main(["--task=sample", own, recipe, "--config.evaluate.samples=9"]) == 64
    assert re.search(r"the model's own keys count, not the recipe's: .*\(the model: ", capsys.readouterr().out)
    drawn = []

    def sample_batches(self: Pipeline, labels: np.ndarray, **_: Any) -> Any:
        drawn.append(self.config)
        yield labels, np.zeros((len(labels), PX, PX, 3), np.uint8)

    monkeypatch.setattr(Pipeline, "sample_batches", sample_batches)
    same, other = "--config.generator.backbone.width=16", "--config.generator_training.compute_dtype=bfloat16"
    assert main.main(["--task=sample", own, f"--workdir={tmp_path}", same, other]) == 0, capsys.readouterr().err
    assert drawn[0].generator_training.compute_dtype == "bfloat16"


def test_a_label_that_the_model_lacks_ends_the_sample_task(folder, tmp_path, capsys):
    status = main.main(["--task=sample", f"--model={folder}", "--config.sample.labels=(1,9)", f"--workdir={tmp_path}"])
    error = capsys.readouterr().err
    assert status == 64 and "9" in error and "Traceback" not in error


def test_the_bench_task_times_every_stage(folder, tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", "--config.bench.batch_size=2", "--config.sample.guidance_scale=2"]
    assert main.main(["--task=bench", f"--model={folder}", *arguments]) == 0, capsys.readouterr()
    output = capsys.readouterr().out
    assert all(f" {stage} " in output for stage in ("encode", "coarse", "fine", "decode", "label to image"))
    assert "guidance 2" in output and "coarse in 2, fine in 1 passes" in output


def test_the_show_task_says_what_a_recipe_is(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    assert main.main(["--task=show", "--config=configs/lite_hybrid.py:demo,tiny"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"4 x 4 = 16 discrete tokens, 64 codes, \d+ passes", output)
    assert re.search(r"Parameters of the generator: \d", output)
    costs = re.findall(r"^  (?:tokenizer|generator) +([0-9.]+)", output, re.MULTILINE)
    assert len(costs) == 3 and all(float(cost) > 0 for cost in costs), "two stages of training and one of sampling"
