"""One more kind of generator is one file, one entry without jax and one line of `build`: every task then knows it."""

from pathlib import Path

import pyramid_kind
import pytest
import tiny
from tiny import one_device_mesh, quick_compilation

import ear_jax
from ear_jax import build
from ear_jax.config import kinds
from ear_jax.folders import model_folder
from ear_jax.main import main
from ear_jax.stages import session

RECIPE = (
    f"--config={tiny.__file__}",
    "--config.tokenizer.name=lite_vae",
    "--config.generator.backbone.name=pyramid",
    "--config.tokenizer_training.steps=4",
    "--config.generator_training.steps=2",
    "--config.generator_training.warmup_steps=0",
    "--config.generator_training.final_phase_steps=0",
    "--config.run.program_cache=off",
)


@pytest.fixture(scope="module")
def registered():
    with pytest.MonkeyPatch.context() as patch, quick_compilation():
        patch.setitem(kinds.KINDS, "pyramid", pyramid_kind.KIND)
        patch.setitem(build.GENERATORS, "pyramid", pyramid_kind.make_pyramid)
        patch.setattr(session, "make_mesh", one_device_mesh)
        yield


@pytest.fixture(scope="module")
def run(registered, tmp_path_factory) -> Path:
    """The folder of a whole run: trained, sampled, evaluated."""
    folder = tmp_path_factory.mktemp("pyramid")
    config = tiny.tiny_config(tokenizer__name="lite_vae")
    tokenizer = tiny.random_model(tmp_path_factory.mktemp("tokenizer"), config, ("a", "b", "c", "d"))
    assert main([*RECIPE, f"--config.tokenizer.source={tokenizer}", f"--workdir={folder}"]) == 0
    return folder


def test_it_is_trained_sampled_and_evaluated_with_levels_of_its_own(run):
    assert (run / "samples" / "grid.png").is_file() and (run / "evaluation.json").is_file()
    model = ear_jax.load(run)
    assert [level.name for level in model.levels] == ["grid_1", "grid_2", "grid_4"]
    assert [level.name for level in model.spec.levels] == ["fine"]
    assert model.sample([0, 1], seed=3).shape == (2, 16, 16, 3)
    assert "generator" in model_folder.read(run).tensors


@pytest.mark.parametrize("task", ["bench", "check"])
def test_its_levels_are_timed_and_checked_one_by_one(run, capsys, task):
    more = ["--config.bench.repeats=3"] if task == "bench" else []
    assert main([*RECIPE, *more, f"--task={task}", f"--workdir={run}"]) == 0
    text = capsys.readouterr().out
    if task == "bench":
        assert all(f"grid_{side}" in text for side in pyramid_kind.GRIDS) and "label to image" in text


def test_it_is_shown(registered, capsys):
    assert main([*RECIPE, "--task=show"]) == 0
    assert "grid_2     2 x 2 = 4 continuous tokens, 4 channels, 1 passes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_tiny_model_of_it_is_checked(registered, capsys, tmp_path):
    assert main([*RECIPE, "--task=check", f"--workdir={tmp_path / 'none'}"]) == 0
    assert "pyramid" in capsys.readouterr().out


def test_its_name_is_offered_and_its_rules_are_kept(registered, capsys):
    assert main(["--help=generator.backbone.name"]) == 0
    assert "pyramid" in capsys.readouterr().out
    assert main([*RECIPE, "--task=show", "--config.generator.fine.steps=2"]) == 64
    assert "use at most 1" in capsys.readouterr().err
