"""Study A2: milliseconds from label to image and from image to image, whole and stage by stage, all stages real."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ear_jax.bench.plausibility import ROUNDING_LEVELS, cpu_flops_bound, roofline_faults
from ear_jax.bench.stages import IMAGE_TO_IMAGE, LABEL_TO_IMAGE, PipelineStages
from ear_jax.bench.timing import time_stages
from ear_jax.config import derive
from ear_jax.config.kinds import sampling_of
from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError
from ear_jax.files import digest_of
from ear_jax.folders import model_folder
from ear_jax.inference import pipeline
from ear_jax.inference.pipeline import Pipeline
from ear_jax.training.report import peak_flops_per_s
from ear_jax.types import TokenizerSpec

from . import report
from .runs import kept

BATCHES = (1, 4, 16)
JUDGED_BATCH = 4
WANTED_MS = 12.0
ADDS_UP = (0.8, 1.25)
"""Sum of the stages over the whole: outside of it, something is timed twice or not at all."""

SUM, WHOLE = "sum of the stages", "whole"
BY = ("batch", "path", "stage")
COLUMNS = {
    "ms": ("ms/image", ".2f"),
    "call_ms": ("ms a call", ".2f"),
    "share": ("of the whole", ".0%"),
    "gflop": ("GFLOP/image", ".3g"),
    "utilisation": ("of the peak", ".1%"),
}


def run(config: Config, root: Path, model: str | None) -> dict[str, Any]:
    """Time a trained model at several batch sizes and write the table, the plot and the verdicts; trains nothing.

    Each seed is a round of its own, with other images: the spread of a time is that over rounds of its median.

    Raises:
        ConfigError: there is no model, it cannot sample, or its levels are not those of the configuration.
    """
    loaded, weights = _open(config, model or str(root))
    device = jax.local_devices()[0]
    conditions = digest_of(weights, device.device_kind, jax.local_device_count(), jax.__version__)
    protocol = _protocol(loaded, config, weights)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for batch in BATCHES:
        print(f"study       batch {batch} of {', '.join(map(str, BATCHES))}", flush=True)
        folder = root / "timings" / conditions / f"batch{batch}"
        rows += kept(folder, config, lambda batch=batch: _measure(loaded, config, batch))
        result = _report(root, rows, protocol)
    return result


def _open(config: Config, place: str) -> tuple[Pipeline, str]:
    advice = (
        "Give a trained one with --model=DIR, for example --model=runs/demo after `python -m ear_jax.main "
        "--config=configs/lite_hybrid.py --workdir=runs/demo`."
    )
    try:
        folder = model_folder.find(place)
    except ConfigError as error:
        raise ConfigError(f"the study end_to_end times a trained model, and {error} {advice}") from error
    loaded = pipeline.load(folder)
    if not loaded.has_generator:
        raise ConfigError(f"{folder} holds a tokenizer only; the study end_to_end times a whole model. {advice}")
    wanted = TokenizerSpec(config.data.image_px, derive.tokenizer_levels(config))
    if wanted != loaded.spec or config.generator.backbone.name != loaded.config.generator.backbone.name:
        own, theirs = _described(wanted), _described(loaded.spec)
        raise ConfigError(
            f"config describes {own}, but {folder} has {theirs}: passes and guidance of another model would "
            "be timed. Leave --config out and write --config.study.name=end_to_end: then the model brings its own."
        )
    return loaded, digest_of((folder / "config.json").read_bytes())  # holds the hashes of the weights


def _described(spec: TokenizerSpec) -> str:
    levels = ", ".join(f"{level.name} {level.tokens} x {level.size}" for level in spec.levels)
    return f"{spec.image_px} px as ({levels})"


def _measure(loaded: Pipeline, config: Config, batch: int) -> list[dict[str, Any]]:
    made = PipelineStages(loaded, sampling_of(config))
    labels = np.arange(batch) % len(loaded.class_names)
    rows = []
    for seed in config.study.seeds:
        images = made.sample(labels, seed)
        gap = np.abs(images.astype(int) - made.draw(labels, seed).images)
        parts = {
            LABEL_TO_IMAGE: made.of_generation(labels, seed),
            IMAGE_TO_IMAGE: made.of_round_trip(images),
        }
        calls = {(path, name): stage.call for path, stages in parts.items() for name, stage in stages.items()}
        calls[LABEL_TO_IMAGE, WHOLE] = lambda seed=seed: made.sample(labels, seed)
        calls[IMAGE_TO_IMAGE, WHOLE] = lambda images=images: loaded.decode(loaded.encode(images))
        names = {f"{path}: {name}": (path, name) for path, name in calls}
        timings = time_stages(
            {name: calls[key] for name, key in names.items()},
            warmup_repeats=config.bench.warmup_repeats,
            repeats=config.bench.repeats,
        )
        median = {names[timing.name]: timing.median_ms for timing in timings}
        flops = {(path, name): stage.flops for path, stages in parts.items() for name, stage in stages.items()}
        for path, stages in parts.items():
            median[path, SUM] = sum(median[path, name] for name in stages)
            flops[path, SUM] = flops[path, WHOLE] = sum(stage.flops for stage in stages.values())
        others = int((gap > ROUNDING_LEVELS).any((1, 2, 3)).sum())
        rows += [_row(batch, seed, path, name, median, flops) | {"other_images": others} for path, name in median]
    return rows


def _row(
    batch: int,
    seed: int,
    path: str,
    name: str,
    median: dict[tuple[str, str], float],
    flops: dict[tuple[str, str], float],
) -> dict[str, Any]:
    row = {
        "batch": batch,
        "seed": seed,
        "path": path,
        "stage": name,
        "ms": median[path, name] / batch,
        "call_ms": median[path, name],
        "share": median[path, name] / median[path, WHOLE],
        "gflop": flops[path, name] / batch / 1e9,
    }
    peak = _known_peak()
    return row if peak is None else row | {"utilisation": flops[path, name] / (1e-3 * median[path, name]) / peak}


def _report(root: Path, rows: list[dict[str, Any]], protocol: dict[str, Any]) -> dict[str, Any]:
    order = {key: number for number, key in enumerate(dict.fromkeys((r["batch"], r["path"]) for r in rows))}
    ranks = {SUM: 1, WHOLE: 2}
    ordered = sorted(rows, key=lambda row: (order[row["batch"], row["path"]], ranks.get(row["stage"], 0)))
    summary = report.summarise(ordered, BY, tuple(COLUMNS))
    for line in summary:
        line["gflop"] |= {"std": 0.0, "seeds": 1}  # counted, not measured
    verdicts = _verdicts(summary, rows, protocol)
    columns = {name: heading for name, heading in COLUMNS.items() if any(name in line for line in summary)}
    text = "\n\n".join(
        [
            "# A2: end to end",
            f"{protocol['model']} at {protocol['image_px']} px ({protocol['parameters_M']:.1f} M parameters, "
            f"{protocol['compute_dtype']}) on {protocol['devices']}; {protocol['passes']} passes, guidance "
            f"{protocol['guidance_scale']:g}. Medians of {protocol['repeats']} calls, mean ± standard deviation over "
            f"{protocol['rounds']} rounds. A call is from host labels or images to host images; compilation is not in "
            "it.",
            report.table(summary, BY, columns),
            "\n".join(f"- {verdict}" for verdict in verdicts),
        ]
    )
    result = {"rows": rows, "summary": summary, "verdicts": verdicts, "protocol": protocol}
    report.write(root, result, text + "\n")
    panels: dict[tuple[str, str, str], dict[str, list[tuple[float, float, float]]]] = {}
    for line in summary:
        series = panels.setdefault((line["path"], "images a call", "ms an image"), {})
        series.setdefault(line["stage"], []).append((line["batch"], line["ms"]["mean"], line["ms"]["std"]))
    report.lines(root / "study.png", panels)
    return result


def _verdicts(summary: list[dict[str, Any]], rows: list[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    lines = {(line["batch"], line["path"], line["stage"]): line for line in summary}
    verdicts = []
    if (judged := lines.get((JUDGED_BATCH, LABEL_TO_IMAGE, WHOLE))) is not None:
        said = f"{LABEL_TO_IMAGE} at batch {JUDGED_BATCH}: {report.shown(judged['ms'], '.2f')} ms/image"
        verdicts.append(f"{said}; wanted at most {WANTED_MS:g}: {_judgement(judged['ms']['mean'], protocol)}")
    for (batch, path, stage), line in lines.items():
        if stage == SUM:
            share = line["share"]["mean"]
            answer = "they add up" if ADDS_UP[0] <= share <= ADDS_UP[1] else "they do not add up"
            verdicts.append(f"{path} at batch {batch}: the stages sum to {share:.0%} of the whole; **{answer}**")
    drawn = {(row["batch"], row["seed"]): row["other_images"] for row in rows}
    others, images = sum(drawn.values()), sum(batch for batch, _ in drawn)
    verdicts.append(f"images of the stages one after the other that differ from the whole's: {others} of {images}")
    seconds, flops = {}, {}
    for (batch, path, stage), line in lines.items():
        name = f"{path}, {stage}, batch {batch}"
        seconds[name], flops[name] = line["call_ms"]["mean"] / 1e3, line["gflop"]["mean"] * batch * 1e9
    faults = roofline_faults(seconds, flops, protocol["bound_flops_per_s"])
    verdicts += [f"impossible: {fault}" for fault in faults] or ["no stage is faster than its roofline"]
    return verdicts


def _judgement(ms: float, protocol: dict[str, Any]) -> str:
    doubt = report.time_doubt(protocol["platform"], protocol["device_count"])
    return report.unmeasurable(doubt) if doubt else "**yes**" if ms <= WANTED_MS else "**no**"


def _protocol(loaded: Pipeline, config: Config, weights: str) -> dict[str, Any]:
    device, count, own = jax.local_devices()[0], jax.local_device_count(), config.sample
    dtype = loaded.config.generator_training.compute_dtype
    bound = cpu_flops_bound(dtype) if device.platform == "cpu" else _known_peak() or float("inf")
    passes = zip(loaded.levels, sampling_of(config).steps, strict=True)
    return {
        "model": loaded.config.name,
        "weights": weights,
        "image_px": loaded.spec.image_px,
        "parameters_M": loaded.parameters / 1e6,
        "compute_dtype": dtype,
        "platform": device.platform,
        "devices": f"{count} x {device.device_kind}",
        "device_count": count,
        "bound_flops_per_s": bound,
        "passes": ", ".join(f"{level.name} in {steps}" for level, steps in passes),
        "guidance_scale": own.guidance_scale,
        "temperature": own.temperature,
        "coarse_temperature": own.coarse_temperature,
        "warmup_repeats": config.bench.warmup_repeats,
        "repeats": config.bench.repeats,
        "rounds": len(config.study.seeds),
        "jax": jax.__version__,
    }


def _known_peak() -> float | None:
    """Return the bfloat16 peak of this process's devices together, or None where it is not known."""
    one = peak_flops_per_s(jax.local_devices()[0].device_kind)
    return None if one is None else one * jax.local_device_count()
