"""Did-you-mean: the nearest known names to a name that is not known, also when it lives in another group."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from ear_jax.sampling import as_integer

# Names other projects use for keys that are spelled out here.
_ALIASES = {
    "bs": "batch_size",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "dataset": "source",
    "ema": "ema_decay",
    "grad_clip": "clip_norm",
    "image_size": "image_px",
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "num_images": "count",
    "num_steps": "steps",
    "resolution": "image_px",
    "tau": "temperature",
    "vocab_size": "codes",
    "wd": "weight_decay",
}
_MINIMUM_SCORE = 0.62
_MARGIN = 0.05


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that names the nearest of the `known` words, with a space in front; or nothing."""
    by_folded = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_folded, n=1, cutoff=_MINIMUM_SCORE)
    return f" Did you mean {by_folded[matches[0]]!r}?" if matches else ""


def class_label_faults(labels: Sequence[Any], class_names: Sequence[str]) -> str:
    """Return what is wrong with asked classes (ids, or names), with the nearest name of each wrong one; or nothing."""
    known, wrong = set(class_names), []
    for label in labels:
        number = None if isinstance(label, str) else as_integer(label)
        if label not in known if isinstance(label, str) else number is None or not 0 <= number < len(class_names):
            wrong.append(label)
    if not wrong:
        return ""
    hints = "".join(did_you_mean(label, class_names) for label in wrong[:10] if isinstance(label, str))
    names = ", ".join(f"{index} {name}" for index, name in enumerate(class_names[:12]))
    return (
        f"labels {', '.join(map(repr, wrong[:10]))} are not classes of this model or data.{hints} Expected ids 0 to "
        f"{len(class_names) - 1} or names: {names}{' …' if len(class_names) > 12 else ''}."
    )


def doubtful_ids(labels: Sequence[int | str], class_names: Sequence[str]) -> str:
    """Return which id, as a command line writes it, is another class's name too, and how to say which; or nothing."""
    for label in labels:
        if isinstance(label, int) and str(label) in class_names and class_names[label : label + 1] != (str(label),):
            own = class_names[label] if 0 <= label < len(class_names) else "none"
            return (
                f"{label} is the id of class {own!r} and the name of class {class_names.index(str(label))}. Write "
                f"names in quotes: --config.sample.labels='\"{label}\"'"
                + (f", or '\"{own}\"' for the other." if 0 <= label < len(class_names) else ".")
            )
    return ""


def closest_paths(path: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` known dotted paths nearest to `path`, best first.

    The last word counts more than the groups in front of it, so that a key in the wrong group is found.
    """
    group, _, word = path.lower().rpartition(".")
    word = _ALIASES.get(word, word)
    scored = []
    for candidate in known:
        other_group, _, other_word = candidate.lower().rpartition(".")
        likeness = 0.65 * _ratio(word, other_word) + 0.35 * _ratio(group, other_group)
        if _ratio(word, other_word) >= _MINIMUM_SCORE:
            scored.append((likeness, candidate))
    scored.sort(key=lambda pair: (-pair[0], pair[1]))
    return [candidate for likeness, candidate in scored[:count] if likeness >= scored[0][0] - _MARGIN]


def _ratio(left: str, right: str) -> float:
    if left == right:
        return 1.0
    return difflib.SequenceMatcher(None, left, right, autojunk=False).ratio()
