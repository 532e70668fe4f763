"""Stage timing: turns, warm-up, percentiles, waiting for the device, and the printed table."""

import io

import jax.numpy as jnp
import pytest
from rich.console import Console

from ear_jax.bench import timing as benches
from ear_jax.bench.timing import StageTiming, print_stages, time_stages


def test_stages_take_turns_and_the_warm_up_is_not_timed():
    now, calls = [0.0], []
    durations = {"encode": iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0]), "decode": iter([9.0, 9.0] + [0.5] * 5)}

    def stage(name):
        def call():
            calls.append(name)
            now[0] += next(durations[name])
            return jnp.zeros(())

        return call

    timings = time_stages({n: stage(n) for n in durations}, warmup_repeats=2, repeats=5, clock=lambda: now[0])
    assert calls == ["encode", "decode"] * 7
    assert timings[0] == StageTiming("encode", 3000.0, 1400.0, 4600.0, 5)
    assert timings[1] == StageTiming("decode", 500.0, 500.0, 500.0, 5)


def test_every_result_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(benches.jax, "block_until_ready", waited.append)
    time_stages({"a": lambda: "x"}, warmup_repeats=1, repeats=2)
    assert waited == ["x"] * 3


@pytest.mark.parametrize("numbers", [{"warmup_repeats": 0, "repeats": 3}, {"warmup_repeats": 1, "repeats": 0}])
def test_too_few_repeats_are_refused(numbers):
    with pytest.raises(ValueError, match="at least 1"):
        time_stages({}, **numbers)


def test_the_table_names_stages_and_rates():
    output = io.StringIO()
    timings = [StageTiming("encode", 20.0, 18.0, 25.5, 7), StageTiming("nothing", 0.0, 0.0, 0.0, 7)]
    print_stages(timings, 4, Console(file=output, width=120))
    row = next(line for line in output.getvalue().splitlines() if "encode" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "encode",
        "20.00",
        "18.00",
        "25.50",
        "5.00",
        "200.0",
        "7",
    ]
