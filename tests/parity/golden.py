"""One parity fixture: `NAME.safetensors` (weights, inputs, reference outputs) with `NAME.json` (sizes, tolerances).

Use: `golden = Golden(goldens, "kl16")`, build the part from `golden.config`, convert `golden.params` (original names,
torch layouts), run it on `golden.inputs`, then `golden.check("moments", value)` for every output and, at the end,
`golden.check_complete()`. Sizes come from the json, so that another folder of fixtures runs through the same test.
"""

import importlib.util
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

RECORD: dict[str, dict[str, tuple[float, float]]] = {}
"""By fixture and output: the largest error relative to max|reference|, and as a share of what is allowed."""


class Golden:
    """A loaded fixture; the test that asks for an absent one is skipped with the reason.

    Attributes:
        json: The whole json file, for what the fields below do not cover.
        config: Sizes and seeds of the reference model.
        params: Reference weights by their original name, regenerated where the json has a `params_rule`.
        inputs: Arrays by name, without the prefix `in/`.
        outputs: Reference values by name, without the prefix `out/`.
        errors: Largest error relative to max|reference| of each output checked so far.
    """

    def __init__(self, folder: Path, name: str):
        description, arrays = folder / f"{name}.json", folder / f"{name}.safetensors"
        for path in (description, arrays):
            if not path.is_file():
                pytest.skip(f"no parity fixture {path.name} in {folder}")
        self.name = name
        self.json: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
        self.config: dict[str, Any] = self.json["config"]
        tensors = load_file(arrays)
        self.params = _with_prefix(tensors, "params/")
        self.inputs = _with_prefix(tensors, "in/")
        self.outputs = _with_prefix(tensors, "out/")
        if "params_rule" in self.json:
            self.params |= _regenerated(description)
        self.errors: dict[str, float] = {}

    @property
    def worst(self) -> float:
        """Largest of the relative errors so far."""
        return max(self.errors.values(), default=0.0)

    def tolerance(self, name: str) -> float:
        """Return the largest absolute difference allowed for a float output."""
        rules = self.json["tolerance"]
        if f"out/{name}" in rules.get("per_tensor_atol", ()):
            return rules["per_tensor_atol"][f"out/{name}"]
        relative = rules.get("recommended_atol_rel_to_max", rules.get("recommended_rel_to_max"))
        return relative * _largest(self.outputs[name])

    def check(self, name: str, value: Any) -> None:
        """Assert that `value` agrees with output `name`: integers exactly, floats within the recorded tolerance.

        Shapes must be equal; where the reference is not finite, the value must be the same infinity or NaN.
        """
        reference, found = self.outputs[name], np.asarray(value)
        assert found.shape == reference.shape, f"{self.name}: {name} has shape {found.shape}, not {reference.shape}"
        if reference.dtype.kind in "iub":
            wrong = int((found != reference).sum())
            self.errors[name] = 0.0
            RECORD.setdefault(self.name, {})[name] = (0.0, 0.0)
            assert wrong == 0, f"{self.name}: {wrong} of {reference.size} integers of {name} differ"
            return
        found, exact = found.astype(np.float64), reference.astype(np.float64)
        finite = np.isfinite(exact)
        np.testing.assert_array_equal(found[~finite], exact[~finite], err_msg=f"{self.name}: {name}, not finite")
        error = _largest(found[finite] - exact[finite])
        relative = error / max(_largest(exact[finite]), np.finfo(np.float64).tiny)
        self.errors[name] = max(relative, self.errors.get(name, 0.0))
        allowed = self.tolerance(name)
        share = error / allowed if allowed else 0.0
        kept = RECORD.setdefault(self.name, {})
        kept[name] = max((relative, share), kept.get(name, (0.0, 0.0)))
        # A comparison that a NaN does not pass.
        assert error <= allowed, (
            f"{self.name}: {name} is off by {error:.3g} ({relative:.3g} relative to max|reference|); "
            f"allowed is {allowed:.3g}"
        )

    def check_complete(self, without: Iterable[str] = ()) -> None:
        """Assert that every output was checked, but for those named in `without` (which must exist)."""
        missing = set(self.outputs) - set(self.errors)
        assert missing == set(without), f"{self.name}: never checked: {sorted(missing)}; excused: {sorted(without)}"


def _with_prefix(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def _largest(values: np.ndarray) -> float:
    finite = np.abs(values.astype(np.float64))
    return float(finite.max()) if finite.size else 0.0


def _regenerated(description: Path) -> dict[str, np.ndarray]:
    """Make rule-based weights with the `regen.py` that belongs to the fixture: beside it, above it, or our own."""
    folders = (description.parent, description.parent.parent, Path(__file__).resolve().parent.parent / "goldens")
    source = next((folder / "regen.py" for folder in folders if (folder / "regen.py").is_file()), None)
    if source is None:
        pytest.skip(f"{description.name} has rule-based weights, and no regen.py lies beside it")
    spec = importlib.util.spec_from_file_location("goldens_regen", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing the json to the garbage collector
        return module.load_params(str(description))
