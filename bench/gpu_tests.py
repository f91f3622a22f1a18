"""pytest plugin of `make gpu`: a line of JSON a test, as it ends, which a run that is killed leaves behind.

And a worker of xdist whose device context a kernel has broken, which would fail every test after that one, ends:
xdist starts another in its place.
"""

from __future__ import annotations

import json
import os
from typing import Any, TextIO

import pytest

BROKEN = ("CUDA error", "device-side assert", "an illegal memory access", "misaligned address", "unspecified launch")


def pytest_configure(config: pytest.Config) -> None:
    """In a worker and in the process that hears of every test, different things."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(EndBroken())
    elif path := os.environ.get("FUSED_ATTN_TEST_RESULTS"):
        config.pluginmanager.register(Results(open(path, "a", buffering=1)))  # noqa: SIM115 — open until the process ends


class Results:
    """Writes what became of each test."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, report: Any) -> None:
        """A line on one report."""
        row = {"id": report.nodeid, "when": getattr(report, "when", "collect"), "outcome": report.outcome}
        row["seconds"] = round(getattr(report, "duration", 0.0), 3)
        if report.failed:
            row["text"] = str(report.longrepr)[-3000:]
        self.file.write(json.dumps(row) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The call of each test, and what went wrong or was skipped before or after."""
        if report.when == "call" or not report.passed:
            self.write(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that can't be imported."""
        if report.failed:
            self.write(report)


class EndBroken:
    """Ends a worker after a test that broke the device's context."""

    broken = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember it until the reports of this test are sent."""
        self.broken |= report.failed and any(text in str(report.longrepr) for text in BROKEN)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """The end of the test."""
        if self.broken:
            os._exit(1)
