"""Plots of studies; matplotlib is an extra and is imported only here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ear_jax.errors import ConfigError

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


def bars(path: Path, names: Sequence[str], panels: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write one bar chart a panel, with error bars: panel title -> (mean, standard deviation) a name."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1.2 + 3.4 * len(panels), 3.6), squeeze=False)
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        means, spreads = zip(*values, strict=True)
        axis.barh(range(len(names)), means, xerr=spreads, color="#4c72b0", ecolor="#333333", capsize=2)
        axis.set_yticks(range(len(names)), names if axis is axes[0][0] else [""] * len(names))
        axis.invert_yaxis()
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
