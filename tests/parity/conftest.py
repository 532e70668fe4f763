"""Where the parity fixtures lie: `--goldens DIR`, by default those of the repository."""

from pathlib import Path

import pytest
from parity.golden import RECORD

DEFAULT = Path(__file__).resolve().parent.parent / "goldens"


@pytest.fixture(scope="session")
def goldens(request: pytest.FixtureRequest) -> Path:
    """The folder of fixtures. Tests are skipped where the repository has none; a folder asked for must exist."""
    folder = Path(request.config.getoption("--goldens") or DEFAULT).resolve()
    if not folder.is_dir():
        if folder == DEFAULT:
            pytest.skip(f"no parity fixtures at {folder}; pass --goldens DIR")
        pytest.fail(f"--goldens {folder} is no folder; expected one with NAME.json and NAME.safetensors files")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how close each fixture was met; test processes of xdist keep theirs to themselves."""
    if not RECORD:
        return
    terminalreporter.section("agreement with the published implementations")
    for name, outputs in sorted(RECORD.items()):
        worst, at = max((relative, output) for output, (relative, _) in outputs.items())
        share = max(share for _, share in outputs.values())
        terminalreporter.write_line(
            f"{name:<18} {len(outputs):>4} outputs  largest error {worst:.1e} of max|reference| ({at}); "
            f"largest share of what is allowed {share:.0%}"
        )
