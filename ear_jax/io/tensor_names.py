"""Named tensors compared with what a model expects, before anything is built from them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ear_jax.errors import ConfigError

_SHOWN = 10


def check(
    flat: Mapping[str, np.ndarray], expected: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], where: str
) -> None:
    """Compare named tensors with the expected (shape, dtype) by name; raises ConfigError listing the differences."""
    faults = []
    for name in sorted(expected.keys() | flat.keys()):
        if name not in flat:
            faults.append(f"{name}: expected {_describe(*expected[name])}, missing")
        elif name not in expected:
            faults.append(f"{name}: not part of this model, found {_describe(flat[name].shape, flat[name].dtype)}")
        else:
            found = (tuple(flat[name].shape), flat[name].dtype)
            if found != expected[name]:
                faults.append(f"{name}: expected {_describe(*expected[name])}, found {_describe(*found)}")
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ConfigError(
            f"The tensors in {where} do not fit the model its config describes ({len(faults)} differ); "
            "use the config they were saved with:\n  " + "\n  ".join(faults[:_SHOWN]) + more
        )


def _describe(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"
