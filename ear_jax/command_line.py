"""The command line: flags and dotted overrides to a checked request, all faults in one ConfigError; and its help text.

No jax here, so that a typing error is answered at once.
"""

import dataclasses
import difflib
import importlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ear_jax.config.read import from_dict, listing, load, raise_faults, resolve
from ear_jax.config.schema import USES, Config
from ear_jax.config.suggest import closest_paths, did_you_mean
from ear_jax.config.uses import idle, refusals, refusals_of_images, set_aside, unmeasured
from ear_jax.config.values import describe_range, groups, leaves
from ear_jax.errors import ConfigError, EarError
from ear_jax.tasks import MODEL_READERS, SUMMARIES, TASKS, TRAINING

_FLAGS = ("config", "workdir", "task", "model", "help", "version")

_USAGE = """\
usage: ear_jax --config=RECIPE[:VARIANT] [--config.GROUP.KEY=VALUE ...]
               [--workdir=DIR] [--task=NAME] [--model=DIR]
       (ear_jax, python -m ear_jax and python -m ear_jax.main are the same)
       for example: ear_jax --config=lite_hybrid --workdir=runs/demo, then ear_jax --task=sample --workdir=runs/demo

  --config=RECIPE[:VARIANT] name or file of a recipe; may be left out when --model or a used --workdir brings its own
  --config.GROUP.KEY=VALUE  change one key; lists are written (1,2)
  --workdir=DIR             where results go; default runs/<config name>[_variant]
  --task=NAME               one of the tasks below; default run
  --model=DIR               model folder or run to read, instead of the workdir's own ({readers})
  --version                 the version of ear_jax and of what it computes with
  --help[=GROUP|=all]       this text, or the keys of a group (for example --help=sample) or of all

tasks:"""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a checked command line asks for."""

    config: Config
    task: str
    workdir: str
    model: str | None


def wants_help(arguments: Sequence[str]) -> bool:
    """Tell whether the arguments ask for help."""
    return any(argument in ("-h", "--help") or argument.startswith("--help=") for argument in arguments)


def version_text() -> str:
    """Return the versions of ear_jax, jax and Python."""
    own = importlib.import_module("ear_jax").__version__  # an import statement would tie this room to `ear_jax.load`
    return f"ear_jax {own} (jax {metadata.version('jax')}, Python {platform.python_version()})"


def help_text(arguments: Sequence[str]) -> str:
    """Return the usage, or the keys of the group that `--help=GROUP` names; raises ConfigError for an unknown group."""
    topic = next((argument.partition("=")[2] for argument in arguments if argument.startswith("--help=")), "")
    topic = topic.removeprefix("config.")
    if topic:
        chosen = [path for path in leaves() if topic in ("all", path) or path.startswith(f"{topic}.")]
        if not chosen:
            near = closest_paths(topic, (*groups(), *leaves(), "all"))
            hint = f" Did you mean {' or '.join(near)}?" if near else f" Groups: {', '.join(sorted(groups()))}."
            raise ConfigError(f"--help={topic}: no such group or key.{hint}")
        return "\n".join(_key_line(path) for path in chosen)
    tasks = [f"  {name:<11}{SUMMARIES[name]}" for name in TASKS]
    usage = _USAGE.format(readers=", ".join(MODEL_READERS))
    return "\n".join([usage, *tasks, "", listing(), "", "All keys with ranges and defaults: --help=all"])


def read(arguments: Sequence[str]) -> Request:
    """Turn arguments (without the program's name) into a request.

    Raises:
        ConfigError: Anything is wrong with flags, config file, overrides or their combination; all of it is listed.
    """
    flags, overrides, faults = _split(arguments)
    task = flags.get("task", "run")
    if task not in TASKS:
        faults.append(f"--task={task} is not a task. Known: {', '.join(TASKS)}.{did_you_mean(task, TASKS)}")
    try:
        values, run_name = _base_values(flags)
    except EarError as error:
        raise_faults([*faults, str(error)])
        raise
    is_training = task in TRAINING
    config = resolve(
        values,
        overrides,
        other_faults=faults,
        is_once=lambda path: not is_training or leaves()[path].metadata["is_asked"],
    )
    raise_faults(_refused(task, flags, [path for path, _ in overrides], config))
    return Request(config, task, flags.get("workdir") or f"runs/{run_name}", flags.get("model"))


def _refused(task: str, flags: Mapping[str, str], paths: Sequence[str], config: Config) -> list[str]:
    """Return why what was given has no effect on a task, or cannot be applied to the finished model that it uses."""
    from ear_jax.folders.model_folder import find  # as in `_base_values`

    what = {
        "evaluate": ("config.evaluate.images is scored without a model", config.evaluate.images),
        "bench": ("config.bench.what=compile compiles the configuration", config.bench.what == "compile"),
        "convert": ("config.convert.to=ear_jax makes a model", config.convert.to != "torch"),
    }.get(task, (f"--task={task} reads no model", task not in MODEL_READERS))
    ignored = []
    if what[1] and "model" in flags and "config" in flags:
        ignored = [
            f"--model={flags['model']}: {what[0]}, and --config brings the configuration. Leave one of them out."
        ]
    if task == "evaluate" and config.evaluate.images:
        return [*ignored, *refusals_of_images(paths, config)]
    if task == "stats":
        return [*ignored, *unmeasured(task, paths, config)]
    if task == "run":
        return [*ignored, *idle(paths, config)]
    if task not in USES or (task == "bench" and config.bench.what == "compile"):
        return ignored
    try:
        folder = find(flags.get("model") or flags.get("workdir") or "")
    except EarError:
        return []  # the task says so
    model = from_dict(_stored(folder / "config.json"))
    if "config" in flags and (note := set_aside(paths, config, model)):
        print(f"warning     {note}", flush=True)
    return list(refusals(task, paths, config, model))


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, str]], list[str]]:
    flags: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    faults: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            faults.append(f"{argument!r} is not a flag; flags are written --name=value. See --help.")
            continue
        is_override = name.startswith("config.")
        if not is_override and name not in _FLAGS:
            faults.append(f"--{name}: unknown flag.{_flag_hint(name)}")
            continue
        if not has_value:
            if not rest or rest[0].startswith("--"):
                faults.append(f"--{name} lacks its value; write --{name}=VALUE.")
                continue
            value = rest.pop(0)
        if is_override:
            overrides.append((name.removeprefix("config."), value))
        elif name in flags:
            faults.append(f"--{name}: given twice, as {flags[name]!r} and {value!r}; give it once.")
        elif not value:
            faults.append(f"--{name} is empty; write --{name}=VALUE.")
        else:
            flags[name] = value
    return flags, overrides, faults


def _flag_hint(name: str) -> str:
    known = leaves()
    if name in known:
        return f" Did you mean --config.{name}?"
    flags = [flag for flag in _FLAGS if difflib.SequenceMatcher(None, name, flag).ratio() > 0.7]
    near = [f"--{flag}" for flag in flags] or [f"--config.{path}" for path in closest_paths(name, known)]
    return f" Did you mean {' or '.join(near)}?" if near else f" Known: {', '.join(f'--{flag}' for flag in _FLAGS)}."


def _base_values(flags: Mapping[str, str]) -> tuple[Mapping[str, Any] | ConfigDict, str]:
    if "config" in flags:
        return load(flags["config"])
    if "model" in flags:
        # Reading only where the model is, not its weights, keeps this free of jax.
        from ear_jax.folders.model_folder import find, read_document

        folder = find(flags["model"])
        document = read_document(folder, is_checked=flags.get("task") != "seal")
        words = [
            part for part in Path(flags["model"]).resolve().parts if part not in ("model", "generator", "tokenizer")
        ]
        return document["config"], f"model_{words[-1] if words else 'root'}"
    if "workdir" in flags and (stored := Path(flags["workdir"]) / "config.json").is_file():
        return _stored(stored), Path(flags["workdir"]).name
    raise ConfigError(f"--config=RECIPE is missing. Try --config=lite_hybrid\n{listing()}")


def _stored(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); give --config=FILE instead.") from error
    values = document.get("config", document) if isinstance(document, dict) else None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no config; give --config=FILE instead.")
    return values


def _key_line(path: str) -> str:
    leaf = leaves()[path]
    default = f"({','.join(map(str, leaf.default))})" if isinstance(leaf.default, tuple) else repr(leaf.default)
    return f"--config.{path}={default}\n      {leaf.metadata['help']} [{describe_range(leaf)}]"
