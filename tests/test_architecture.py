"""Who may import whom: imports go down the floors only, and two packages of one floor do not import each other."""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dist_lowbit"

FLOORS = [
    {"kernels", "sample"},  # below everything: they know nothing of the package
    {"core"},
    {"formats", "comm"},
    {"ops", "quantize", "checkpoint"},
    {"parallel", "models"},
    {"decoder"},
    {"assembly"},
    {"engine"},
    {"bench"},
    {"serve", "cli"},
    {"__init__", "optimize", "transformers", "llm", "quantization", "tuning"},  # the faces
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FACES = FLOORS[-1]
# launcher stands beside the floors: it imports none of them, and only the command line starts jobs.
MAY_IMPORT_LAUNCHER = {"cli"}
STDLIB_ONLY = {"launcher": set[str](), "kernels": {"torch", "triton"}, "sample": set[str]()}  # room: further packages
TORCH_IN_KERNELS = ROOT / "kernels" / "triton"  # the one folder of kernels/ whose language is a Python package
LONGEST = {".py": 350, ".cpp": 700, ".h": 700}  # about 300 and 600 lines, with some air


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(path for top in PACKAGE.iterdir() for path in ([top] if top.suffix == ".py" else top.rglob("*.py")))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for each import in `path`, also inside functions and under TYPE_CHECKING."""
    own = ("dist_lowbit", *path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(own[: len(own) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from package import name` may name a module; the longer name is right for the floors either way.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def complaint(room: str, name: str) -> str | None:
    """Return why a module of `room` may not import the dotted `name`; None if it may."""
    parts = name.split(".")
    if parts[0] in ("launcher", "kernels") and room != parts[0]:
        return "import it as dist_lowbit." + name
    if parts[0] != "dist_lowbit":
        return None
    target = parts[1] if len(parts) > 1 and (parts[1] in FLOOR_OF or parts[1] == "launcher") else "__init__"
    if target == room:
        return None
    if room == "launcher":
        return "launcher knows nothing of the package"
    if target == "launcher":
        return None if room in MAY_IMPORT_LAUNCHER else f"{room} does not start jobs"
    if room in FACES and target in FACES:
        return None
    if FLOOR_OF[target] >= FLOOR_OF[room]:
        return f"{target} (floor {FLOOR_OF[target]}) does not lie below {room} (floor {FLOOR_OF[room]})"
    return None


@pytest.mark.parametrize("room", sorted({room_of(path) for path in sources()}))
def test_imports_go_down(room: str) -> None:
    assert room in FLOOR_OF or room == "launcher", f"{room} stands on no floor: add it to FLOORS and docs/design.md"
    paths = [path for path in sources() if room_of(path) == room]
    bad = [
        f"{path.relative_to(ROOT)}:{line}: {name}: {why}"
        for path in paths
        for line, name in imports_of(path)
        if (why := complaint(room, name))
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("room", sorted(STDLIB_ONLY))
def test_these_import_only_the_standard_library(room: str) -> None:
    bad = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        allowed = STDLIB_ONLY[room] if path.resolve().is_relative_to(TORCH_IN_KERNELS) else set[str]()
        for line, name in imports_of(path):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top not in allowed and top not in ("dist_lowbit", room):
                bad.append(f"{path.relative_to(PACKAGE)}:{line}: {name}")
    assert not bad, "\n".join(bad)


def test_nothing_imports_pickle() -> None:
    banned = {"pickle", "dill", "cloudpickle", "joblib", "marshal"}
    bad = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sources()
        for line, name in imports_of(path)
        if name.split(".")[0] in banned
    ]
    assert not bad, "\n".join(bad)


def test_upward_imports_are_seen() -> None:
    assert complaint("core", "dist_lowbit.ops.linear")
    assert complaint("formats", "dist_lowbit.comm.Group")
    assert complaint("ops", "dist_lowbit.__version__")
    assert complaint("parallel", "dist_lowbit.launcher.job")
    assert complaint("launcher", "dist_lowbit.core.errors")
    assert complaint("ops", "kernels.open_library")
    assert not complaint("ops", "dist_lowbit.formats.PackedWeight")
    assert not complaint("cli", "dist_lowbit.launcher.job")


def test_long_files_are_reported() -> None:
    """Warns, and fails nothing: a long file is a question (is there a second idea inside?), not a defect."""
    folders = ("dist_lowbit", "launcher", "kernels", "tests", "examples", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in LONGEST]
    for path in files:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST[path.suffix]:
            warnings.warn(f"{path.relative_to(ROOT)} has {lines} lines", stacklevel=1)
