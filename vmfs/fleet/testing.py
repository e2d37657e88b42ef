"""A plugin of pytest: tests that are marked `fleet` run on the workers of a Dask cluster.

A test runs there in a pytest of its own, with the files of the project's tests, and its reports come back as if it had
run here. What it needs beside these files has to be installed where the workers are.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmfs.words.errors import Invalid

_LOCAL = "vmfs-fleet-here"  # set where a test runs for a fleet: it does not go on to another one
REPORTS = "vmfs-fleet-reports.json"
TEST_SECONDS = 600.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmfs-fleet", "tests on the workers of a Dask cluster")
    group.addoption("--scheduler", metavar="ADDRESS", help="of Dask: tests marked `fleet` run on its workers")
    group.addoption(
        "--fleet-files",
        metavar="GLOB",
        action="append",
        default=[],
        help="more files of the root directory that they need, as 'build/*.elf'",
    )
    group.addoption("--fleet-timeout", metavar="SECONDS", type=float, default=TEST_SECONDS, help="for a test")
    group.addoption("--fleet-reports", metavar="FILE", help="(for the workers) where to write the reports")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fleet: the test runs on a fleet, where --scheduler is given")
    if path := config.getoption("--fleet-reports"):
        config.pluginmanager.register(_Writer(config, path), _LOCAL)


class _Writer:
    """On a worker: keeps what the tests come to."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config, self._path, self._reports = config, path, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        self._reports.append(hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_sessionfinish(self) -> None:
        Path(self._path).write_text(json.dumps(self._reports, default=str))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """The tests that run here, then the others."""
    address = session.config.getoption("--scheduler")
    there = [item for item in session.items if address and item.get_closest_marker("fleet")]
    every, session.items = session.items, [item for item in session.items if item not in there]
    try:
        result = yield
        if there and not session.config.option.collectonly:
            _run_there(session, there, address)
        return result
    finally:
        session.items = every


def _run_there(session: pytest.Session, items: list[pytest.Item], address: str) -> None:
    from vmfs.fleet.fleet import Fleet
    from vmfs.fleet.local import client_of

    config = session.config
    timeout = config.getoption("--fleet-timeout")
    try:
        connected = client_of(address)
    except Invalid as failure:
        raise pytest.UsageError(str(failure)) from None
    with connected as client, Fleet(client) as fleet:
        template = fleet.files(config.rootpath, _files(config, items))
        inputs = [(item.nodeid, timeout) for item in items]
        for result in fleet.map(run_test, inputs, template=template, timeout=timeout + 10, batch=1):
            item = items[result.number]
            config.hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            for report in _reports(config, item, result):
                item.ihook.pytest_runtest_logreport(report=report)
            config.hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            if session.shouldfail or session.shouldstop:
                break


def _files(config: pytest.Config, items: list[pytest.Item]) -> set[str]:
    """The folders of the tests, with what lies beside them and above them for pytest, and what was asked for."""
    root = config.rootpath
    found = {name for name in ("pyproject.toml", "pytest.ini", "setup.cfg", "tox.ini") if (root / name).is_file()}
    for path in {item.path for item in items}:
        for folder in path.parents:
            if not folder.is_relative_to(root):
                break
            found |= {str(each.relative_to(root)) for each in folder.glob("conftest.py")}
            found |= {str(each.relative_to(root)) for each in folder.glob("__init__.py")}
        found |= {str(each.relative_to(root)) for each in path.parent.iterdir() if each.is_file()}
    for pattern in config.getoption("--fleet-files"):
        found |= {str(each.relative_to(root)) for each in root.glob(pattern) if each.is_file()}
    return found


def run_test(files: str, test: tuple[str, float]) -> dict[str, Any]:
    """On a worker: one test, in the folder of a case."""
    import tarfile

    import zstandard

    nodeid, timeout = test
    with open(files, "rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extractall(".", filter="data")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "vmfs.fleet",
        "-p",
        "no:cacheprovider",
        f"--fleet-reports={REPORTS}",
        "--rootdir=.",
        "-q",
        nodeid,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    try:
        reports = Path(REPORTS).read_text()
    except FileNotFoundError:
        reports = "[]"
    return {"reports": reports, "said": (done.stdout + done.stderr)[-20_000:], "code": done.returncode}


def _reports(config: pytest.Config, item: pytest.Item, result: Any) -> list[pytest.TestReport]:
    reports: list[Any] = []
    sentence = f"{result.kind}: {result.error}" if result.kind else ""
    if not sentence:
        with contextlib.suppress(Exception):  # a worker may say anything
            found = json.load(io.StringIO(result.value["reports"]))
            reports = [config.hook.pytest_report_from_serializable(config=config, data=each) for each in found]
        reports = [each for each in reports if isinstance(each, pytest.TestReport) and each.nodeid == item.nodeid]
        if not reports:
            found = result.value if isinstance(result.value, dict) else {}
            sentence = f"pytest ended with {found.get('code')} on {result.worker}:\n{found.get('said')}"
    if sentence:
        return [
            pytest.TestReport(item.nodeid, item.location, {}, "failed", sentence, "call", (), result.seconds),
        ]
    for report in reports:
        if isinstance(report.longrepr, list):  # of a test that was skipped: JSON has no tuples
            report.longrepr = tuple(report.longrepr)
        report.location = item.location
        report.sections.append(("fleet", f"it ran on {result.worker}"))
    return reports
