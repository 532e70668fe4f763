"""Results of a study as mean and standard deviation over seeds, as Markdown and as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ear_jax.io.atomic import write_bytes

Row = Mapping[str, Any]


def summarise(rows: Sequence[Row], by: Sequence[str], values: Sequence[str]) -> list[dict[str, Any]]:
    """Group rows by some columns and give mean, standard deviation (n - 1) and count of the others.

    Groups keep the order in which they first appear; values that a group lacks are left out of it.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    summary = []
    for key, members in groups.items():
        line: dict[str, Any] = dict(zip(by, key, strict=True))
        for name in values:
            found = [float(row[name]) for row in members if row.get(name) is not None]
            if found:
                line[name] = _spread(found)
        summary.append(line)
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    return {"mean": mean, "std": spread, "seeds": len(values)}


def alone(value: float) -> dict[str, float]:
    """Return one number in the form that means and their spreads have."""
    return {"mean": value, "std": 0.0, "seeds": 1}


def table(summary: Sequence[Row], by: Sequence[str], columns: Mapping[str, tuple[str, str]]) -> str:
    """Return a Markdown table; `columns` maps a value's name to its heading and its number format.

    A value is printed as mean ± standard deviation, or as the mean alone where there is one seed.
    """
    lines = ["| " + " | ".join([*by, *(heading for heading, _ in columns.values())]) + " |"]
    lines.append("|" + "---|" * len(by) + "---:|" * len(columns))
    for line in summary:
        cells = [str(line[name]) for name in by]
        for name, (_, form) in columns.items():
            cells.append(shown(line.get(name), form))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value: Mapping[str, float] | None, form: str) -> str:
    """Return a mean with its spread as text."""
    if value is None:
        return "–"
    mean = format(value["mean"], form)
    return mean if value["seeds"] < 2 else f"{mean} ± {format(value['std'], form)}"


def write(folder: Path, result: Mapping[str, Any], markdown: str) -> None:
    """Write `study.json` and `study.md`."""
    write_bytes(folder / "study.json", (json.dumps(result, indent=1, default=str) + "\n").encode())
    write_bytes(folder / "study.md", markdown.encode())


def ratio_verdict(name: str, ours: Mapping[str, float], theirs: Mapping[str, float], wanted: float) -> str:
    """Say whether a distance fell by the wanted fraction, and by how much against the spread of the seeds.

    The spread is that of the ratio of two independent seeds, to first order.
    """
    if not theirs["mean"]:
        return f"{name}: the distance to compare with is 0; **not judged**"
    ratio = ours["mean"] / theirs["mean"]
    noise = math.hypot(ours["std"], ratio * theirs["std"]) / theirs["mean"]
    spread = f"± {noise:.1%} by the seeds" if min(ours["seeds"], theirs["seeds"]) > 1 else "one seed"
    verdict = "yes" if 1.0 - ratio >= wanted else "no"
    return f"{name}: {1.0 - ratio:+.1%} ({spread}); wanted at least {wanted:.0%}: **{verdict}**"
