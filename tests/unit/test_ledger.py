"""The ledger: exact floats, torn lines and supersession by resume."""

import json

import numpy as np
import pytest

from ear_jax.errors import StorageError
from ear_jax.training import ledger as ledgers
from ear_jax.training.ledger import Ledger, batch_digest


def _step(ledger: Ledger, step: int, loss: float = 1.0, stage: str = "generator") -> None:
    ledger.step(stage, step, loss=loss, grad_norm=0.1, batch=batch_digest([step]))


def test_floats_come_back_bit_for_bit_and_lines_are_flushed_at_once(tmp_path):
    loss = float(np.float32(1) / 3)
    ledger = Ledger(tmp_path, "run-1")
    ledger.step("tokenizer", 1, loss=loss, grad_norm=2.0**-140, batch="ab", learning_rate=0.5)
    record = ledgers.read(ledger.path)[0]
    assert float.fromhex(record["loss_hex"]) == loss and float.fromhex(record["grad_norm_hex"]) == 2.0**-140
    assert (record["run_id"], record["stage"], record["step"], record["learning_rate"]) == (
        "run-1",
        "tokenizer",
        1,
        0.5,
    )
    ledger.close()
    _step(ledger, 2)
    assert len(ledgers.read(ledger.path)) == 1


def test_every_line_is_strict_json_even_for_non_finite_values(tmp_path):
    with Ledger(tmp_path, "r") as ledger:
        _step(ledger, 1, float("nan"))
        ledger.skip("generator", 2, index=np.arange(3), loss=float("inf"), grad_norm=float("nan"))
        ledger.event("start", facts={"rate": float("nan"), "ids": np.arange(2)}, workdir=tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    records = [json.loads(line, parse_constant=refuse) for line in ledger.path.read_text().splitlines()]
    assert records[0]["loss"] is None and records[0]["loss_hex"] == "nan"
    assert records[1]["loss_hex"] == "inf" and records[1]["index"] == [0, 1, 2]
    assert records[2]["facts"] == {"rate": None, "ids": [0, 1]}


def test_resume_supersedes_later_lines_of_its_stage_only(tmp_path):
    with Ledger(tmp_path, "first") as ledger:
        _step(ledger, 9, stage="tokenizer")
        for step in range(1, 6):
            _step(ledger, step, loss=step)
        ledger.checkpoint("generator", 3)
    with Ledger(tmp_path, "second") as ledger:
        ledger.resume("generator", 3)
        _step(ledger, 4, loss=40.0)
        ledger.resume("generator", 3)
        _step(ledger, 4, loss=400.0)
    kept = [r for r in ledgers.read(ledger.path) if r["event"] == "step"]
    assert [(r["stage"], r["step"], r["loss"]) for r in kept] == [
        ("tokenizer", 9, 1.0),
        ("generator", 1, 1.0),
        ("generator", 2, 2.0),
        ("generator", 3, 3.0),
        ("generator", 4, 400.0),
    ]
    everything = ledgers.read(ledger.path, with_superseded=True)
    assert [r["step"] for r in everything if r.get("superseded")] == [4, 5, 4]
    assert any(r["event"] == "checkpoint" for r in ledgers.read(ledger.path))


def test_a_line_torn_by_a_kill_harms_no_other(tmp_path):
    with Ledger(tmp_path, "r") as ledger:
        _step(ledger, 1)
        _step(ledger, 2)
    whole = ledger.path.read_text()
    ledger.path.write_text(whole[:-20])
    with Ledger(tmp_path, "r") as ledger:
        ledger.resume("generator", 1)
        _step(ledger, 2, loss=5.0)
    assert [(r["event"], r["step"]) for r in ledgers.read(ledger.path)] == [("step", 1), ("resume", 1), ("step", 2)]
    assert ledger.path.read_text().startswith(whole[:-20])


def test_other_processes_write_nothing(tmp_path):
    with Ledger(tmp_path, "r", enabled=False) as ledger:
        _step(ledger, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_not_there_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"Cannot write .*ledger\.jsonl"):
        Ledger(tmp_path / "missing", "r")
    with pytest.raises(StorageError, match="Cannot read"):
        ledgers.read(tmp_path / "missing")


def test_batch_digest_depends_on_ids_and_order_but_not_on_dtype():
    assert batch_digest([1, 2]) == batch_digest(np.array([1, 2], np.int32)) != batch_digest([2, 1])
    assert len(batch_digest(np.arange(1000))) == 16
