"""What all tests share: eight fake CPU devices, run-time checks of array annotations, and where shared data lies.

Programs are compiled at LLVM's level 1: most of a test's time is compilation, which takes half as long so. Those that
run for a moment take `quick.QUICK`. No persistent compilation cache: cache files of parallel test processes are not
written atomically, so that reading one can warn.
"""

import os
from pathlib import Path

import pytest

# Both must happen before jax and ear_jax are imported for the first time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _flag, _value in (("--xla_force_host_platform_device_count", 8), ("--xla_backend_optimization_level", 1)):
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()

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
