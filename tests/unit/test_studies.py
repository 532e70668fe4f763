"""Studies: what each arm changes, means and spreads, tables, verdicts, plots and what is kept, on planted values."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import studies
from ear_jax.config import read
from ear_jax.config.schema import Config
from ear_jax.config.values import flatten
from ear_jax.errors import ConfigError
from ear_jax.tasks import study
from studies import ablation, arms, end_to_end, fidelity, report, runs
from studies import judge as judging

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "studies"


def recipe(name: str) -> Config:
    return read.resolve(read.load(str(CONFIGS / name))[0])


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def spread(mean: float, std: float = 0.0, seeds: int = 3) -> dict[str, float]:
    return {"mean": mean, "std": std, "seeds": seeds}


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "group"), [("fidelity.py", arms.FIDELITY), ("ablation.py", arms.ABLATION)])
@pytest.mark.parametrize("variant", ["", ":cifar10", ":shapes,tiny"])
def test_every_arm_is_sound_and_changes_what_it_says_alone(file, group, variant):
    config = recipe(f"{file}{variant}")
    before = flatten(config)
    assert len({arm.name for arm in group}) == len(group)
    for arm in group:
        after = flatten(arms.with_changes(config, {**arm.changes, "seed": 7}))
        changed = {path for path in before if before[path] != after[path]}
        assert changed <= {*arm.changes, "seed"} and "seed" in changed
        assert all(after[path] == value for path, value in arm.changes.items())


def test_the_arms_of_a_study_are_different_models():
    """An arm that repeats another would be measured twice and called a finding."""
    for file, group in (("fidelity.py", arms.FIDELITY), ("ablation.py", arms.ABLATION)):
        config = recipe(file)
        seen = {}
        for arm in group:
            own = (str(arms.with_changes(config, arm.changes)), arm.tokenizer, arm.decodes)
            assert own not in seen, f"{arm.name} is {seen.get(own)}"
            seen[own] = arm.name


def test_changes_that_cannot_be_are_refused():
    config = recipe("fidelity.py")
    with pytest.raises(ConfigError, match=r"keys that do not exist: tokenizer\.fusoin"):
        arms.with_changes(config, {"tokenizer.fusoin": "mlp"})
    with pytest.raises(ConfigError, match="does not divide the latent grid"):
        arms.with_changes(config, {"tokenizer.coarse.grids": (3,)})


def test_the_arms_of_the_verdict_get_all_their_seeds_first(tmp_path, capsys):
    group = arms.FIDELITY[:3]
    order = [(arm.name, seed) for arm, seed, *_ in runs.each_seed(recipe("fidelity.py"), tmp_path, group, (0, 1))]
    names = [arm.name for arm in group]
    assert order == [(names[0], 0), (names[1], 0), (names[0], 1), (names[1], 1), (names[2], 0), (names[2], 1)]
    assert "lite_vae, seed 0 (1 of 6" in capsys.readouterr().out


def test_every_study_of_the_schema_can_be_run():
    (names,) = (field.metadata["choices"] for field in dataclasses.fields(Config().study) if field.name == "name")
    assert set(studies.STUDIES) == set(names) - {""} == {path.stem for path in CONFIGS.glob("[!_]*.py")}
    with pytest.raises(ConfigError, match="is no study"):
        study.run(Config(), "nowhere")


def test_a_study_that_trains_takes_no_model(tmp_path):
    with pytest.raises(ConfigError, match="trains its own models"):
        studies.STUDIES["fidelity"](recipe("fidelity.py"), tmp_path, "a/model")


def test_a_wrong_arm_is_refused_before_the_judge_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "Judge", lambda *_: pytest.fail("a judge was trained"))
    config = arms.with_changes(recipe("fidelity.py"), {"study.arms": ("hybrid_mpl",)})
    with pytest.raises(ConfigError, match=r"'hybrid_mpl' is none of .* Did you mean 'hybrid_mlp'\?"):
        studies.STUDIES["fidelity"](config, tmp_path, None)


def test_chosen_arms_and_seeds_run_alone_and_as_they_would_among_the_others(tmp_path):
    config = recipe("fidelity.py")
    chosen = arms.with_changes(config, {"study.arms": ("coarse_only", "lite_vae"), "study.seeds": (0, 4)})
    names = [(arm.name, seed) for arm, seed, *_ in runs.each_seed(chosen, tmp_path, arms.FIDELITY, (0, 4))]
    assert names == [("lite_vae", 0), ("coarse_only", 0), ("lite_vae", 4), ("coarse_only", 4)]
    alone = next(runs.each_seed(chosen, tmp_path, arms.FIDELITY, (0,)))
    among = next(runs.each_seed(config, tmp_path, arms.FIDELITY, config.study.seeds))
    assert alone == among
    unknown = arms.with_changes(config, {"study.arms": ("lite_var",)})
    with pytest.raises(ConfigError, match=r"'lite_var' is none of lite_vae, hybrid_mlp"):
        next(runs.each_seed(unknown, tmp_path, arms.FIDELITY, (0,)))


# --- sampling settings of the ablation --------------------------------------------------------------------------------


def test_passes_of_each_level_are_swept_apart():
    config = recipe("ablation.py")
    usual = config.generator.coarse.steps, config.generator.fine.steps
    alone = ablation.settings(config, "fine_only")
    plain = [row["steps"] for row in alone if row["temperature"] == config.sample.temperature]
    assert plain == [(n,) for n in config.study.passes]
    assert len({row["temperature"] for row in alone}) == 3
    assert [row["steps"] for row in ablation.settings(config, "fine_m4")] == plain
    hybrid = ablation.settings(config, "hybrid")
    plain = [row["steps"] for row in hybrid if row["temperature"] == config.sample.temperature]
    assert len(set(plain)) == len(plain)
    assert {(n, 1) for n in config.study.passes} <= set(plain)
    assert {(usual[0], n) for n in config.study.passes} <= set(plain)
    assert len({row["temperature"] for row in hybrid}) == 3
    assert [row["steps"] for row in ablation.settings(config, "m4")] == [usual]


# --- means, spreads and tables ----------------------------------------------------------------------------------------

ROWS = [
    {"arm": "b", "seed": 0, "fd": 1.0, "psnr": 20.0},
    {"arm": "a", "seed": 0, "fd": 5.0},
    {"arm": "b", "seed": 1, "fd": 3.0, "psnr": None},
    {"arm": "b", "seed": 2, "fd": 5.0, "psnr": 26.0},
]


def test_groups_keep_their_order_and_have_the_sample_deviation():
    summary = report.summarise(ROWS, ("arm",), ("fd", "psnr"))
    assert [line["arm"] for line in summary] == ["b", "a"]
    assert summary[0]["fd"] == spread(3.0, 2.0)
    assert summary[0]["psnr"] == spread(23.0, math.sqrt(18.0), 2)
    assert summary[1]["fd"] == spread(5.0, 0.0, 1) and "psnr" not in summary[1]


def test_the_table_shows_means_with_their_spread():
    summary = report.summarise(ROWS, ("arm",), ("fd", "psnr"))
    lines = report.table(summary, ("arm",), {"fd": ("FD", ".1f"), "psnr": ("PSNR, dB", ".2f")}).splitlines()
    assert lines == [
        "| arm | FD | PSNR, dB |",
        "|---|---:|---:|",
        "| b | 3.0 ± 2.0 | 23.00 ± 4.24 |",
        "| a | 5.0 | – |",
    ]


def test_what_is_written_can_be_read(tmp_path):
    report.write(tmp_path, {"rows": ROWS, "where": tmp_path}, "# A1\n")
    assert json.loads((tmp_path / "study.json").read_text())["rows"] == ROWS
    assert (tmp_path / "study.md").read_text() == "# A1\n"


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_gain_is_judged_by_the_wanted_fraction():
    assert "+20.0%" in report.ratio_verdict("x", spread(8.0), spread(10.0), 0.15)
    assert report.ratio_verdict("x", spread(8.0), spread(10.0), 0.15).endswith("at least 15%: **yes**")
    assert report.ratio_verdict("x", spread(8.6), spread(10.0), 0.15).endswith("**no**")
    assert "-50.0%" in report.ratio_verdict("x", spread(15.0), spread(10.0), 0.15)


def test_the_spread_of_a_gain_is_that_of_the_ratio():
    """With a = 8 ± 0.4 and b = 10 ± 0.5, a / b has the spread 0.8 * hypot(0.05, 0.05); one seed has none to tell."""
    said = report.ratio_verdict("x", spread(8.0, 0.4), spread(10.0, 0.5), 0.15)
    assert f"± {0.8 * math.hypot(0.05, 0.05):.1%} by the seeds" in said
    assert said.endswith(
        "**not measurable here, because the gain is nearer to the wanted one than the seeds are to each other**"
    )
    said = report.ratio_verdict("x", spread(8.0, seeds=1), spread(10.0), 0.15)
    assert "(one seed)" in said and said.endswith("**not measurable here, because one seed has no spread**")


def test_a_judge_that_knows_nothing_judges_nothing():
    assert "one class" in judging.doubt_about(1.0, 1) and "right on 20.0%" in judging.doubt_about(0.2, 10)
    assert judging.doubt_about(0.9, 10) == ""
    said = report.ratio_verdict("x", spread(8.0), spread(10.0), 0.15, doubt="it guesses")
    assert said.endswith("**not measurable here, because it guesses**")


def line(arm: str, steps: str, fd: float, temperature: float = 1.0) -> dict[str, Any]:
    return {
        "arm": arm,
        "steps": steps,
        "passes": sum(map(int, steps.split("+"))),
        "temperature": temperature,
        "fd": spread(fd),
        "ms": spread(1.0),
    }


def test_the_dual_branch_is_judged_at_equal_passes():
    summary = [
        line("hybrid", "1+1", 12.0),
        line("hybrid", "4+1", 3.0),
        line("hybrid", "4+1", 1.0, temperature=0.7),
        line("fine_only", "1", 12.0),
        line("fine_only", "4", 4.0),
        line("fine_only", "8", 5.0),
        line("m4", "4+1", 0.5),
    ]
    verdicts = ablation._verdicts(summary)
    assert len(verdicts) == 3, "no hybrid setting fits into one pass; the last is about time"
    assert "at most 4 passes (1+1 against 4): -200.0%" in verdicts[0] and verdicts[0].endswith("**no**")
    assert "at most 8 passes (4+1 against 4): +25.0%" in verdicts[1] and verdicts[1].endswith("**yes**")


class PlantedJudge(judging.Judge):
    """A judge that was never trained."""

    def __init__(self) -> None:
        self.floor, self.trust, self.doubt = 0.25, {"accuracy_clean": 0.99}, ""
        self.images = np.zeros((10, 8, 8, 3), np.uint8)


def test_the_dual_branch_is_judged_below_a_millisecond():
    slow, fast = {"ms": spread(1.7, 0.2)}, {"ms": spread(0.9)}
    hybrid, alone = [line("hybrid", "4+1", 3.0) | slow], [line("fine_only", "4", 4.0) | slow]
    (verdict,) = ablation._fast_verdicts(hybrid, alone, time_doubt=report.time_doubt("cpu", 1))
    assert verdict == "dual branch under 1 ms/image: **not measurable here, because there is no accelerator**"
    (verdict,) = ablation._fast_verdicts(hybrid, alone)
    assert verdict == "dual branch under 1 ms/image: its fastest setting (4+1) takes 1.70 ± 0.20: **no**"
    hybrid += [line("hybrid", "2+1", 3.2) | fast, line("hybrid", "1+1", 9.0) | fast]
    (verdict,) = ablation._fast_verdicts(hybrid, alone)
    assert verdict.endswith("2+1, where fine only has no setting: **yes**")
    (verdict,) = ablation._fast_verdicts(hybrid, [*alone, line("fine_only", "1", 8.0) | fast])
    assert "(2+1 against 1): +60.0%" in verdict and verdict.endswith("**yes**")
    assert ablation._fast_verdicts([], alone) == []


@pytest.mark.parametrize("gap", [1.5, 2.5])
def test_the_fidelity_verdict_compares_the_hybrid_with_the_plain_vae_and_knows_its_units(tmp_path, gap):
    values = {"psnr": 25.0, "ssim": 0.9, "class_accuracy": 0.9, "parameters_M": 1.0}
    rows = [
        {"arm": arm, "seed": seed, "rfd": rfd + seed, **values}
        for arm, rfd in (("lite_vae", 1.0), ("hybrid_mlp", 1.0 + gap))
        for seed in (0, 1, 2)
    ]
    times = {"lite_vae encode": {"median": 1.25, "p10": 1.0, "p90": 3.0}}
    result = fidelity._report(tmp_path, rows, PlantedJudge(), times)
    spread_of_gap = f"= {gap:+.2f} (± 1.41 by the seeds)"
    assert any(
        spread_of_gap in verdict and "**not measurable here, because that limit is in units of FID" in verdict
        for verdict in result["verdicts"]
    )
    text = (tmp_path / "study.md").read_text()
    assert "| lite_vae | 2.00 ± 1.00 |" in text and "| 1.25 | – |" in text
    assert pixels_of(tmp_path / "study.png").shape[1] > 300


PROTOCOL = {"platform": "gpu", "device_count": 1, "bound_flops_per_s": 1e12}


def timed(ms: float, share: float = 1.0, batch: int = 4, gflop: float = 1.0) -> list[dict[str, Any]]:
    shared = {"batch": batch, "path": end_to_end.LABEL_TO_IMAGE, "gflop": spread(gflop)}
    whole = {"stage": end_to_end.WHOLE, "ms": spread(ms), "call_ms": spread(batch * ms), "share": spread(1.0)}
    parts = {"ms": spread(share * ms), "call_ms": spread(batch * share * ms), "share": spread(share)}
    return [shared | whole, shared | {"stage": end_to_end.SUM} | parts]


@pytest.mark.parametrize(
    ("ms", "protocol", "answer"),
    [
        (11.9, {}, "**yes**"),
        (12.1, {}, "**no**"),
        (5.0, {"platform": "cpu"}, "**not measurable here, because there is no accelerator**"),
        (
            5.0,
            {"device_count": 8},
            "**not measurable here, because 8 devices share a batch and the claim is about one**",
        ),
    ],
)
def test_twelve_milliseconds_are_judged_on_one_accelerator(ms, protocol, answer):
    verdicts = end_to_end._verdicts(timed(ms), [], PROTOCOL | protocol)
    assert verdicts[0] == f"label to image at batch 4: {ms:.2f} ± 0.00 ms/image; wanted at most 12: {answer}"
    assert not any(text.startswith("label to image at batch 4:") and "wanted" in text
                   for text in end_to_end._verdicts(timed(ms, batch=16), [], PROTOCOL))  # fmt: skip


def test_stages_that_do_not_sum_and_times_that_cannot_be_are_said():
    rows = [{"batch": 4, "seed": 0, "other_images": 0}] * 5 + [{"batch": 4, "seed": 1, "other_images": 3}]
    sound = end_to_end._verdicts(timed(10.0, 0.95), rows, PROTOCOL)
    assert "label to image at batch 4: the stages sum to 95% of the whole; **they add up**" in sound
    assert "images of the stages one after the other that differ from the whole's: 3 of 8" in sound
    assert sound[-1] == "no stage is faster than its roofline"
    wrong = end_to_end._verdicts(timed(10.0, 0.4, gflop=20.0), rows, PROTOCOL)
    assert any(text.endswith("40% of the whole; **they do not add up**") for text in wrong)
    assert wrong[-1].startswith("impossible: label to image, sum of the stages, batch 4: 16 ms for 80 GFLOP")


# --- the judge's numbers ----------------------------------------------------------------------------------------------


def test_distances_of_features_are_frechet_distances():
    stream = np.random.default_rng(0)
    left = stream.normal(size=(500, 3))
    assert judging._distance(left, left) == pytest.approx(0.0, abs=1e-9)
    assert judging._distance(left + np.array([3.0, 4.0, 0.0]), left) == pytest.approx(25.0)


def test_images_are_split_without_loss():
    parts = judging.chunks(np.arange(10), 4)
    assert [len(part) for part in parts] == [4, 4, 2] and np.concatenate(parts).tolist() == list(range(10))


# --- what is kept, and pictures ---------------------------------------------------------------------------------------


def test_a_result_is_kept_for_its_configuration_alone(tmp_path):
    calls, config = [], recipe("fidelity.py")

    def measure() -> dict[str, int]:
        calls.append(1)
        return {"value": len(calls)}

    assert runs.kept(tmp_path, config, measure) == {"value": 1} == runs.kept(tmp_path, config, measure)
    other = arms.with_changes(config, {"evaluate.classifier_steps": 3})
    assert runs.kept(tmp_path, other, measure) == {"value": 2}
    assert runs.kept(tmp_path, other, measure, "other data") == {"value": 3}
    (tmp_path / "result.json").write_text("{torn")
    assert runs.kept(tmp_path, other, measure) == {"value": 4}


def test_a_curve_has_one_point_for_a_number_of_passes(tmp_path, monkeypatch):
    def line(arm: str, steps: str, passes: int, temperature: float) -> dict[str, Any]:
        return {
            "arm": arm,
            "steps": steps,
            "passes": passes,
            "temperature": temperature,
            "fd": {"mean": 1.0, "std": 0.1},
        }

    colder = [line("fine_only", "4", 4, 0.7), line("hybrid", "8+1", 9, 0.7)]
    usual = [line("fine_only", "1", 1, 1.0), line("fine_only", "4", 4, 1.0), line("hybrid", "8+1", 9, 1.0)]
    usual += [line("hybrid", "8+2", 10, 1.0), line("diffusion", "4", 4, 1.0)]
    drawn = []
    monkeypatch.setattr(report, "lines", lambda path, panels: drawn.append(panels))
    ablation._plot(tmp_path / "study.png", [*colder, *usual])
    (panel,) = drawn[0].values()
    assert {name: [x for x, _, _ in points] for name, points in panel.items()} == {
        "fine_only": [1, 4],
        "hybrid, one fine pass": [9],
        "hybrid, more fine passes": [10],
        "diffusion": [4],
    }


def test_plots_show_every_panel(tmp_path):
    report.dots(
        tmp_path / "dots.png", ["a", "b"], {"PSNR": [(20.0, 1.0), (25.0, 0.0)], "rFD": [(1.0, 0.1), (2.0, 0.2)]}
    )
    one = {("quality", "passes", "FD"): {"hybrid": [(4.0, 2.0, 0.1), (1.0, 9.0, 0.5)], "fine": [(1.0, 8.0, 0.0)]}}
    report.lines(tmp_path / "lines.png", one)
    report.lines(tmp_path / "wider.png", one | {("quality", "ms", "FD"): {"hybrid": [(1.0, 1.0, 0.0)]}})
    shown = {path.stem: pixels_of(path) for path in tmp_path.glob("*.png")}
    assert shown["wider"].shape[1] > 1.5 * shown["lines"].shape[1], "a panel more, beside one legend"
    for name, panels in {"lines": 1, "wider": 2}.items():
        for color in ([0x1F, 0x77, 0xB4], [0xFF, 0x7F, 0x0E]):  # hybrid and fine, in the panels and in the legend
            columns = (np.abs(shown[name] - color).max(-1) < 8).any(0).nonzero()[0]
            assert columns.max() > 0.85 * shown[name].shape[1], "the legend stands right of all panels"
            assert columns.min() < 0.9 * shown[name].shape[1] / panels, "and the first panel shows the line"
    dots = (np.abs(shown["dots"] - [0x4C, 0x72, 0xB0]).max(-1) < 8).any(0).nonzero()[0]
    width = shown["dots"].shape[1] / 2
    assert dots.min() < 0.5 * width < dots[dots < width].max(), "20 and 25 are far apart: no axis begins at 0"
