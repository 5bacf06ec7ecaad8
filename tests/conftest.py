"""Tiers, the skip gate and the shared fixtures of all tests.

Tiers: the quick tests run by default, `--slow` adds those marked slow, `--slow-tenth SEED` runs a tenth of the slow
ones and nothing else. Skip gate: a skip whose reason is not in tests/skips.toml fails the run.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.comm.harness import Farm

ROOT = Path(__file__).parent.parent
SKIPS = ROOT / "tests" / "skips.toml"
DATA_VARIABLE = "DIST_LOWBIT_TEST_DATA"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dist_lowbit")
    group.addoption("--slow", action="store_true", help="run the slow tests too")
    group.addoption("--slow-tenth", metavar="SEED", help="run a tenth of the slow tests, drawn by SEED, and no others")
    group.addoption("--record", metavar="FILE", help="write the result to FILE as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipGate(listed_reasons()), "dist_lowbit_skip_gate")
    if config.getoption("--record"):
        config.pluginmanager.register(Record(Path(config.getoption("--record"))), "dist_lowbit_record")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if item.get_closest_marker("slow")]
    seed = config.getoption("--slow-tenth")
    if seed is not None:
        chosen = set(tenth([item.nodeid for item in slow], seed))
        keep = [item for item in slow if item.nodeid in chosen]
    elif config.getoption("--slow"):
        return
    else:
        keep = [item for item in items if not item.get_closest_marker("slow")]
    kept = set(keep)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = keep


def tenth(names: list[str], seed: str) -> list[str]:
    """Return a tenth of `names`, at least one: those with the smallest hashes, hence spread over all files."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return ranked[: math.ceil(len(names) / 10)]


def listed_reasons() -> list[re.Pattern[str]]:
    """Return the reasons of tests/skips.toml as patterns."""
    entries = tomllib.loads(SKIPS.read_text(encoding="utf-8"))["skip"]
    for entry in entries:
        if set(entry) != {"reason", "why"} or not all(entry.values()):
            raise pytest.UsageError(f"{SKIPS}: an entry has {sorted(entry)}; expected a reason and a why, not empty")
    return [re.compile(re.escape(entry["reason"]).replace(r"\*", ".*"), re.DOTALL) for entry in entries]


class SkipGate:
    """Fails the run if a test or a module was skipped, or expected to fail, for a reason that is not listed."""

    def __init__(self, listed: list[re.Pattern[str]]) -> None:
        self.listed = listed
        self.unlisted: dict[str, str] = {}

    def _check(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = reason_of(report)
        if reason is not None and not any(pattern.fullmatch(reason) for pattern in self.listed):
            self.unlisted[report.nodeid] = reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._check(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._check(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unlisted:
            terminalreporter.section("skips that tests/skips.toml does not list: the run fails", red=True)
            for nodeid, reason in self.unlisted.items():
                terminalreporter.line(f"{nodeid}: {reason}")


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """Return why `report` was skipped or expected to fail; None if it was neither."""
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail).removeprefix("reason: ")
    if not report.skipped:
        return None
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


class Record:
    """Writes counts, machine, versions and skips of a run to a file, for docs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()
        self.skips: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reason = reason_of(report)
        if reason is not None:
            self.skips[reason] = self.skips.get(reason, 0) + 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        minutes = (time.monotonic() - self.started) / 60
        stats = terminalreporter.stats
        kinds = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
        counts = ", ".join(f"{len(stats[kind])} {kind}" for kind in kinds if stats.get(kind))
        lines = [
            "# The last run of every test",
            "",
            "Written by `make test-all`.",
            "",
            f"- result: {counts or 'no tests ran'}, in {minutes:.1f} minutes",
            f"- date: {time.strftime('%Y-%m-%d', time.gmtime())}, commit {commit()}",
            f"- machine: {processor()}, {os.cpu_count()} cores",
            f"- versions: Python {platform.python_version()}, {versions()}",
            "",
            "Skipped, by reason:" if self.skips else "Nothing was skipped.",
            *(f"- {count} x {reason}" for reason, count in sorted(self.skips.items())),
            *(f"- FAILED {report.nodeid}" for kind in ("failed", "error") for report in stats.get(kind, [])),
        ]
        self.path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("torch", "transformers", "deepspeed", "mpi4py", "impi-rt", "oneccl-devel"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


@pytest.fixture(scope="session")
def model_farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """Ranks that run models; one helper for all folders, since it takes seconds to import what they need."""
    from tests.comm.harness import Farm

    helper = Farm(tmp_path_factory.mktemp("ranks"), (), "tests.e2e.bodies", "tests.decoder.bodies")
    yield helper
    helper.close()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Return the folder of the larger test files; skip where none is named, fail where the name leads nowhere."""
    name = os.environ.get(DATA_VARIABLE)
    if not name:
        pytest.skip(f"{DATA_VARIABLE} is not set")
    folder = Path(name).resolve()
    if not folder.is_dir():
        pytest.fail(f"{DATA_VARIABLE} is {name!r}, which is no folder")
    return folder
