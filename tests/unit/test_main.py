"""The command line as a user meets it: help, mistakes, exit statuses, and how long an answer takes."""

import errno
import inspect
import json
import os
import pydoc
import re
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ear_jax import command_line, main, tasks
from ear_jax.config import read
from ear_jax.errors import CheckError, ConfigError, DataError, NonFiniteError, PreemptedError, StorageError
from ear_jax.folders import model_folder

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = "--config=configs/lite_hybrid.py"
IMAGES = "evaluate.images=folder"


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Replace the sample task by one that records its calls."""
    seen: list[tuple] = []
    module = types.ModuleType("recording_task")
    module.run = lambda config, workdir, *, model: seen.append((config, workdir, model))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recording_task", module)
    for name in ("run", "sample"):
        monkeypatch.setitem(tasks.TASKS, name, "recording_task:run")
    return seen


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_default_task_and_workdir(calls: list[tuple]) -> None:
    assert main.main([DEMO, "--config.sample.guidance_scale=2"]) == 0
    config, workdir, model = calls[0]
    assert (config.sample.guidance_scale, workdir, model) == (2.0, "runs/lite_hybrid", None)


def test_the_environment_does_not_change_what_a_seed_gives(
    calls: list[tuple], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value, usual in (("JAX_ENABLE_X64", "1", "0"), ("JAX_DEFAULT_PRNG_IMPL", "rbg", "threefry2x32")):
        for given, is_said in ((value, True), (usual, False)):
            monkeypatch.setenv(name, given)
            assert main.main([DEMO]) == 0 and name not in os.environ
            assert (f"{name}={given} is not used" in capsys.readouterr().out) == is_said


def test_values_can_follow_their_flags(calls: list[tuple]) -> None:
    arguments = ["--config", "configs/lite_hybrid.py:cifar10", "--task", "sample", "--config.seed", "5"]
    assert main.main([*arguments, "--workdir", "runs/x", "--model", "m"]) == 0
    config, workdir, model = calls[0]
    assert (config.seed, config.name, workdir, model) == (5, "lite_hybrid_cifar10", "runs/x", "m")


def test_a_model_folder_brings_its_config(calls: list[tuple], tmp_path: Path) -> None:
    stored = read.to_dict(read.resolve({"tokenizer_training": {"steps": 9}, "generator_training": {"steps": 9}}))
    folder = tmp_path / "run7" / "generator" / "model"
    model_folder.write(folder, stored, {"tokenizer": {}}, ("a",), {})
    for model in (folder, tmp_path / "run7"):
        assert main.main(["--task=sample", f"--model={model}", "--config.sample.labels=(1,2)"]) == 0
        config, workdir, given = calls.pop()
        assert (config.sample.labels, config.tokenizer_training.steps) == ((1, 2), 9)
        assert (workdir, given) == ("runs/model_run7", str(model))


def test_a_used_workdir_brings_its_config(calls: list[tuple], tmp_path: Path) -> None:
    stored = read.to_dict(command_line.read([DEMO, "--config.seed=77"]).config)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert main.main([f"--workdir={tmp_path}"]) == 0
    assert calls[0][0].seed == 77
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        command_line.read([f"--workdir={tmp_path}"])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--workdirs=x", "--workdirs: unknown flag. Did you mean --workdir?"),
        ("--sample.guidance_scale=2", "Did you mean --config.sample.guidance_scale?"),
        ("--guidance=2", "Did you mean --config.sample.guidance_sc"),
        ("--task=smaple", "Did you mean 'sample'?"),
        ("--zzzz=1", "Known: --config"),
        ("stray", "'stray' is not a flag"),
        ("--workdir", "--workdir lacks its value"),
        ("--workdir=", "--workdir is empty"),
        ("--config=other.py", "--config: given twice"),
    ],
)
def test_wrong_flags_are_explained(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([DEMO, argument]) == 64
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (
            ["sample.top_k=3"],
            "config.sample.top_k=3: has no effect on this model: only next_scale or ",
        ),
        (["sample.guidance_scale=1", "sample.guidance_schedule=constant"], "guidance_scale=1 is no guidance"),
        ([f"{IMAGES}", "generator.backbone.width=32"], "config.generator.backbone.width=32: config.evaluate.images is"),
        ([f"{IMAGES}", "sample.guidance_scale=3"], "is scored as it is, without a model, and does not read it"),
        ([f"{IMAGES}", "evaluate.samples=3"], "config.evaluate.samples=3: config.evaluate.images is scored"),
        ([f"{IMAGES}", "stats.name=x"], "does not read it"),
        ([f"{IMAGES}", "--model=m"], "--model=m: config.evaluate.images is scored without a model, and --config"),
        (["evaluate.images=x"], "config.evaluate.images='x': --task=run does not read it, --task=evaluate does"),
        (["bench.repeats=9"], "config.bench.repeats=9: --task=run does not read it, --task=bench does"),
        (["convert.checkpoint=x"], "config.convert.checkpoint='x': --task=run does not read it, --task=convert does"),
        (["--task=generator", "--model=m"], "--model=m: --task=generator reads no model"),
        (["--task=bench", "--model=m", "bench.what=compile"], "--model=m: config.bench.what=compile compiles the conf"),
    ],
)
def test_what_has_no_effect_is_refused(arguments: list[str], fault: str) -> None:
    task = ["--task=evaluate"] if IMAGES in arguments else []
    given = [argument if argument.startswith("--") else f"--config.{argument}" for argument in arguments]
    with pytest.raises(ConfigError, match=re.escape(fault)):
        command_line.read([DEMO, *task, *given])


def test_what_has_an_effect_or_is_there_already_is_not_refused() -> None:
    read_of_images = ("evaluate.batch_size=9", "data.image_px=64", "seed=3", "stats.images=9", "run.program_cache=off")
    there = ("sample.temperature=1.0", "sample.top_k=0", "generator.backbone.width=128")
    for argument in (*read_of_images, *there):
        command_line.read([DEMO, "--task=evaluate", f"--config.{IMAGES}", f"--config.{argument}"])
    command_line.read([DEMO, "--config.sample.guidance_schedule=constant", "--config.sample.top_p=0"])


def test_faults_of_flags_and_config_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([DEMO, "--task=shw", "--config.data.imge_px=3", "--config.seed=x"]) == 64
    assert "3 faults" in capsys.readouterr().err


@pytest.mark.parametrize("task", [["--task=stats"], ["--task=evaluate", "--config.evaluate.images=photos"]])
def test_measuring_images_refuses_what_it_does_not_read(task: list[str]) -> None:
    for key in ("sample.guidance_scale=3", "generator.energy.alpha=0.5", "tokenizer.loss.l1=3", "study.samples=9"):
        with pytest.raises(ConfigError, match=f"config.{key.partition('=')[0]}.*does not read it"):
            command_line.read([DEMO, *task, f"--config.{key}"])
    read_keys = ("data.image_px=64", "seed=3", "evaluate.metrics=fd", "stats.images=9", "sample.guidance_scale=1.5")
    assert command_line.read([DEMO, *task, *(f"--config.{key}" for key in read_keys)]).config.seed == 3


def test_without_a_config_the_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--task=show"]) == 64
    text = capsys.readouterr().err
    assert "configs/lite_hybrid.py" in text and "imagenet1024" in text and "compact" in text


def test_help_lists_tasks_recipes_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name}" in text for name in tasks.TASKS)
    assert "configs/lite_vae.py" in text
    assert main.main(["--help=sample"]) == 0
    text = capsys.readouterr().out
    assert "--config.sample.guidance_scale=1.0" in text and "config.data" not in text
    assert main.main(["--help=sampel"]) == 64
    assert "Did you mean sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shell", "status", "words"),
    [
        ("--help=all | head -n 1", 0, ""),
        ("--task=show TINY | head -c 0", 74, "Nobody reads standard output"),
        ("--help >/dev/full", 74, "Standard output cannot be written: No space left"),
        ("--help >&-", 74, "Standard output is closed"),
        ("--help >/dev/full 2>&1", 74, ""),
        ("--help >&- 2>&-", 74, ""),
    ],
)
def test_an_output_that_cannot_be_written_is_one_sentence(shell: str, status: int, words: str) -> None:
    # A made-up task prints more than any buffer holds, without jax.
    code = (
        "import sys, types; from ear_jax import main, tasks; task = types.ModuleType('chatty')\n"
        "task.run = lambda *_, **__: [print('x' * 99) for _ in range(9999)]\n"
        "sys.modules['chatty'] = task; tasks.TASKS['show'] = 'chatty:run'; main.leave(main.main())"
    )
    command = f'"{sys.executable}" -c "{code}" {shell}; exit ${{PIPESTATUS[0]}}'.replace("TINY", DEMO)
    answer = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert answer.returncode == status, answer.stderr
    assert words in answer.stderr and answer.stderr.count("\n") == bool(words)


def test_every_task_has_a_summary() -> None:
    assert set(tasks.SUMMARIES) == set(tasks.TASKS)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("d"), 65),
        (StorageError("s"), 74),
        (OSError(errno.ENOSPC, "No space left on device"), 74),
        (PreemptedError("p"), 75),
        (NonFiniteError("n"), 76),
        (CheckError("c"), 79),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_exit_statuses(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    module = types.ModuleType("failing_task")
    module.run = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "failing_task", module)
    monkeypatch.setitem(tasks.TASKS, "run", "failing_task:run")
    assert main.main([DEMO]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_programming_faults_keep_their_traceback_and_exit_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("broken_task")
    module.run = lambda *_, **__: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_task", module)
    monkeypatch.setitem(tasks.TASKS, "run", "broken_task:run")
    assert main.main([DEMO]) == 70
    error = capsys.readouterr().err
    assert "Traceback" in error and error.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_missing_accelerator_is_one_sentence() -> None:
    code = (
        "import sys, types; from ear_jax import main, tasks\n"
        "def run(*_, **__): from ear_jax.distributed import process; process.jax.devices()\n"
        "sys.modules['task'] = types.SimpleNamespace(run=run); tasks.TASKS['run'] = 'task:run'; main.leave(main.main())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, DEMO, "--config.run.program_cache=off"],
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 64, answer.stderr
    assert answer.stderr.startswith("ConfigError: JAX_PLATFORMS=cuda: JAX cannot start it.")
    assert answer.stderr.count("\n") == 1


def test_a_config_error_is_answered_within_two_seconds() -> None:
    # Processor time: other work on the machine must not decide, and nothing here waits for anything else.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = python("", "-m", "ear_jax.main", DEMO, "--config.data.imge_px=3")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert answer.returncode == 64
    assert answer.stderr == "ConfigError: config.data.imge_px: unknown key. Did you mean config.data.image_px?\n"
    assert answer.stdout == ""


def test_the_package_and_the_command_line_import_fast_and_without_jax() -> None:
    code = (
        "import sys, time; start = time.process_time(); import ear_jax; took = time.process_time() - start\n"
        "from ear_jax import main; from ear_jax.config import read\n"
        "heavy = {'jax', 'flax', 'numpy', 'tensorflow', 'torch'} & set(sys.modules)\n"
        "print(took < 0.3, sorted(heavy), ear_jax.__version__)"
    )
    answer = python(code)
    assert answer.stdout.startswith("True [] "), answer.stdout + answer.stderr


def test_load_is_an_ordinary_function_of_the_package() -> None:
    import ear_jax

    assert "load" in dir(ear_jax) and inspect.isfunction(ear_jax.load)
    assert "load(path" in pydoc.plain(pydoc.render_doc(ear_jax)) and "Raises:" in (ear_jax.load.__doc__ or "")


@pytest.mark.parametrize("command", [("-m", "ear_jax"), ("-c", "from ear_jax.main import run; run()")])
def test_the_version_and_the_recipes_are_told_from_any_folder(command: tuple[str, ...], tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        run = subprocess.run(
            [sys.executable, *command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return run.stdout + run.stderr

    assert told("--version").startswith("ear_jax 0.") and "(jax 0." in told("--version")
    assert "Recipes that come with ear_jax:" in told("--help") and "studies/fidelity  variants" in told("--help")


def test_the_package_has_no_other_attributes() -> None:
    import ear_jax

    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = ear_jax.laod  # pyright: ignore[reportAttributeAccessIssue]


def test_the_slurm_launcher_requeues_what_was_saved(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in {
        "srun": 'echo "srun $*" "proxy=${https_proxy:-none}"; exit "$STATUS"',
        "scontrol": 'echo "scontrol $*"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": "41",
        "https_proxy": "somewhere",
    }

    def launch(status: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", REPOSITORY / "launch" / "slurm.sh", *arguments],
            cwd=REPOSITORY,
            env={**environment, "STATUS": str(status)},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    saved = launch(75, DEMO, "--workdir=runs/x")
    assert f"-m ear_jax.main {DEMO} --workdir=runs/x proxy=none" in saved.stdout
    assert "scontrol requeue 41" in saved.stdout
    assert saved.returncode == 0
    for status in (0, 64, 70):
        ended = launch(status, DEMO)
        assert ended.returncode == status
        assert "requeue" not in ended.stdout
    assert launch(0).returncode == 64
