"""The wheel: what it holds, and that it trains and lists its recipes outside the repository."""

import email
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BUILDERS = ("hatchling", "hatch_fancy_pypi_readme")
TINY = ("--config=lite_hybrid:demo,tiny", "--config.tokenizer_training.steps=10")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout without the network."""
    missing = [name for name in BUILDERS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"building the wheel needs {', '.join(missing)} (the dev extra has it)")
    folder = tmp_path_factory.mktemp("wheel")
    program = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return folder / done.stdout.split()[-1]


def test_the_wheel_holds_recipes_studies_types_and_a_readme_for_an_index(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        read = {name: archive.read(name).decode() for name in names if name.endswith(("METADATA", "entry_points.txt"))}
    held = set(names)
    for folder, place in (("configs", "ear_jax/recipes"), ("studies", "ear_jax/studies"), ("ear_jax", "ear_jax")):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert f"{place}/{path.relative_to(REPOSITORY / folder)}" in held
    assert "ear_jax/py.typed" in held and not [name for name in names if "__pycache__" in name]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ear_jax"}, "no other package at the top"
    metadata, scripts = (next(text for name, text in read.items() if name.endswith(end)) for end in ("METADATA", "txt"))
    assert "ear_jax = ear_jax.main:run" in scripts
    message = email.message_from_string(metadata)
    assert {url.split(",")[0] for url in message.get_all("Project-URL", [])} >= {"Repository", "Changelog"}
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)#]+)\)", str(message.get_payload()))
    assert len(links) > 5 and all(target.startswith("https://") for _, target in links)
    assert [target for mark, target in links if mark], "the picture of the samples"


@pytest.mark.slow
def test_the_installed_wheel_trains_ten_steps_in_another_folder(wheel, tmp_path):
    """Its dependencies are those of this environment, so that nothing is fetched."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    installed = [path for path in sys.path if path.endswith("site-packages")]
    # Plain path lines: their own .pth files, an editable ear_jax among them, are not followed.
    (site / "dependencies.pth").write_text("\n".join(installed) + "\n")
    python, script = environment / "bin" / "python", environment / "bin" / "ear_jax"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*install, str(wheel)], check=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: object) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert str(site) in run(python, "-c", "import ear_jax; print(ear_jax.__file__)")
    assert run(script, "--version").startswith("ear_jax 0.")
    assert "studies/fidelity" in run(python, "-m", "ear_jax", "--help")
    run(script, "--task=tokenizer", *TINY, "--workdir=run")
    assert (tmp_path / "run" / "tokenizer" / "model" / "tokenizer.safetensors").is_file()
    refused = subprocess.run(
        [script, "--task=study", "--config=studies/end_to_end:shapes,tiny"],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
    )
    assert refused.returncode == 64 and b"model" in refused.stderr, "the study is found and asks for its model"
