"""Shortening a run with one key: the lengths that depend on it follow, and what they became is said.

Only keys that nobody gave on the command line follow; those given are held to `validate.py` as they are.
"""

from collections.abc import Collection
from typing import Any

from ear_jax.config.values import leaves

_PHASES = ("warmup", "final_phase")
_STARTS = ("tokenizer.hybrid_start_steps", "tokenizer.loss.adversarial_start_steps")
"""Where phases of the tokenizer's training begin, in its steps."""


def follow(before: dict[str, Any], after: dict[str, Any], given: Collection[str]) -> list[str]:
    """Change the lengths in `after` that hang on a length that was `given`, and return a line for each.

    A run that changes from epochs to steps, or back, loses the other; warm-up and last phase keep their share of the
    run where they are in the other unit or longer than it; a start beyond the end moves to the same share.

    Args:
        before: Values by dotted path as the recipe has them.
        after: The same with the overrides.
        given: Paths of the overrides.
    """
    lines: list[str] = []

    def value(values: dict[str, Any], path: str) -> Any:
        return values.get(path, leaves()[path].default)

    def change(path: str, new: float, why: str) -> None:
        lines.append(f"notice      config.{path}: {value(after, path):g} becomes {new:g}, {why}")
        after[path] = type(leaves()[path].default)(new)

    for group in ("tokenizer_training", "generator_training"):
        for unit, other in (("steps", "epochs"), ("epochs", "steps")):
            total, rest = f"{group}.{unit}", f"{group}.{other}"
            if total not in given or rest in given or not (length := value(after, total)):
                continue
            why = f"since config.{total}={length:g}"
            is_moved = bool(value(after, rest))
            whole = value(before, rest if is_moved else total)
            if is_moved:
                change(rest, 0, f"{why} is the length now")
            for phase in _PHASES:
                own, its_other = f"{group}.{phase}_{unit}", f"{group}.{phase}_{other}"
                if own in given or its_other in given:
                    continue
                source = its_other if is_moved and value(after, its_other) else own
                old = value(after, source)
                if not old or (source == own and old <= length):
                    continue
                share = min(1.0, value(before, source) / whole) if whole and (source == own) != is_moved else 0.1
                new = share * length if unit == "epochs" else max(1, int(share * length))
                if source != own:
                    change(source, 0, f"{why} sets the length in {unit}")
                change(own, new, f"{share:.0%} of the run, {why}")
            if group == "tokenizer_training" and unit == "steps":
                for path in _STARTS:
                    if path not in given and value(after, path) >= length:
                        share = value(before, path) / whole if whole and not is_moved else 0.5
                        change(path, int(min(share, 0.9) * length), f"{min(share, 0.9):.0%} of the run, {why}")
    return lines
