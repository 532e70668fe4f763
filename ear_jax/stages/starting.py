"""Start a stage from another model's weights: what fits by name and shape is taken, and all of it is said."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ear_jax.errors import ConfigError
from ear_jax.files import write_json
from ear_jax.folders import model_folder
from ear_jax.stages.session import Session
from ear_jax.weights.tensor_file import open_tensors

_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Start:
    """Arrays that a stage starts with, by name, and the lines that say what became of every other one.

    Attributes:
        stage: tokenizer or generator.
        path: where the arrays are from.
        taken: what fits, in the dtype of the new model.
        new: names that only the new model has, or that have another shape there; they start as they would alone.
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
    ) -> "Start":
        """Compare the arrays of a model folder, a run or a file of tensors with those of the model to be trained.

        Args:
            stage: the part of the model folder that is read.
            path: the folder or the file, with our names.
            expected: shape and dtype of every array that may be taken.
            class_names: of the data; a note says where the other model's are others.
            tokenizer: that the generator is trained on; a note says where the other model's is another.

        Raises:
            ConfigError: there is no such model, or nothing of it fits.
            DataError: the file is damaged.
        """
        found, notes = _open(stage, path, class_names, tokenizer)
        taken, new = {}, {}
        for name, (shape, dtype) in expected.items():
            if name not in found:
                new[name] = "not in the other model"
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
        values = sum(array.size for array in self.taken.values())
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
) -> tuple[Mapping[str, np.ndarray], list[str]]:
    if Path(path).is_file():
        return open_tensors(path, weights="auto", preferred=()).arrays, []
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
        count = (len(folder.class_names), len(class_names))
        what = "classes are new" if count[0] != count[1] else "each class starts as the one of its number there"
        notes.append(
            f"the classes differ, {count[0]} there ({', '.join(folder.class_names[:4])} …) and {count[1]} here "
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
    return folder.tensors[stage], notes
