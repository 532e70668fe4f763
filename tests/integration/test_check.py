"""`--task=check`: a sound model holds throughout, and each planted fault is found by the check that is for it."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from integration.tiny import SMALLEST, TRAINING, random_model, tiny_config

import ear_jax
from ear_jax import main
from ear_jax.bench import stages as pipeline_stages
from ear_jax.check import components as component_checks
from ear_jax.check import model as model_checks
from ear_jax.check.model import ModelChecks
from ear_jax.check.tiny import tiny_config as tiny_of
from ear_jax.config import kinds
from ear_jax.config.values import flatten, unflatten
from ear_jax.folders import model_folder
from ear_jax.heads import energy
from ear_jax.inference.pipeline import Pipeline

NAMES = ("circle", "square", "triangle", "star")
PX = SMALLEST["data__image_px"]
CONFIG = tiny_config(
    **SMALLEST,
    sample__batch_size=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    return random_model(tmp_path_factory.mktemp("models") / "tiny", CONFIG, NAMES)


@pytest.fixture(scope="module")
def checks(folder: Path) -> ModelChecks:
    return ModelChecks(ear_jax.load(folder), is_trained=False)


@pytest.fixture
def model(checks: ModelChecks) -> Iterator[Pipeline]:
    """The model, to plant faults in: its weights are put back."""
    kept = checks.model.tokenizer_arrays, checks.model.generator_arrays
    yield checks.model
    checks.model.tokenizer_arrays, checks.model.generator_arrays = kept


def pictures(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, PX, PX, 3), np.uint8)


def changed(arrays: Mapping[str, Any], ending: str, value: float) -> dict[str, np.ndarray]:
    """Return arrays with one value throughout those whose name ends so."""
    assert any(name.endswith(ending) for name in arrays), sorted(arrays)
    host = {name: np.asarray(array) for name, array in arrays.items()}
    return {name: np.full_like(a, value) if name.endswith(ending) else a for name, a in host.items()}


# --- the model in use ------------------------------------------------------------------------------------------------


def test_a_sound_model_passes_every_check(checks, tmp_path):
    images = pictures()
    outcomes = [
        checks.encodes(images),
        checks.decodes(images),
        checks.draws_tokens(),
        checks.stages_make_the_whole(),
        checks.depends_on_the_label(),
        checks.depends_on_the_noise(),
        checks.repeats_itself(),
        checks.takes_possible_times(1e12, "the peak"),
        checks.same_after_saving(tmp_path),
    ]
    assert [outcome.faults for outcome in outcomes] == [[]] * len(outcomes)
    assert outcomes[0].seen == "coarse 4 x 8 discrete, fine 16 x 4 continuous"
    assert "without fine tokens" in outcomes[1].seen and "between 4 labels" in outcomes[4].seen


def test_a_label_that_changes_nothing_is_found(checks, model):
    model.set_generator(changed(model.generator_arrays, "class_embedding", 0.0))
    assert checks.depends_on_the_label().faults == [
        "the output does not depend on the label: all 4 values give the same."
    ]
    assert not checks.depends_on_the_noise().faults, "the other checks do not mind"


def test_a_head_that_ignores_its_noise_is_found_though_the_coarse_tokens_vary(checks, model):
    model.set_generator(changed(model.generator_arrays, "heads/1/noise/kernel", 0.0))
    assert (
        "fine: the output does not depend on the noise, given the earlier levels: all 3 values give the same."
        in checks.depends_on_the_noise().faults
    )


def test_streams_that_are_copies_are_found(checks):
    one = checks.stages.sample(np.zeros(8, np.int32), 0)
    with mock.patch.object(checks.stages, "sample", lambda labels, seed=0: one):
        faults = checks.depends_on_the_noise().faults
    assert "the output does not depend on the noise (the seed): all 3 values give the same." in faults
    assert any(fault.startswith("16 of 24 samples repeat another bit for bit: 0 = 8") for fault in faults)


def test_weights_that_are_not_finite_are_found(checks, model):
    model.set_generator(changed(model.generator_arrays, "heads/1/output/bias", np.nan))
    assert any("fine: 512 values are not finite" in fault for fault in checks.draws_tokens().faults)


def test_a_decoder_that_computes_nothing_is_found(checks, model):
    silent = changed(changed(model.tokenizer_arrays, "decoder/exit/kernel", 0.0), "decoder/exit/bias", 0.0)
    model.tokenizer_arrays = {name: jnp.asarray(array) for name, array in silent.items()}
    faults = checks.decodes(pictures()).faults
    assert "8 of 8 decoded images hold a single value." in faults
    assert any("does not depend on the fine tokens" in fault for fault in faults)


def test_images_with_the_same_tokens_are_found(checks):
    images = pictures()
    images[5] = images[2]
    assert checks.encodes(images).faults == ["1 of 8 images' tokens repeat another bit for bit: 2 = 5."]


def test_a_draw_that_does_not_repeat_or_minds_its_neighbours_is_found(checks):
    stream = np.random.default_rng(0)
    with mock.patch.object(checks.stages, "sample", lambda *_: stream.integers(0, 256, (8, PX, PX, 3), np.uint8)):
        assert checks.repeats_itself().faults == [
            "the same seed gives other images.",
            "an image changes with the labels of its neighbours in the batch.",
        ]


def test_stages_that_are_not_those_of_the_whole_are_found(checks):
    rolled = np.roll(checks.stages.sample(checks.mixed), 1, axis=0)
    with mock.patch.object(checks.stages, "sample", lambda *_: rolled):
        (fault,) = checks.stages_make_the_whole().faults
    assert fault.startswith("8 of 8 images of the stages")


def test_times_below_the_roofline_are_found(checks):
    faults = checks.takes_possible_times(1e3, "a slow peak").faults
    assert {fault.split(":")[0] for fault in faults} == {"coarse", "fine", "decode", "label to image"}


def test_a_timer_that_does_not_wait_is_found(checks):
    """Starting a program takes no time beside running it; only results that are waited for count."""
    with mock.patch.object(pipeline_stages, "count_flops", lambda *_: 1e12):
        assert len(checks.takes_possible_times(1e12, "the peak").faults) == 4, "a teraflop takes a second here"


def test_a_byte_that_changes_on_its_way_through_the_file_is_found(checks, model, tmp_path):
    read = model_folder.read

    def damaged(path: Path) -> Any:
        found = read(path)
        found.tensors["generator"]["heads/1/output/bias"] = found.tensors["generator"]["heads/1/output/bias"] + 1e-6
        return found

    without = mock.patch.object(checks.stages, "sample", lambda *_: pictures())
    loaded = mock.patch.object(model_checks.PipelineStages, "sample", lambda *_: pictures(1))
    with mock.patch.object(model_checks.model_folder, "read", damaged), loaded, without:
        faults = checks.same_after_saving(tmp_path).faults
    assert faults == [
        "generator/heads/1/output/bias changed on its way through the file.",
        "generator.safetensors is another file when it is saved again.",
        "the loaded model draws other images from the same labels and seed.",
    ]


# --- what a model is made by -----------------------------------------------------------------------------------------


class Line(nnx.Module):
    """A trainable module of two numbers; what is wrong with it is told."""

    def __init__(self, rngs: nnx.Rngs, fault: str):
        self.slope = nnx.Param(jnp.ones((1,)))
        self.offset = nnx.Param(jnp.ones((1,)))
        self.fault = fault

    def loss(self, batch: Any, rng: jax.Array, step: jax.Array, controls: Any) -> tuple[jax.Array, dict[str, Any]]:
        offset = self.offset[...].sum() * (0.0 if self.fault == "still" else 1.0)
        terms = {"loss/l1": self.slope[...].sum() * batch["x"].mean(), "loss/l2": offset}
        total = terms["loss/l1"] + 0.5 * terms["loss/l2"]
        if self.fault == "sum":
            total = total + 0.1
        if self.fault == "infinite":
            total = total / 0.0
        return total, terms


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("", []),
        ("still", ["offset did not move."]),
        ("sum", ["loss: the parts (l1, l2) sum to"]),
        ("infinite", ["loss is", "grad_norm is", "nonfinite", "averaged", "did not move", "the parts"]),
    ],
)
def test_an_update_is_checked(fault, said):
    settings = dataclasses.replace(TRAINING, warmup_steps=0, final_phase_steps=0, weight_decay=0.0)
    batch = {"x": np.ones(4, np.float32)}
    outcome = component_checks._updates(
        lambda keys: Line(keys, fault), settings, batch, {"l1": 1.0, "l2": 0.5, "kl": 1.0}
    )
    if fault != "infinite":
        assert len(outcome.faults) == len(said)
        assert all(text.startswith(start) for text, start in zip(outcome.faults, said, strict=True))
    else:
        assert any("the update was skipped" in text for text in outcome.faults)
        assert {"slope did not move.", "offset did not move."} <= set(outcome.faults)


def test_a_biased_energy_score_is_found():
    config = tiny_of(CONFIG)
    assert component_checks.scores_energy_without_bias(config).faults == []
    unbiased = energy.energy_score

    def biased(draws: jax.Array, target: jax.Array, **options: Any) -> jax.Array:
        """Count pairs of a draw with itself: the spread is too small by (m - 1) / m."""
        count = len(draws)
        return unbiased(draws, target, **(options | {"temperature": (count - 1) / count}))

    with mock.patch.object(energy, "energy_score", biased):
        faults = component_checks.scores_energy_without_bias(config).faults
    assert [fault.split(":")[0] for fault in faults] == ["energy loss of 2 draws", "energy loss of 4 draws"]


# --- the command line ------------------------------------------------------------------------------------------------


def test_a_planted_fault_ends_the_task_with_its_status(folder, tmp_path, capsys):
    stored = model_folder.read(folder)
    generator = changed(stored.tensors["generator"], "class_embedding", 0.0)
    arrays = {"tokenizer": stored.tensors["tokenizer"], "generator": generator}
    unlabelled = model_folder.write(tmp_path / "unlabelled", stored.config_dict, arrays, NAMES, {})
    run = tmp_path / "run"
    run.mkdir()
    (run / "ledger.jsonl").write_text(
        '{"event": "metrics", "stage": "generator", "step": 8, "mfu": 2.5, "images_per_s": 9.0}\n'
    )
    assert main.main(["--task=check", f"--model={unlabelled}", f"--workdir={run}"]) == 79
    shown = capsys.readouterr()
    assert "checks do not hold: label, recorded utilisation." in shown.err and "Traceback" not in shown.err
    assert "label: the output does not depend on the label" in shown.out
    assert "recorded utilisation: generator step 8: model FLOPs utilisation 250.0%" in shown.out


def test_a_model_that_is_not_there_is_an_error_of_the_command_line(tmp_path, capsys):
    assert main.main(["--task=check", f"--model={tmp_path}"]) == 64
    assert "holds no model" in capsys.readouterr().err


def test_sizes_and_origins_of_a_recipe_do_not_reach_its_tiny_model():
    pyramid = {"scales": (1, 3, 16), "windows": (9, 16), "attention_heads": 3, "head": "joint"}
    own = {"tokenizer.name": "lite_vae", "generator.backbone.name": "continuous_next_scale"}
    own |= {f"generator.pyramid.{name}": value for name, value in pyramid.items()}
    tiny = tiny_of(unflatten({**flatten(CONFIG), **own, "generator.freeze": ("trunk",), "generator.start_from": "m"}))
    assert tiny.generator.pyramid.head == "joint" and kinds.levels(tiny)[-1].grid == 4
    assert (tiny.generator.freeze, tiny.generator.start_from) == ((), "")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lite_hybrid.py", "ear.py", "mar.py", "var.py", "dit.py", "parscale_ear.py"])
def test_a_tiny_model_of_every_family_holds(repository, tmp_path, capsys, recipe):
    assert main.main([f"--config={repository / 'configs' / recipe}", "--task=check", f"--workdir={tmp_path}"]) == 0, (
        capsys.readouterr().out
    )
    output = capsys.readouterr().out
    assert "NO" not in output and "16 of 16" in output
    assert not list(tmp_path.iterdir()), "nothing is written"
