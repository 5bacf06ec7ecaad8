"""Documents that hold generated tables are up to date."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from dist_lowbit.formats import FORMATS, quantize
from dist_lowbit.formats.describe import SECTIONS, bits_per_weight, refresh

ROOT = Path(__file__).parents[2]


def marked() -> list[Path]:
    documents = [ROOT / "docs" / "formats.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*.md"))]
    return list(dict.fromkeys(d for d in documents if "<!-- generated from formats:" in d.read_text(encoding="utf-8")))


def test_formats_md_holds_every_section() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    for name in SECTIONS:
        assert text.count(f"<!-- generated from formats: {name} -->") == 1


@pytest.mark.parametrize("document", marked(), ids=lambda path: path.name)
def test_generated_sections_are_up_to_date(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert refresh(text) == text, f"run python -m dist_lowbit.formats {document.relative_to(ROOT)}"


@pytest.mark.parametrize("group", [None, 32, 128, -1])
@pytest.mark.parametrize("row", FORMATS.values(), ids=lambda row: row.name)
def test_bits_per_weight_are_the_bytes_of_a_weight(row: object, group: int | None) -> None:
    import torch

    k = 64 if group == -1 else 768
    weight = quantize(torch.zeros(2, k), row, group)  # type: ignore[arg-type]
    assert weight.nbytes * 8 / (2 * k) == bits_per_weight(weight.format, weight.group_size)


def test_the_command_prints_and_refreshes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["formats", *words])
        runpy.run_module("dist_lowbit.formats", run_name="__main__")

    command()
    printed = capsys.readouterr().out
    for name, section in SECTIONS.items():
        assert section() in printed, name
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- generated from formats: table -->\nold\n<!-- end generated -->\nb\n", encoding="utf-8")
    command(str(page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("a\n<!--")
    assert text.endswith("<!-- end generated -->\nb\n")
    assert "| `sym_int4` |" in text
    assert "old" not in text
