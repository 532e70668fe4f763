"""The command line in a process of its own, with a pause before every batch so that signals arrive in mid-run.

Usage: worker.py PAUSE_S ARGUMENT...; the device mesh and the haste of compiling are those of the tests.
"""

import sys
import time
from typing import Any
from unittest import mock

from tiny import one_device_mesh, quick_compilation

from ear_jax import main
from ear_jax.data.loader import Loader
from ear_jax.stages import session
from ear_jax.training import loop


def run(pause_s: float, arguments: list[str]) -> int:
    """Run `ear_jax.main` and return its exit status."""
    original = Loader.__next__

    def slow(self: Loader) -> Any:
        time.sleep(pause_s)
        return original(self)

    with (
        quick_compilation(),
        mock.patch.object(session, "make_mesh", one_device_mesh),
        mock.patch.object(loop, "loader_images_per_s", lambda loader: 0.0),
        mock.patch.object(Loader, "__next__", slow),
    ):
        return main.main(arguments)


if __name__ == "__main__":
    main.leave(run(float(sys.argv[1]), sys.argv[2:]))
