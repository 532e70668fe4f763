"""Names decide which class is which: between a run and its past, the data and reference statistics."""

from pathlib import Path

import numpy as np

from ear_jax.config.schema import Config
from ear_jax.files import write_json
from ear_jax.folders.workdir import Workdir
from ear_jax.metrics.reference import Reference
from ear_jax.metrics.reference_files import ReferenceStatistics
from ear_jax.stages.references import _by_name
from ear_jax.stages.session import Session, keep_class_order, stored_class_order


def test_a_run_of_an_earlier_version_keeps_the_text_order(tmp_path):
    workdir = Workdir(tmp_path)
    assert keep_class_order(Config(), stored_class_order(workdir)).data.class_order == "auto"
    for stored, order in (({}, "text"), ({"class_order": "auto"}, "auto"), ({"class_order": "text"}, "text")):
        write_json(workdir.config, {"data": stored})
        assert keep_class_order(Config(), stored_class_order(workdir)).data.class_order == order


def test_rows_of_a_reference_are_matched_by_name():
    said: list[str] = []

    class Heard(Session):
        def __init__(self) -> None:
            pass

        def say(self, text: str) -> None:
            said.append(text)

    session = Heard()
    labels, statistics = np.asarray([0, 1, 2, -1], np.int32), object.__new__(ReferenceStatistics)
    names = ("0", "2", "10")
    by_name = _by_name(session, Reference(statistics, None, labels, ("0", "10", "2")), names, Path("x.npz"))
    assert by_name.labels is not None and by_name.labels.tolist() == [0, 2, 1, -1]
    nameless = _by_name(session, Reference(statistics, None, labels), names, Path("x.npz"))
    assert nameless.labels is labels
    assert _by_name(session, Reference(statistics, None, labels, ("a", "b")), names, Path("x.npz")).labels is None
    assert [
        part for line, part in zip(said, ("by name", "without names", "left out"), strict=True) if part in line
    ] == [
        "by name",
        "without names",
        "left out",
    ]
