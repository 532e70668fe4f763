"""Checks of the figures that a run has written down: its utilisation, and whether its accuracies add up."""

import math
from pathlib import Path

from ear_jax.bench import plausibility
from ear_jax.check.checklist import Outcome
from ear_jax.files import read_json
from ear_jax.training import ledger


def utilisation_is_possible(path: Path) -> Outcome:
    """Look at every model FLOPs utilisation in a ledger, and at the losses beside it."""
    recorded, faults, count = {}, [], 0
    for record in ledger.read(path):
        if record.get("event") != "metrics":
            continue
        count += 1
        where = f"{record.get('stage')} step {record.get('step')}"
        if "mfu" in record:
            recorded[where] = float(record["mfu"])
        if record.get("images_per_s", 1.0) <= 0 or not math.isfinite(record.get("images_per_s", 1.0)):
            faults.append(f"{where}: {record['images_per_s']} images/s.")
    faults += plausibility.utilisation_faults(recorded)
    most = f"at most {max(recorded.values()):.1%}" if recorded else "none is known for this device"
    return Outcome(f"{count} records, utilisation {most}", faults)


def accuracies_add_up(path: Path) -> Outcome:
    """Look at the class accuracies of an evaluation: fractions, whose mean over the samples is that of the whole."""
    result = read_json(path) or {}
    by_class, whole = result.get("class_accuracy_by_class"), result.get("class_accuracy_samples")
    samples = result.get("protocol", {}).get("samples")
    if not by_class or whole is None or not samples:
        return Outcome("no accuracies by class in it")
    # Samples are drawn of all classes in turn.
    counts = {name: len(range(number, samples, len(by_class))) for number, name in enumerate(by_class)}
    faults = plausibility.accuracy_faults("class accuracy of samples", by_class, counts, whole)
    faults += [
        f"{name} is {value}."
        for name, value in result.get("scores", {}).items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    return Outcome(f"accuracy {whole:.1%} of {samples} samples, {len(by_class)} classes", faults)
