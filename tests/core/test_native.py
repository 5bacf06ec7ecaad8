"""The compiled library: found, switched off, or asked for by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.native import native, native_why_not
try:
    print(native() is not None, native_why_not())
except UsageError as error:
    print("refused", error)
"""


def ask(library: str) -> str:
    """Return what a fresh process says of its library under DIST_LOWBIT_LIBRARY."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "DIST_LOWBIT_LIBRARY": library},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_none_switches_it_off() -> None:
    assert ask("none") == "False switched off by DIST_LOWBIT_LIBRARY=none"


@pytest.mark.parametrize("content", [None, b"no library"])
def test_a_library_asked_for_by_name_must_open(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "libother.so"
    if content is not None:
        path.write_bytes(content)
    answer = ask(str(path))
    assert answer.startswith(f"refused DIST_LOWBIT_LIBRARY is {str(path)!r}: ")
    assert len(answer.splitlines()) == 1
