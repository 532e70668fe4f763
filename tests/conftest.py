"""What all tests share: quick compilation, run-time checks of array annotations, and where shared data lies.

Programs are compiled in haste (`quick.py`): most of a test's time is compilation, which takes a quarter as long so.
The tests have eight fake devices, which cost nothing: a program on one of them compiles as fast as with one alone. No
persistent compilation cache: within one run hardly a program comes twice, so that writing it costs more than it saves.
The user's own cache folder is neither read nor written.
"""

import os
import tempfile
from pathlib import Path

import pytest
from quick import xla_flags

# Both must happen before jax and ear_jax are imported for the first time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ.setdefault("EAR_JAX_CACHE", str(Path(tempfile.gettempdir()) / f"ear_jax_tests_{os.getuid()}"))
for _flag, _value in {"xla_force_host_platform_device_count": 8, **xla_flags()}.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_flag}={_value}".strip()

import jaxtyping  # noqa: E402

jaxtyping.install_import_hook("ear_jax", "typechecker.check")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the parity suite run on another folder of fixtures."""
    parser.addoption("--goldens", default=str(REPOSITORY / "tests" / "goldens"), help="folder of parity fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests for accelerators that are not in use; JAX_PLATFORMS=cuda (or tpu) brings them in."""
    for platform in ("gpu", "tpu"):
        marked = [item for item in items if item.get_closest_marker(platform)]
        if marked:
            import jax

            if jax.default_backend() != platform:
                for item in marked:
                    item.add_marker(pytest.mark.skip(reason=f"needs a {platform}, runs on {jax.default_backend()}"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of shared data and golden values beside the checkout; tests that need it are skipped without it."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no shared data at ../{folder.name} beside the checkout")
    return folder
