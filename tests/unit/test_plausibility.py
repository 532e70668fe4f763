"""Every detector of impossible figures: silent on what is sound, outspoken on a planted fault."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from ear_jax.bench import plausibility
from ear_jax.check.checklist import Checklist, Outcome, accuracies_add_up, utilisation_is_possible
from ear_jax.errors import DataError
from ear_jax.levels import LevelSpec, TokenizerSpec
from ear_jax.training.ledger import Ledger

SPEC = TokenizerSpec(8, (LevelSpec("coarse", 2, "discrete", 8), LevelSpec("fine", 4, "continuous", 3)))


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(("value", "is_possible"), [(0.55, True), (1.0, True), (1.3, False), (0.0, False)])
def test_utilisation_is_a_fraction_of_the_peak(value, is_possible):
    faults = plausibility.utilisation_faults({"generator step 3": value})
    assert (not faults) == is_possible
    assert is_possible or f"generator step 3: model FLOPs utilisation {value:.1%}" in faults[0]


def test_no_stage_is_faster_than_its_roofline():
    flops = {"fine": 2e9, "decode": 1e9}
    assert not plausibility.roofline_faults({"fine": 0.002, "decode": 0.002}, flops, 1e12)
    (fault,) = plausibility.roofline_faults({"fine": 0.0019, "decode": 0.002}, flops, 1e12)
    assert fault.startswith("fine: 1.9 ms for 2 GFLOP; at 1 TFLOP/s it needs at least 2 ms")
    assert len(plausibility.roofline_faults({"fine": 0.0, "decode": float("nan")}, flops, float("inf"))) == 2


def test_a_whole_is_not_shorter_than_what_it_holds():
    assert not plausibility.whole_faults({"fine": 9.0, "decode": 1.0}, 5.0, name="label to image")
    (fault,) = plausibility.whole_faults({"fine": 9.0, "decode": 1.0}, 4.0, name="label to image")
    assert fault == "label to image took 4 ms, but fine, which it holds, 9 ms by itself."


def test_a_processor_bound_is_beyond_any_processor():
    assert plausibility.cpu_flops_bound("float32", 2) == 2 * 64 * 6.5e9
    assert plausibility.cpu_flops_bound("bfloat16", 1) > plausibility.cpu_flops_bound("float32", 1)


def test_outputs_that_a_cause_does_not_change_are_named():
    a, b = images(2, 1), images(2, 2)
    assert not plausibility.unchanged_faults("label", {0: a, 1: b})
    assert plausibility.unchanged_faults("label", {0: a, 1: a.copy()}) == [
        "the output does not depend on the label: all 2 values give the same."
    ]
    (fault,) = plausibility.unchanged_faults("label", {"cat": a, "dog": b, "cow": a})
    assert fault.endswith("for 1 pairs of values: cat and cow.")
    nearly = a.copy()
    nearly[0, 0, 0, 0] ^= 1
    assert plausibility.unchanged_faults("seed", {0: a, 1: nearly}), "one grey level is rounding"
    assert not plausibility.unchanged_faults("seed", {0: a, 1: nearly}, tolerance=0)


def test_values_that_are_no_numbers_do_not_pass_for_equal():
    broken = {0: np.array([np.nan]), 1: np.array([np.nan])}
    assert not plausibility.unchanged_faults("seed", broken) and plausibility.largest_difference(*broken.values()) > 1e9


def test_identical_and_constant_outputs_are_counted():
    drawn = images(5)
    assert not plausibility.identical_faults("samples", drawn)
    drawn[4] = drawn[3] = drawn[1]
    (fault,) = plausibility.identical_faults("samples", drawn)
    assert fault == "2 of 5 samples repeat another bit for bit: 1 = 3, 1 = 4."
    assert not plausibility.constant_faults("samples", drawn)
    drawn[0] = 127
    assert plausibility.constant_faults("samples", drawn) == ["1 of 5 samples hold a single value."]


def test_parts_that_do_not_sum_are_found():
    assert not plausibility.sum_faults("loss", {"coarse": 3.0, "fine": 4.0}, 7.0)
    assert not plausibility.sum_faults("loss", {"coarse": 3.0, "fine": 4.0}, 7.0 * (1 + 9e-5)), "float32 rounds"
    (fault,) = plausibility.sum_faults("loss", {"coarse": 3.0, "fine": 4.0}, 7.01)
    assert fault == "loss: the parts (coarse, fine) sum to 7, the whole is 7.01."


def test_tokens_outside_their_range_are_named():
    ids, values = np.array([[0, 7, 3, 1]]), np.random.default_rng(0).normal(size=(1, 16, 3))
    assert not plausibility.token_faults((ids, values), SPEC)
    assert plausibility.token_faults((ids + 1, values), SPEC) == ["coarse: ids 1 to 8, expected 0 to 7."]
    assert plausibility.token_faults((ids - 1, values), SPEC) == ["coarse: ids -1 to 6, expected 0 to 7."]
    values[0, 0, 0] = np.inf
    assert plausibility.token_faults((ids, values), SPEC) == ["fine: 1 values are not finite."]
    assert plausibility.token_faults((ids, np.zeros((1, 16, 3))), SPEC) == ["fine: all values are 0."]


def test_drawn_tokens_have_unit_scale():
    ids, values = np.zeros((1, 4)), np.random.default_rng(0).normal(size=(1, 16, 3))
    assert not plausibility.scale_faults((ids, values), SPEC) and not plausibility.scale_faults((ids, values / 2), SPEC)
    for factor in (4400.0, 1e-3, np.nan):
        (fault,) = plausibility.scale_faults((ids, factor * values), SPEC)
        assert fault.startswith("fine: drawn tokens have the standard deviation")


def test_a_biased_estimator_is_found_and_an_unbiased_one_is_not():
    """The spread over all ordered pairs, also of a draw with itself, is too small by 1 / m: m = 2 loses half of it."""
    stream = np.random.default_rng(0)
    draws = stream.normal(size=(500, 2))
    apart = np.abs(draws[:, 0] - draws[:, 1])
    truth = 2 / np.sqrt(np.pi)  # of two standard normal draws
    assert not plausibility.bias_faults("spread", apart, truth)
    (fault,) = plausibility.bias_faults("spread", apart / 2, truth)
    assert "500 estimates have the mean" in fault and "expected 1.1284" in fault
    assert plausibility.bias_faults("constant", np.full(9, 2.0), 2.1) and not plausibility.bias_faults(
        "c", np.ones(9), 1
    )


def test_accuracies_by_class_make_up_that_of_the_whole():
    counts = {"cat": 3, "dog": 1}
    assert not plausibility.accuracy_faults("accuracy", {"cat": 1.0, "dog": 0.0}, counts, 0.75)
    assert plausibility.accuracy_faults("accuracy", {"cat": 1.0, "dog": 0.0}, counts, 0.5)
    impossible = plausibility.accuracy_faults("accuracy", {"cat": 1.2, "dog": 0.0}, counts, 0.9)
    assert impossible == ["accuracy: class cat has 1.2."]


# --- figures that a run wrote down -----------------------------------------------------------------------------------


def test_a_recorded_utilisation_above_the_peak_is_found(tmp_path):
    with Ledger(tmp_path, "run") as ledger:
        ledger.event("metrics", stage="generator", step=50, mfu=0.4, images_per_s=100.0)
    assert utilisation_is_possible(tmp_path / "ledger.jsonl") == Outcome("1 records, utilisation at most 40.0%")
    with Ledger(tmp_path, "run") as ledger:
        ledger.event("metrics", stage="generator", step=100, mfu=1.7, images_per_s=100.0)
    (fault,) = utilisation_is_possible(tmp_path / "ledger.jsonl").faults
    assert fault.startswith("generator step 100: model FLOPs utilisation 170.0%")


@pytest.mark.parametrize(("whole", "holds"), [(0.6, True), (0.5, False)])
def test_a_recorded_evaluation_must_add_up(tmp_path, whole, holds):
    path = tmp_path / "evaluation.json"
    by_class = {"cat": 1.0, "dog": 0.0}
    result = {"class_accuracy_by_class": by_class, "class_accuracy_samples": whole, "protocol": {"samples": 5}}
    path.write_text(json.dumps(result))
    assert (not accuracies_add_up(path).faults) == holds, "of five samples three are cats"


# --- the list --------------------------------------------------------------------------------------------------------


def raising() -> Outcome:
    raise DataError("the file is gone.")


def test_the_list_goes_on_after_a_check_that_raises_and_says_what_is_wrong():
    now = iter([0.0, 1.5, 2.0, 2.25, 3.0, 3.5])
    checks, output = Checklist(lambda: next(now)), io.StringIO()
    assert checks.run("model", lambda: Outcome("45 thousand parameters"))
    assert not checks.run("label", lambda: Outcome("no difference", ["the output does not depend on the [label]."]))
    assert not checks.run("data", raising)
    assert [line.name for line in checks.broken] == ["label", "data"]
    assert [line.seconds for line in checks.lines] == [1.5, 0.25, 0.5]
    checks.print("A tiny model", Console(file=output, width=100))
    text = output.getvalue()
    assert "1 of 3" in text and "label: the output does not depend on the [label]." in text
    assert "data: DataError: the file is gone." in text and "2.2" in text


def test_a_programming_fault_keeps_its_traceback(capsys):
    def broken() -> Outcome:
        raise ZeroDivisionError

    checks = Checklist()
    assert not checks.run("model", broken)
    assert "ZeroDivisionError" in checks.lines[0].outcome.faults[0] and "Traceback" in capsys.readouterr().err
