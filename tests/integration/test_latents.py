"""Tokens for a generator that stands on the tokenizer of another run."""

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from integration import tiny
from PIL import Image
from random_weights import random_weights

from ear_jax import build, main
from ear_jax.config import read
from ear_jax.folders import model_folder
from ear_jax.stages import session


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes of nine images, one of them damaged."""
    stream = np.random.default_rng(0)
    for number in range(18):
        folder = tmp_path / "photographs" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stream.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    (tmp_path / "photographs" / "cat" / "broken.png").write_bytes(b"<html>not found</html>")
    return tmp_path / "photographs"


def test_an_adopted_tokenizer_makes_the_cache_and_damaged_images_are_reported(tmp_path, photographs, capsys):
    _, *arrays = random_weights(lambda keys: build.build_tokenizer(tiny.CONFIG, rngs=keys))
    tensors = {"tokenizer": {name: np.asarray(leaf) for name, leaf in (arrays[0] | arrays[1]).items()}}
    model = model_folder.write(tmp_path / "model", read.to_dict(tiny.CONFIG), tensors, ("cat", "dog"), {})
    work = tmp_path / "work"
    arguments = [
        f"--config={tiny.__file__}",
        f"--config.tokenizer.source={model}",
        f"--config.data.source=folder:{photographs}",
        "--config.data.max_bad_fraction=0.2",
        "--config.data.eval_images=4",
        f"--workdir={work}",
    ]
    with mock.patch.object(session, "make_mesh", tiny.one_device_mesh):
        for task in ("tokenizer", "latents"):
            assert main.main([*arguments, f"--task={task}"]) == 0, capsys.readouterr().err
    kept = model_folder.read(work)
    assert all(np.array_equal(kept.tensors["tokenizer"][name], value) for name, value in tensors["tokenizer"].items())
    assert (work / "latents").is_dir()
    rows = (work / "quarantine.tsv").read_text().splitlines()
    _other_places(arguments, model, photographs, work, capsys)
    assert rows[0] == "path\treason" and len(rows) == 2 and "broken.png" in rows[1] and "not an image" in rows[1]


def _other_places(arguments, model, photographs, work, capsys):
    """The run's tokenizer and images are known by content: under a new path they are the same, changed they are not."""

    def again(*changes: str) -> tuple[int, str]:
        capsys.readouterr()
        with mock.patch.object(session, "make_mesh", tiny.one_device_mesh):
            keys = [f"--config.{change}" for change in changes]
            kept = [it for it in arguments if it.partition("=")[0] not in {key.partition("=")[0] for key in keys}]
            status = main.main([*kept, "--task=tokenizer", *keys])
        told = capsys.readouterr()
        return status, told.out + told.err

    copy, elsewhere = shutil.copytree(model, model.with_name("copy")), photographs.with_name("elsewhere")
    shutil.copytree(photographs, elsewhere)
    status, told = again(f"tokenizer.source={copy}", f"data.source=folder:{elsewhere}")
    assert status == 0 and "has the same one as" in told and "holds the same images as" in told, told
    assert again(f"tokenizer.source={work / 'tokenizer' / 'model'}")[0] == 0
    folder = model_folder.read(model)
    name, array = next(iter(folder.tensors["tokenizer"].items()))
    tensors = {"tokenizer": folder.tensors["tokenizer"] | {name: array + 1}}
    model_folder.write(model, folder.config_dict, tensors, folder.class_names, {})
    status, told = again()
    assert status == 64 and "is another one than" in told and f"source={work / 'tokenizer' / 'model'}" in told
    first = photographs / "cat" / "00.png"
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    status, told = again(f"tokenizer.source={copy}")
    assert status == 64 and "1 of the same size, with another content: cat/00.png" in told
    shutil.rmtree(model)
    assert again(f"data.source=folder:{elsewhere}")[0] == 0, "the run has a tokenizer of its own"
