"""Study A3: the dual branch, the head and its loss; quality against backbone passes and against milliseconds."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ear_jax.config.schema import Config
from ear_jax.inference import pipeline
from ear_jax.inference.pipeline import Pipeline

from . import report
from .arms import ABLATION, with_changes
from .judge import Judge
from .runs import each_seed, generator_run, image_ms, kept, latents_run

WANTED_GAIN = 0.15
WANTED_MS = 1.0
COLUMNS = {
    "fd": ("FD-classifier", ".2f"),
    "class_accuracy": ("class accuracy", ".1%"),
    "diversity": ("diversity / real", ".2f"),
    "ms": ("ms/image, median", ".2f"),
}
TOKENIZERS = {"lite_hybrid": {}, "lite_vae": {"tokenizer.name": "lite_vae"}}


def run(config: Config, root: Path, judge: Judge) -> dict[str, Any]:
    """Train the tokenizers once and every arm with every seed, sample each in its settings, write the report.

    The seeds are those of the generators; all of them stand on the same two tokenizers. Times are taken at the end.
    """
    for name, changes in TOKENIZERS.items():
        latents_run(with_changes(config, changes), root / "tokenizers" / name)
    rows: list[dict[str, Any]] = []
    timed: dict[str, tuple[Config, Path]] = {}
    result: dict[str, Any] = {}
    for arm, seed, own, folder in each_seed(config, root, ABLATION, config.study.seeds):
        own = with_changes(own, TOKENIZERS[arm.tokenizer])
        timed.setdefault(arm.name, (own, folder))
        source = root / "tokenizers" / arm.tokenizer

        def measure(own: Config = own, folder: Path = folder, source: Path = source, arm: str = arm.name) -> list:
            return _measure(generator_run(own, folder, source), own, judge, arm)

        for row in kept(folder, own, measure, judge.data_digest):
            rows.append({"arm": arm.name, "seed": seed, **row})
        result = _report(root, rows, judge, {})
    times = image_ms(root, config, config.sample.batch_size, lambda: _calls(timed))
    return _report(root, rows, judge, times) if rows else result


def settings(config: Config, arm: str) -> list[dict[str, Any]]:
    """Return how the models of an arm are sampled: passes a level, and inference temperatures."""
    base = {"guidance": config.sample.guidance_scale, "temperature": config.sample.temperature}
    passes = config.study.passes
    temperatures = (0.7, 0.85)
    if arm.startswith("fine_"):
        chosen = [{"steps": (n,), **base} for n in passes]
        cooler = [{"steps": (passes[len(passes) // 2],), **base, "temperature": value} for value in temperatures]
        return chosen + cooler if arm == "fine_only" else chosen
    usual = (config.generator.coarse.steps, config.generator.fine.steps)
    if arm != "hybrid":
        return [{"steps": usual, **base}]
    chosen = [(n, 1) for n in passes] + [(usual[0], n) for n in passes if n > 1]
    cooler = [{"steps": usual, **base, "temperature": value} for value in temperatures]
    return [*({"steps": steps, **base} for steps in dict.fromkeys(chosen)), *cooler]


def _measure(model: Pipeline, config: Config, judge: Judge, arm: str) -> list[dict[str, Any]]:
    labels = np.arange(config.study.samples) % len(model.class_names)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.generator_arrays)) / 1e6
    rows = []
    for chosen in settings(config, arm):
        options = _options(chosen, config)
        images = model.sample(labels, **options)
        rows.append(
            {
                "steps": _name(chosen),
                "passes": sum(chosen["steps"]),
                "temperature": chosen["temperature"],
                "fd": judge.distance(images),
                "class_accuracy": judge.class_accuracy(images, labels),
                "diversity": judge.diversity(images, labels),
                "parameters_M": parameters,
            }
        )
    return rows


def _calls(timed: dict[str, tuple[Config, Path]]) -> dict[str, Callable[[], Any]]:
    """Return what draws one batch with each arm's first seed, for every number of steps."""
    calls: dict[str, Callable[[], Any]] = {}
    for arm, (config, folder) in timed.items():
        model = pipeline.load(folder / "generator" / "model")
        labels = np.arange(config.sample.batch_size) % len(model.class_names)
        for chosen in settings(config, arm):
            options = _options(chosen, config)
            calls.setdefault(f"{arm} {_name(chosen)}", functools.partial(model.sample, labels, **options))
    return calls


def _options(chosen: dict[str, Any], config: Config) -> dict[str, Any]:
    return dict(
        steps=chosen["steps"],
        guidance_scale=chosen["guidance"],
        temperature=chosen["temperature"],
        seed=config.seed,
        batch_size=config.sample.batch_size,
    )


def _name(chosen: dict[str, Any]) -> str:
    return "+".join(map(str, chosen["steps"]))


def _report(root: Path, rows: list[dict[str, Any]], judge: Judge, times: dict[str, dict[str, float]]) -> dict[str, Any]:
    by = ("arm", "steps", "temperature")
    summary = report.summarise(rows, (*by, "passes"), (*COLUMNS, "parameters_M"))
    for line in summary:
        if found := times.get(f"{line['arm']} {line['steps']}"):
            line["ms"] = report.alone(found["median"])
    device = jax.local_devices()[0]
    slow = report.time_doubt(device.platform, jax.local_device_count())
    verdicts = _verdicts(summary, judge.doubt, slow)
    text = "\n\n".join(
        [
            "# A3: the dual branch, the head and its loss",
            f"Judge: classifier, accuracy on held-out images {judge.trust['accuracy_clean']:.1%}; Fréchet distance of "
            f"two halves of the held-out images {judge.floor:.2f}. Steps are coarse+fine backbone passes (fine alone "
            "where there is no coarse level). Mean ± standard deviation over seeds of the generator; times of the "
            "first seed's models taking turns.",
            report.table(summary, by, COLUMNS),
            "\n".join(f"- {verdict}" for verdict in verdicts),
        ]
    )
    result = {"rows": rows, "times": times, "summary": summary, "verdicts": verdicts, "judge": judge.trust}
    report.write(root, result, text + "\n")
    _plot(root / "study.png", summary)
    return result


def _verdicts(summary: list[dict[str, Any]], doubt: str = "", time_doubt: str = "") -> list[str]:
    hybrid, alone = _curve(summary, "hybrid"), _curve(summary, "fine_only")
    verdicts = []
    for passes in sorted({line["passes"] for line in alone}):
        fitting = [line for line in hybrid if line["passes"] <= passes]
        if fitting:
            best = min(fitting, key=lambda line: line["fd"]["mean"])
            theirs = min((line for line in alone if line["passes"] <= passes), key=lambda line: line["fd"]["mean"])
            name = f"dual branch against fine only, at most {passes} passes ({best['steps']} against {theirs['steps']})"
            verdicts.append(report.ratio_verdict(name, best["fd"], theirs["fd"], WANTED_GAIN, doubt=doubt))
    return verdicts + _fast_verdicts(hybrid, alone, doubt, time_doubt)


def _fast_verdicts(
    hybrid: list[dict[str, Any]], alone: list[dict[str, Any]], doubt: str = "", time_doubt: str = ""
) -> list[str]:
    """Say whether the dual branch gains among the settings below the wanted time."""
    hybrid, alone = ([line for line in side if "ms" in line] for side in (hybrid, alone))
    fast, theirs = ([line for line in side if line["ms"]["mean"] < WANTED_MS] for side in (hybrid, alone))
    limit = f"under {WANTED_MS:g} ms/image"
    if not hybrid or not alone:
        return []
    if time_doubt:
        return [f"dual branch {limit}: {report.unmeasurable(time_doubt)}"]
    if not fast:
        fastest = min(hybrid, key=lambda line: line["ms"]["mean"])
        taken = report.shown(fastest["ms"], ".2f")
        return [f"dual branch {limit}: its fastest setting ({fastest['steps']}) takes {taken}: **no**"]
    best = min(fast, key=lambda line: line["fd"]["mean"])
    if not theirs:
        return [f"dual branch {limit}: {best['steps']}, where fine only has no setting: **yes**"]
    other = min(theirs, key=lambda line: line["fd"]["mean"])
    name = f"dual branch against fine only, {limit} ({best['steps']} against {other['steps']})"
    return [report.ratio_verdict(name, best["fd"], other["fd"], WANTED_GAIN, doubt=doubt)]


def _curve(summary: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    # The usual temperature is the one most settings of the arm share.
    own = [line for line in summary if line["arm"] == arm]
    common = max({line["temperature"] for line in own}, key=[line["temperature"] for line in own].count, default=None)
    return [line for line in own if line["temperature"] == common]


def _plot(path: Path, summary: list[dict[str, Any]]) -> None:
    curves = [line for arm in dict.fromkeys(line["arm"] for line in summary) for line in _curve(summary, arm)]
    panels: dict[tuple[str, str, str], dict[str, list[tuple[float, float, float]]]] = {}
    for x, label in (("passes", "backbone passes"), ("ms", "ms an image")):
        series: dict[str, list[tuple[float, float, float]]] = {}
        for line in curves:
            at = line["passes"] if x == "passes" else line.get("ms", {}).get("mean")
            if at is None:
                continue
            name = line["arm"]
            if name == "hybrid":
                name = "hybrid, one fine pass" if line["steps"].endswith("+1") else "hybrid, more fine passes"
            series.setdefault(name, []).append((at, line["fd"]["mean"], line["fd"]["std"]))
        if series:
            panels[(f"quality against {label}", label, "FD-classifier")] = series
    report.lines(path, panels)
