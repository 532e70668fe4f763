"""Start a stage from another model's weights: what fits, or can be made to, is taken, and all of it is said."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ear_jax.config import kinds, read
from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError
from ear_jax.files import write_json
from ear_jax.folders import model_folder
from ear_jax.stages.fitting import LevelRows, inputs_of, rows_of_classes, same_latents
from ear_jax.stages.session import Session
from ear_jax.weights.tensor_file import open_tensors

_SHOWN = 8
_BY_NUMBER = "each class starts as the one of its number there"


@dataclasses.dataclass(frozen=True)
class Start:
    """Arrays that a stage starts with, by name, and the lines that say what became of every other one.

    Attributes:
        stage: tokenizer or generator.
        path: where the arrays are from.
        taken: what fits, in the dtype of the new model; rows that the other one does not know are masked.
        adapted: how those of them are that were not taken as they are.
        new: what only the new model has, or has in another shape, and why; it starts as it would alone.
        left: names that the other model has and the new one does not.
        notes: what else a user should know.
    """

    stage: str
    path: str
    taken: dict[str, np.ndarray]
    adapted: dict[str, str]
    new: dict[str, str]
    left: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def read(
        cls,
        stage: str,
        path: str,
        expected: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
        class_names: Sequence[str] = (),
        tokenizer: Mapping[str, np.ndarray] | None = None,
        per_class: Collection[str] = (),
        config: Config | None = None,
    ) -> "Start":
        """Compare the arrays of a model folder, a run or a file of tensors with those of the model to be trained.

        Args:
            stage: the part of the model folder that is read.
            path: the folder or the file, with our names.
            expected: shape and dtype of every array that may be taken.
            class_names: of the data; classes of the other model are found by name, and a note says which are others.
            tokenizer: that the generator is trained on; a note says where the other model's is another.
            per_class: names of arrays whose first rows are those of the classes.
            config: of a generator to be trained; rows of the other one's scales are found by it.

        Raises:
            ConfigError: there is no such model, its generator is of another kind or size, or nothing of it fits.
            DataError: the file is damaged.
        """
        other = _open(stage, path, class_names, tokenizer, config)
        found = other.arrays
        taken, adapted, new = {}, {}, {}
        levels = LevelRows(config, other.config) if config is not None and other.config is not None else None
        for name, (shape, dtype) in expected.items():
            rows, what = None, ""
            if name in other.unfit:
                new[name] = other.unfit[name]
                continue
            if name not in found:
                new[name] = "not in the other model"
                continue
            if name in per_class:
                rows = rows_of_classes(found[name], shape, other.class_names, class_names)
                what = "classes that are not in the other model"
            elif levels is not None and name in levels.names:
                rows, what = levels.of(name, found[name], shape), f"grids that it has not: {levels.missing()}"
                if rows is not None and not np.ma.getmaskarray(rows).all():
                    adapted[name] = f"{shape[0]} rows of {len(found[name])}, {levels.said()}"
            if rows is not None:
                if missing := sum(bool(row.any()) for row in np.ma.getmaskarray(rows)):
                    new[name] = f"{missing} of {shape[0]} rows, of {what}"
                if missing < shape[0]:
                    taken[name] = rows.astype(dtype)
            elif tuple(found[name].shape) != shape or (found[name].dtype.kind in "iub") != (dtype.kind in "iub"):
                new[name] = f"{tuple(found[name].shape)} there, {shape} here"
            else:
                taken[name] = np.asarray(found[name]).astype(dtype)
                if name in other.adapted:
                    adapted[name] = other.adapted[name]
        left = tuple(sorted(found.keys() - expected.keys()))
        if not taken:
            raise ConfigError(
                f"config.{stage}.start_from={path}: none of its {len(found)} arrays fits this {stage}, by name and "
                f"shape (there {', '.join(sorted(found)[:3])} …, here {', '.join(sorted(expected)[:3])} …). Expected a "
                "model of the same kind; published weights become one with --task=convert."
            )
        return cls(stage, path, taken, adapted, new, left, tuple(other.notes))

    def lines(self) -> list[str]:
        """Return the report, a line each."""
        values = sum(int(np.ma.count(array)) for array in self.taken.values())
        lines = [f"{len(self.taken)} arrays ({values:,} values) taken from {self.path}"]
        lines += [f"adapted: {name} ({how})" for name, how in self.adapted.items()]
        lines += [f"new: {name} ({reason})" for name, reason in list(self.new.items())[:_SHOWN]]
        if len(self.new) > _SHOWN:
            lines.append(f"new: {len(self.new) - _SHOWN} more")
        if self.left:
            more = " …" if len(self.left) > _SHOWN else ""
            lines.append(f"left there: {len(self.left)} arrays ({', '.join(self.left[:_SHOWN])}{more})")
        return [*lines, *self.notes]

    def record(self, session: Session) -> None:
        """Print the report, and keep the whole of it in the run as `<stage>/start_from.json` and in the ledger."""
        for line in self.lines():
            session.say(f"start       {line}")
        facts = {
            "path": self.path,
            "adapted": self.adapted,
            "new": self.new,
            "left": list(self.left),
            "notes": list(self.notes),
        }
        if session.is_first:
            record = session.workdir.stage(self.stage) / "start_from.json"
            write_json(record, {**facts, "taken": sorted(self.taken)})
        session.ledger.event("start_from", stage=self.stage, taken=len(self.taken), **facts)


@dataclasses.dataclass
class _Other:
    """The other model: what it holds under our names, and why some of that is no start, or is one in another form."""

    arrays: dict[str, np.ndarray]
    class_names: tuple[str, ...] = ()
    notes: list[str] = dataclasses.field(default_factory=list)
    config: Config | None = None
    adapted: dict[str, str] = dataclasses.field(default_factory=dict)
    unfit: dict[str, str] = dataclasses.field(default_factory=dict)


def _open(
    stage: str,
    path: str,
    class_names: Sequence[str],
    tokenizer: Mapping[str, np.ndarray] | None,
    config: Config | None,
) -> _Other:
    if Path(path).is_file():
        note = [f"it names no classes: {_BY_NUMBER}"] if class_names else []
        setting = "--task=convert --config.convert.weights"  # one key for one file; a start is as convert left it
        arrays = open_tensors(path, weights="auto", preferred=(), setting=setting).arrays
        if config is not None:
            note.append("it names no sizes: heads and scales are not compared (a model folder or run names them)")
        return _Other(dict(arrays), notes=note)
    with starting_from(stage, path):
        folder = model_folder.read(path)
    if stage not in folder.tensors:
        raise ConfigError(
            f"config.{stage}.start_from={path} holds no {stage}, only {', '.join(folder.tensors)}. Expected a model "
            f"folder, run or .safetensors with one."
        )
    other = _Other(dict(folder.tensors[stage]), folder.class_names)
    if class_names and folder.class_names != tuple(class_names):
        there, shared = folder.class_names, [name for name in class_names if name in folder.class_names]
        if shared:
            others = len(class_names) - len(shared)
            what = f"{len(shared)} of them start as those of the same name there ({', '.join(shared[:_SHOWN])}"
            what += f"{' …' if len(shared) > _SHOWN else ''})" + (f", {others} are new" if others else "")
        else:
            what = "classes are new" if len(there) != len(class_names) else _BY_NUMBER
        other.notes.append(
            f"the classes differ, {len(there)} there ({', '.join(there[:4])} …) and {len(class_names)} here "
            f"({', '.join(class_names[:4])} …): {what}"
        )
    theirs = folder.tensors.get("tokenizer", {})
    if config is not None:
        with starting_from(stage, path):
            other.config = comparable(config, folder.config_dict)
        _fit_head(other, config, other.config)
        if config.generator.backbone.name != other.config.generator.backbone.name:
            _fit_inputs(other, config, tokenizer or {}, theirs)
            return other
    if tokenizer is not None and not (
        theirs.keys() == tokenizer.keys() and all(np.array_equal(theirs[name], tokenizer[name]) for name in theirs)
    ):
        other.notes.append(
            "its tokenizer is another one than this run's: the generator has to learn new tokens "
            f"(config.tokenizer.source={path} takes that tokenizer too)"
        )
    return other


@contextlib.contextmanager
def starting_from(stage: str, path: str) -> Iterator[None]:
    """Name the model that a stage starts from in front of every ConfigError within."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"config.{stage}.start_from={path}: {error}") from error


def comparable(config: Config, other: Mapping[str, Any]) -> Config:
    """Return the configuration of another model; raises ConfigError where no generator can start from its."""
    there = read.from_dict(other)
    if fault := kinds.start_fault(config, there):
        raise ConfigError(fault)
    return there


def _fit_head(other: _Other, config: Config, there: Config) -> None:
    """Leave out a head of another kind: some of its arrays have our names and shapes, and mean something else."""
    old, new = there.generator.continuous_head, config.generator.continuous_head
    if old == new:
        return
    for number, level in enumerate(kinds.levels(there)):
        if level.kind == "continuous":
            own = [name for name in other.arrays if name.startswith(f"heads/{number}/")]
            other.unfit |= dict.fromkeys(own, f"of the {new} head; a {old} head there")


def _fit_inputs(
    other: _Other, config: Config, tokenizer: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> None:
    """Let what embeds another kind's latents embed our tokens, or leave it out where the latents are others."""
    layer = kinds.kind_of(config).inputs
    kernel, bias = f"{layer}/kernel", f"{layer}/bias"
    if not same_latents(tokenizer, theirs):
        other.unfit |= dict.fromkeys((kernel, bias), "its latents are not those of this run's tokenizer")
        return
    channels = 1 + len(other.arrays[kernel])  # the share that is left of a noisy scale
    fitted = inputs_of(other.arrays[kernel], other.arrays[bias], channels, tokenizer)
    other.arrays |= dict(zip((kernel, bias), fitted, strict=True))
    other.adapted |= {
        kernel: "its latents are tokens at unit scale here; no effect yet of the noise level",
        bias: "its latents are tokens at unit scale here",
    }
    if config.generator.pyramid.targets == "absolute":
        other.notes.append(
            "config.generator.pyramid.targets=absolute shows the trunk each scale at unit scale, where it has seen "
            "running sums; residual shows it those"
        )
