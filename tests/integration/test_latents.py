"""Tokens for a generator that stands on the tokenizer of another run."""

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
    assert rows[0] == "path\treason" and len(rows) == 2 and "broken.png" in rows[1] and "not an image" in rows[1]
