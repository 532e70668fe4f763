"""Results of a study as mean and standard deviation over seeds, as Markdown and as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ear_jax.errors import ConfigError
from ear_jax.files import write_bytes

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


def unmeasurable(why: str) -> str:
    """Return the verdict of a criterion that what was measured has no right to judge."""
    return f"**not measurable here, because {why}**"


def time_doubt(platform: str, device_count: int) -> str:
    """Return why a time on this device cannot be held against a limit in ms, which is about one accelerator, or ""."""
    if platform == "cpu":
        return "there is no accelerator"
    return f"{device_count} devices share a batch and the claim is about one" if device_count > 1 else ""


def ratio_verdict(
    name: str, ours: Mapping[str, float], theirs: Mapping[str, float], wanted: float, *, doubt: str = ""
) -> str:
    """Say whether a distance fell by the wanted fraction, and by how much against the spread of the seeds.

    The spread is that of the ratio of two independent seeds, to first order. One seed, a gain that is nearer to the
    wanted one than the spread, or a `doubt` about the judge allow no answer.
    """
    if not theirs["mean"]:
        return f"{name}: the distance to compare with is 0; " + unmeasurable("nothing can be below it")
    ratio = ours["mean"] / theirs["mean"]
    noise = math.hypot(ours["std"], ratio * theirs["std"]) / theirs["mean"]
    spread = f"± {noise:.1%} by the seeds" if min(ours["seeds"], theirs["seeds"]) > 1 else "one seed"
    said = f"{name}: {1.0 - ratio:+.1%} ({spread}); wanted at least {wanted:.0%}: "
    if min(ours["seeds"], theirs["seeds"]) < 2:
        doubt = doubt or "one seed has no spread"
    elif abs(1.0 - ratio - wanted) < noise:
        doubt = doubt or "the gain is nearer to the wanted one than the seeds are to each other"
    return said + (unmeasurable(doubt) if doubt else "**yes**" if 1.0 - ratio >= wanted else "**no**")


Series = Mapping[str, Sequence[tuple[float, float, float]]]
"""Points (x, mean, standard deviation) by the name of a line."""


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'ear_jax[study]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def dots(path: Path, names: Sequence[str], panels: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write one panel a title with a dot and its error bar a name: panel title -> (mean, standard deviation) a name.

    Dots, because bars must begin at 0, which hides small differences of large numbers.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1.2 + 3.4 * len(panels), 3.6), squeeze=False)
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        means, spreads = zip(*values, strict=True)
        axis.errorbar(means, range(len(names)), xerr=spreads, fmt="o", color="#4c72b0", ecolor="#333333", capsize=3)
        axis.set_yticks(range(len(names)), names if axis is axes[0][0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.margins(x=0.15)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def lines(path: Path, panels: Mapping[tuple[str, str, str], Series]) -> None:
    """Write one panel a (title, x label, y label), each with its lines and error bars; x is logarithmic.

    A name has one colour in all panels, and one legend stands beside them, where it hides nothing.
    """
    pyplot = _pyplot()
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1.8 + 4.4 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    drawn: dict[str, Any] = {}
    for axis, ((title, x_label, y_label), series) in zip(axes[0], panels.items(), strict=True):
        for name, points in series.items():
            x, mean, spread = zip(*sorted(points), strict=True)
            color = f"C{names.index(name)}"
            drawn[name] = axis.errorbar(x, mean, yerr=spread, color=color, marker="o", markersize=4, capsize=2)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
    figure.legend([drawn[name] for name in names], names, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
