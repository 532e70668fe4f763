"""Study A1: what the split into coarse and fine tokens costs in fidelity, and what fusion does to it."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ear_jax.config.schema import Config
from ear_jax.inference.pipeline import Pipeline, load
from ear_jax.metrics.reconstruction import psnr, ssim
from ear_jax.nn.resize import to_signed
from ear_jax.types import Tokens

from . import report
from .arms import FIDELITY
from .judge import Judge, chunks
from .runs import each_seed, image_ms, kept, tokenizer_run

TIMED_BATCH = 32
ALLOWED_LOSS = 2.0
COLUMNS = {
    "rfd": ("rFD-classifier", ".2f"),
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "class_accuracy": ("class accuracy", ".1%"),
    "encode_ms": ("encode, ms/image, median", ".2f"),
    "decode_ms": ("decode, ms/image, median", ".2f"),
    "parameters_M": ("parameters, M", ".2f"),
}


def run(config: Config, root: Path, judge: Judge) -> dict[str, Any]:
    """Train and measure every arm with every seed; write the tables and the plot after each. Times come at the end."""
    rows: list[dict[str, Any]] = []
    timed: dict[str, tuple[Path, str]] = {}
    result: dict[str, Any] = {}
    for arm, seed, own, folder in each_seed(config, root, FIDELITY, config.study.seeds):
        timed.setdefault(arm.name, (folder, arm.decodes))

        def measure(own: Config = own, folder: Path = folder, decodes: str = arm.decodes) -> dict[str, float]:
            return _measure(tokenizer_run(own, folder), judge, decodes)

        rows.append({"arm": arm.name, "what": arm.what, "seed": seed, **kept(folder, own, measure, judge.data_digest)})
        result = _report(root, rows, judge, {})
    images = judge.images[:TIMED_BATCH]
    times = image_ms(root, config, len(images), lambda: _calls(timed, images))
    return _report(root, rows, judge, times) if rows else result


def _tokens(model: Pipeline, images: np.ndarray, decodes: str) -> Tokens:
    return Tokens(model.encode(images).levels[: None if decodes == "all" else -1])


def _calls(timed: dict[str, tuple[Path, str]], images: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return what encodes and decodes a batch with each arm's first seed."""
    calls: dict[str, Callable[[], Any]] = {}
    for arm, (folder, decodes) in timed.items():
        model = load(folder / "tokenizer" / "model")
        tokens = _tokens(model, images, decodes)
        calls[f"{arm} encode"] = functools.partial(model.encode, images)
        calls[f"{arm} decode"] = functools.partial(model.decode, tokens)
    return calls


def _measure(model: Pipeline, judge: Judge, decodes: str) -> dict[str, float]:
    parts = chunks(judge.images)
    decoded = [model.decode(_tokens(model, part, decodes)) for part in parts]
    floats = [(to_signed(a), to_signed(b)) for a, b in zip(decoded, parts, strict=True)]
    return {
        "rfd": judge.distance(np.concatenate(decoded)),
        "psnr": float(np.concatenate([np.asarray(psnr(a, b)) for a, b in floats]).mean()),
        "ssim": float(np.concatenate([np.asarray(ssim(a, b)) for a, b in floats]).mean()),
        "class_accuracy": judge.class_accuracy(np.concatenate(decoded), judge.labels),
        "parameters_M": sum(leaf.size for leaf in jax.tree.leaves(model.tokenizer_arrays)) / 1e6,
    }


def _report(root: Path, rows: list[dict[str, Any]], judge: Judge, times: dict[str, dict[str, float]]) -> dict[str, Any]:
    summary = report.summarise(rows, ("arm",), tuple(COLUMNS))
    for line in summary:
        for stage in ("encode", "decode"):
            if found := times.get(f"{line['arm']} {stage}"):
                line[f"{stage}_ms"] = report.alone(found["median"])
    by_arm = {line["arm"]: line for line in summary}
    verdicts = [
        f"Fréchet distance of two halves of the held-out images: {judge.floor:.2f}, what as few images that are no "
        "pairs score. Reconstructions are compared with their own originals, so a perfect tokenizer's rFD is 0."
    ]
    if {"lite_vae", "hybrid_mlp"} <= by_arm.keys():
        ours, plain = by_arm["hybrid_mlp"]["rfd"], by_arm["lite_vae"]["rfd"]
        gap, noise = ours["mean"] - plain["mean"], math.hypot(ours["std"], plain["std"])
        spread = f"± {noise:.2f} by the seeds" if min(ours["seeds"], plain["seeds"]) > 1 else "one seed"
        verdicts.append(
            f"rFD(Lite-Hybrid) - rFD(LiteVAE) = {gap:+.2f} ({spread}); wanted at most {ALLOWED_LOSS:g}: "
            + report.unmeasurable(
                "that limit is in units of FID, and this judge measures FD-classifier, which has others"
            )
        )
    text = "\n\n".join(
        [
            "# A1: fidelity of the tokenizer",
            f"Judge: classifier, accuracy on held-out images {judge.trust['accuracy_clean']:.1%}; "
            f"{len(judge.images)} held-out images. Mean ± standard deviation over seeds; times "
            f"of the first seed's models taking turns, batch {TIMED_BATCH}.",
            report.table(summary, ("arm",), COLUMNS),
            "\n".join(f"- {verdict}" for verdict in verdicts),
        ]
    )
    result = {"rows": rows, "summary": summary, "verdicts": verdicts, "judge": judge.trust, "times": times}
    report.write(root, result, text + "\n")
    panels = {
        COLUMNS[name][0]: [(line[name]["mean"], line[name]["std"]) for line in summary]
        for name in ("rfd", "psnr", "decode_ms")
        if all(name in line for line in summary)
    }
    report.dots(root / "study.png", [line["arm"] for line in summary], panels)
    return result
