"""Start a stage from another model's weights: what fits by name and shape is taken, and all of it is said."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ear_jax.errors import ConfigError
from ear_jax.files import write_json
from ear_jax.folders import model_folder
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
        taken: what fits, in the dtype of the new model; rows of classes that the other one does not know are masked.
        new: what only the new model has, or has in another shape, and why; it starts as it would alone.
        left: names that the other model has and the new one does not.
        notes: what else a user should know.
    """

    stage: str
    path: str
    taken: dict[str, np.ndarray]
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
    ) -> "Start":
        """Compare the arrays of a model folder, a run or a file of tensors with those of the model to be trained.

        Args:
            stage: the part of the model folder that is read.
            path: the folder or the file, with our names.
            expected: shape and dtype of every array that may be taken.
            class_names: of the data; classes of the other model are found by name, and a note says which are others.
            tokenizer: that the generator is trained on; a note says where the other model's is another.
            per_class: names of arrays whose first rows are those of the classes.

        Raises:
            ConfigError: there is no such model, or nothing of it fits.
            DataError: the file is damaged.
        """
        found, there, notes = _open(stage, path, class_names, tokenizer)
        taken, new = {}, {}
        for name, (shape, dtype) in expected.items():
            rows = _rows(found[name], shape, there, class_names) if name in found and name in per_class else None
            if name not in found:
                new[name] = "not in the other model"
            elif rows is not None:
                if missing := sum(bool(row.any()) for row in np.ma.getmaskarray(rows)):
                    new[name] = f"{missing} of {shape[0]} rows, of classes that are not in the other model"
                if missing < shape[0]:
                    taken[name] = rows.astype(dtype)
            elif tuple(found[name].shape) != shape or (found[name].dtype.kind in "iub") != (dtype.kind in "iub"):
                new[name] = f"{tuple(found[name].shape)} there, {shape} here"
            else:
                taken[name] = np.asarray(found[name]).astype(dtype)
        left = tuple(sorted(found.keys() - expected.keys()))
        if not taken:
            raise ConfigError(
                f"config.{stage}.start_from={path}: none of its {len(found)} arrays fits this {stage}, by name and "
                f"shape (there {', '.join(sorted(found)[:3])} …, here {', '.join(sorted(expected)[:3])} …). Expected a "
                "model of the same kind; published weights become one with --task=convert."
            )
        return cls(stage, path, taken, new, left, tuple(notes))

    def lines(self) -> list[str]:
        """Return the report, a line each."""
        values = sum(int(np.ma.count(array)) for array in self.taken.values())
        lines = [f"{len(self.taken)} arrays ({values:,} values) taken from {self.path}"]
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
        facts = {"path": self.path, "new": self.new, "left": list(self.left), "notes": list(self.notes)}
        if session.is_first:
            record = session.workdir.stage(self.stage) / "start_from.json"
            write_json(record, {**facts, "taken": sorted(self.taken)})
        session.ledger.event("start_from", stage=self.stage, taken=len(self.taken), **facts)


def _open(
    stage: str, path: str, class_names: Sequence[str], tokenizer: Mapping[str, np.ndarray] | None
) -> tuple[Mapping[str, np.ndarray], tuple[str, ...], list[str]]:
    """Return arrays, names of classes, and notes."""
    if Path(path).is_file():
        note = [f"it names no classes: {_BY_NUMBER}"] if class_names else []
        setting = "--task=convert --config.convert.weights"  # one key for one file; a start is as convert left it
        return open_tensors(path, weights="auto", preferred=(), setting=setting).arrays, (), note
    try:
        folder = model_folder.read(path)
    except ConfigError as error:
        raise ConfigError(f"config.{stage}.start_from={path}: {error}") from error
    if stage not in folder.tensors:
        raise ConfigError(
            f"config.{stage}.start_from={path} holds no {stage}, only {', '.join(folder.tensors)}. Expected a model "
            f"folder, run or .safetensors with one."
        )
    notes = []
    if class_names and folder.class_names != tuple(class_names):
        there, shared = folder.class_names, [name for name in class_names if name in folder.class_names]
        if shared:
            others = len(class_names) - len(shared)
            what = f"{len(shared)} of them start as those of the same name there ({', '.join(shared[:_SHOWN])}"
            what += f"{' …' if len(shared) > _SHOWN else ''})" + (f", {others} are new" if others else "")
        else:
            what = "classes are new" if len(there) != len(class_names) else _BY_NUMBER
        notes.append(
            f"the classes differ, {len(there)} there ({', '.join(there[:4])} …) and {len(class_names)} here "
            f"({', '.join(class_names[:4])} …): {what}"
        )
    theirs = folder.tensors.get("tokenizer", {})
    if tokenizer is not None and not (
        theirs.keys() == tokenizer.keys() and all(np.array_equal(theirs[name], tokenizer[name]) for name in theirs)
    ):
        notes.append(
            "its tokenizer is another one than this run's: the generator has to learn new tokens "
            f"(config.tokenizer.source={path} takes that tokenizer too)"
        )
    return folder.tensors[stage], folder.class_names, notes


def _rows(
    array: np.ndarray, shape: tuple[int, ...], there: Sequence[str], here: Sequence[str]
) -> np.ma.MaskedArray[Any, Any] | None:
    """Return an array with a row a class in the order `here`, masked where `there` lacks one; None to compare shapes.

    Rows behind those of the classes, such as that of images without one, stay behind them.
    """
    behind = shape[0] - len(here)
    if not there or behind < 0 or array.shape != (len(there) + behind, *shape[1:]):
        return None
    found = {name: number for number, name in enumerate(there)}
    if len(there) == len(here) and not found.keys() & set(here):
        return None  # other names for all of them: by number
    numbers = [*(found.get(name, -1) for name in here), *range(len(there), len(there) + behind)]
    mask = np.zeros(shape, bool)
    mask[[number < 0 for number in numbers]] = True
    return np.ma.masked_array(array[numbers], mask)
