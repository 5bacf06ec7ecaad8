"""Builds the project, and makes empty environments outside the checkout to install it into."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """Run `command` and return its stdout; a failure shows all that it printed."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, out: Path, settings: dict[str, str] | None = None) -> Path:
    """Build the `wheel` or the `sdist` of the tree at `source` without isolation, hence without a network."""
    out.mkdir(parents=True, exist_ok=True)
    code = "import json, sys; from scikit_build_core import build as b; "
    code += f"b.build_{kind}(sys.argv[1], json.loads(sys.argv[2]))"
    run(sys.executable, "-c", code, out, json.dumps(settings or {}), cwd=source)
    (made,) = out.iterdir()
    return made


class Environment:
    """An empty virtual environment; torch and the other dependencies are lent to it by the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.outside = folder.parent  # nothing of the checkout is importable from here
        site = run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=self.outside)
        self.site = Path(site.strip())
        # A line in a .pth file comes after the environment's own folder, and .pth files of the lender are not read:
        # what is installed here wins, and the lender's editable install of the project is not seen.
        (self.site / "lender.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

    def install(self, what: Path, *options: str) -> None:
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python, "install")
        run(*pip, "--no-index", "--no-deps", "--no-build-isolation", *options, what, cwd=self.outside)

    def run(self, *command: str | Path) -> str:
        return run(self.folder / "bin" / str(command[0]), *command[1:], cwd=self.outside)
