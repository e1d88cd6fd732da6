"""GPU tests write what they saw: a dated file under `docs/results/`, with device, versions, command and a table.

A plugin of `tests/conftest.py`, since the controller of several workers loads no conftest of a folder below.
"""

from __future__ import annotations

import datetime
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if torch.cuda.is_available() and not hasattr(config, "workerinput"):
        count = torch.cuda.device_count()
        gpus = f"{count} × " * (count > 1) + torch.cuda.get_device_name()
        path = write(terminalreporter.stats, gpus, RESULTS)
        if path is not None:
            terminalreporter.write_line(f"results: {path}")


def write(stats: dict[str, list[Any]], gpus: str, folder: Path) -> Path | None:
    """Writes the outcomes of GPU tests among pytest's ``stats``; returns the file, or ``None`` if none ran."""
    outcomes = {
        # By name, since every worker has its own report of a file that cannot be imported.
        kind: list({report.nodeid: report for report in stats.get(kind, []) if _is_of_a_gpu(report)}.values())
        for kind in ("passed", "failed", "skipped", "error")
    }
    reports = [report for kind in ("passed", "failed", "error") for report in outcomes[kind]]
    if not reports:
        return None
    now = datetime.datetime.now(datetime.timezone.utc)
    lines = [
        f"# GPU tests on {gpus}, {now:%Y-%m-%d %H:%M} UTC",
        "",
        f"Command: `{' '.join(['pytest', *sys.argv[1:]])}`  ",
        f"Versions: {_versions()}  ",
        f"Outcome: {', '.join(f'{len(v)} {k}' for k, v in outcomes.items() if v)}",
        "",
        *_table(
            ("test", "measured", "value"),
            [(_name(r), what, str(value)) for r in reports for what, value in getattr(r, "user_properties", ())],
        ),
        "",
        *_table(
            ("test", "outcome", "seconds"), [(_name(r), r.outcome, f"{getattr(r, 'duration', 0):.1f}") for r in reports]
        ),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now:%Y-%m-%d}-{gpus.replace(' × ', 'x').replace(' ', '-')}-gpu-tests.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _is_of_a_gpu(report: Any) -> bool:
    if isinstance(report, pytest.CollectReport):
        # Whether a file that cannot be imported has any, nobody knows.
        return report.failed
    return "gpu" in report.keywords


def _name(report: Any) -> str:
    return report.nodeid.split("tests/", 1)[-1].split("@")[0]


def _versions() -> str:
    import lightning
    import triton

    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"lightning {lightning.__version__}, CUDA {torch.version.cuda}"
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
