"""What version 0.1.0 wrote is read: a run goes on where it was, and its model folder draws the same images.

`goldens/run_0_1_0.tar.xz` holds a run that 0.1.0 left at step 4 of 6 of its generator, the generator it ended with, and
samples that it drew.
"""

import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from tiny import SMALLEST_ARGUMENTS, one_device_mesh, quick_compilation

import ear_jax
from ear_jax.main import main
from ear_jax.stages import session

RECIPE = (
    f"--config={tiny.__file__}",
    *SMALLEST_ARGUMENTS,
    "--config.generator_training.checkpoint_every_steps=4",
    "--config.tokenizer_training.keep_checkpoints=1",
    "--config.run.program_cache=off",
)


@pytest.fixture(scope="module")
def earlier(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what 0.1.0 wrote."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(repository / "tests" / "goldens" / "run_0_1_0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_model_folder_draws_what_it_drew(earlier):
    drawn = ear_jax.load(earlier / "finished/model").sample([0, 1, 2, 3], seed=5, guidance_scale=2.0, temperature=0.9)
    gap = np.abs(drawn.astype(int) - np.load(earlier / "finished/samples.npy"))
    assert gap.max() <= 1, "rounding of another compiler at most"


def test_a_run_goes_on_from_its_checkpoint_and_repeats_no_stage(earlier, capsys):
    run = earlier / "run"
    with mock.patch.object(session, "make_mesh", one_device_mesh), quick_compilation():
        for stage in ("tokenizer", "latents", "generator"):
            assert main([*RECIPE, f"--task={stage}", f"--workdir={run}"]) == 0
    text = capsys.readouterr().out
    assert "tokenizer   complete" in text and "latents     complete" in text
    assert "going on from the checkpoint of step 4" in text
    found = load_file(run / "generator/model/generator.safetensors")
    expected = load_file(earlier / "finished/model/generator.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=5e-5, err_msg=name)
