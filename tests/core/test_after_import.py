"""An action that waits for an import."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dist_lowbit.core.after_import import after_import


def test_it_runs_once_right_after_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waited_for.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before, seen = list(sys.meta_path), []
    after_import("waited_for", lambda: seen.append(sys.modules["waited_for"].value))
    assert seen == []
    import waited_for

    assert seen == [1]
    assert sys.meta_path == before
    assert waited_for.__spec__.loader is waited_for.__loader__
    after_import("waited_for", lambda: seen.append("at once"))
    assert seen == [1, "at once"]
    sys.modules.pop("waited_for")
