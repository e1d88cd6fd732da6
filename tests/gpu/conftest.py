"""GPU tests write what they saw: a dated file under `docs/results/`, with device, versions, command and a table."""

from __future__ import annotations

import datetime
import platform
import sys
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture
def measured(record_property):
    """Records a measurement for the result file: ``measured("peak memory", "1.23 GiB")``."""
    return record_property


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    if not torch.cuda.is_available() or hasattr(config, "workerinput"):
        return
    outcomes = {kind: terminalreporter.stats.get(kind, []) for kind in ("passed", "failed", "skipped", "error")}
    reports = [r for r in outcomes["passed"] + outcomes["failed"] + outcomes["error"] if "tests/gpu" in r.nodeid]
    if not reports:
        return
    gpu = torch.cuda.get_device_name()
    now = datetime.datetime.now(datetime.timezone.utc)
    lines = [
        f"# GPU tests on {gpu}, {now:%Y-%m-%d %H:%M} UTC",
        "",
        f"Command: `make gpu-test` (`{' '.join(sys.argv[:1] + sys.argv[1:])}`)  ",
        f"Versions: {_versions()}  ",
        f"Outcome: {', '.join(f'{len(v)} {k}' for k, v in outcomes.items() if v)}",
        "",
        *_table(
            ("test", "measured", "value"),
            [(r.nodeid.split("::")[-1], what, str(value)) for r in reports for what, value in r.user_properties],
        ),
        "",
        *_table(
            ("test", "outcome", "seconds"),
            [(r.nodeid.split("tests/gpu/")[-1], r.outcome, f"{r.duration:.1f}") for r in reports],
        ),
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d}-{gpu.replace(' ', '-')}-gpu-tests.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"results: {path}")


def _versions() -> str:
    import lightning
    import triton

    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"lightning {lightning.__version__}, CUDA {torch.version.cuda}"
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
