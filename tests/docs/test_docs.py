"""What README.md and the pages under docs/ say can be done is done here; what they name is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import dist_lowbit.sample
from dist_lowbit.cli.main import main
from dist_lowbit.core.settings import PREFIX, Settings
from dist_lowbit.formats.table import USER_FORMATS

ROOT = Path(__file__).parent.parent.parent
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("install", "migrate"))]
LINKED = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "launcher/README.md", ROOT / "kernels/README.md"})
# Commands that the packaging tests, `make test` and `make demo` themselves run.
ELSEWHERE = ("make ", "pip install dist/", "pip install --no-deps oneccl-devel ")


@dataclass(frozen=True)
class Block:
    """A fenced block: python code, or the lines of a console."""

    kind: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(kind, body) for kind, body in found]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the pages' my-model and the examples, as the current one."""
    (tmp_path / "my-model").symlink_to(dist_lowbit.sample.path())
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_run(page: str) -> None:
    assert {block.kind for block in blocks(page)} <= {"python", "console"}


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.kind == "python" for block in blocks(page))])
def test_python_blocks_run(page: str, folder: Path) -> None:
    for number, block in enumerate(blocks(page)):
        if block.kind == "python":
            exec(compile(block.text, f"{page}, block {number}", "exec"), {"__name__": "__main__"})


def commands(page: str) -> list[list[str]]:
    lines = [line for block in blocks(page) if block.kind == "console" for line in block.text.splitlines()]
    return [shlex.split(line) for line in lines if not line.startswith(ELSEWHERE)]


def test_console_blocks_are_known_commands() -> None:
    for page in PAGES:
        assert all(words[0] == "dist-lowbit" for words in commands(page))


def test_console_commands_of_one_process_run(folder: Path) -> None:
    for words in commands("README.md"):
        if "-n" not in words:
            assert main(words[1:]) == 0, words


@pytest.mark.slow
def test_every_console_command_runs(folder: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for page in PAGES:
        for words in commands(page):
            command = [sys.executable, "-m", "dist_lowbit.cli", *words[1:]]
            done = subprocess.run(command, input="Hello\n", capture_output=True, text=True, env=env, check=False)
            assert done.returncode == 0, (words, done.stderr)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page, target)


def test_the_set_up_comes_first() -> None:
    assert blocks("README.md")[0] == Block("console", "make demo\nmake test\n")


@pytest.mark.parametrize("page", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_readme_holds_the_table_of_formats() -> None:
    # That it is up to date is checked with the other generated tables.
    assert "<!-- generated from formats: table -->" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_setting_is_documented_with_its_default() -> None:
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    rows = dict(re.findall(rf"^\| `{PREFIX}(\w+)` \| (?:`(.+?)`)? ?\|", text, re.MULTILINE))
    defaults = {name.upper(): f.default for name, f in Settings.__dataclass_fields__.items()}
    assert rows == {n: f"{value:g}" if isinstance(value, float) else value for n, value in defaults.items()}


def test_every_instruction_set_backend_and_extra_is_documented() -> None:
    import tomllib

    from dist_lowbit.comm.backends import BACKENDS

    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    isas = re.findall(r"^DLB_ISA\((\w+)", (ROOT / "kernels/cpu/isa.def").read_text(encoding="utf-8"), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for line, names in {"DIST_LOWBIT_ISA": isas, "DIST_LOWBIT_BACKEND": BACKENDS}.items():
        row = next(row for row in text.splitlines() if f"`{line}`" in row)
        for name in names:
            assert re.search(rf"\b{name}\b", row), (line, name)
    for extra in extras:
        assert f"`{extra}`" in text, extra


def test_the_formats_of_the_ancestors_are_all_named() -> None:
    text = (ROOT / "docs/migrate.md").read_text(encoding="utf-8")
    row = next(row for row in text.splitlines() if row.startswith("| `low_bit` sym_int4"))
    assert set(USER_FORMATS) == set(row.split("|")[1].replace("`low_bit`", "").split())


def test_families_in_the_readme_are_the_registered_ones() -> None:
    from dist_lowbit.models.registry import FAMILIES

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    models = text.split("## Models\n")[1].split(" are split over the ranks")[0]
    named = {name.strip().lower().replace("-", "") for name in re.split(r",|\band\b", models)}
    assert named == {family.replace("_", "") for family in FAMILIES}
