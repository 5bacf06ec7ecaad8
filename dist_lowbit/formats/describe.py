"""The table of formats as markdown, for the documents that hold it between markers.

A marked section starts with `<!-- generated from formats: NAME -->`, NAME a key of SECTIONS, and ends with
`<!-- end generated -->`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from .packed import part_layout
from .table import ALIASES, FORMATS, USER_FORMATS, Format


def bits_per_weight(row: Format, group_size: int | None = None) -> float:
    """Return the stored bits of one weight, scales included, for K that the group size divides."""
    group = row.group_size if group_size is None else group_size
    k = 64 if group == -1 else math.lcm(8, group)
    parts = part_layout(row, (1, k), group)
    return sum(part.dtype.itemsize * 8 * part.shape[1] for part in parts.values()) / k


def formula(row: Format) -> str:
    """Return how a code becomes a value."""
    if row.codec == "cast":
        return "w"
    if row.codec == "codebook":
        return "table[c] · scale"
    if row.offset == "min":
        return "c · scale + min"
    return "(c - zero_point) · scale" if row.offset == "zero_point" else f"(c - {row.center}) · scale"


def _error(row: Format) -> str:
    if row.error == 0:
        return "exact"
    of = "the weight" if row.codec == "cast" else "max abs" if row.offset == "none" else "max - min"
    return f"{row.error:.3%} of {of}"


def format_table() -> str:
    """Return the markdown table of all formats."""
    lines = [
        "| `low_bit` | bits | planes | value of code c | group | bits per weight | worst-case error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in FORMATS.values():
        names = [row.name, *(alias for alias, name in ALIASES.items() if name == row.name)]
        name = ", ".join(f"`{name}`" for name in names) + ("" if row.name in USER_FORMATS else " ¹")
        planes = " + ".join(map(str, row.planes)) or "-"
        group = str(row.group_size) if row.grouped else "-"
        size = f"{bits_per_weight(row):g}"
        lines.append(f"| {name} | {row.bits} | {planes} | {formula(row)} | {group} | {size} | {_error(row)} |")
    return "\n".join([*lines, "", "¹ for imports, calibration and modules kept in high precision"])


def plane_drawings() -> str:
    """Return how bytes of each plane width hold codes, and how planes make codes, drawn from the high bit down."""
    widths = sorted({bits for row in FORMATS.values() for bits in row.planes}, reverse=True)
    lines = ["```", "byte j of a row, bit 7 on the left; k counts codes along K"]
    for bits in widths:
        per_byte = 8 // bits
        slots = [f"k={per_byte}j+{i}" if i else f"k={per_byte}j" if per_byte > 1 else "k=j" for i in range(per_byte)]
        cells = " | ".join(slot.center(9 * bits - 3) for slot in reversed(slots))
        lines.append(f"{bits}-bit plane  [ {cells} ]")
    lines += ["", "a code, its high bit on the left"]
    for planes in sorted({row.planes for row in FORMATS.values() if row.planes}, key=sum):
        names = ", ".join(row.name for row in FORMATS.values() if row.planes == planes)
        digits, shift = [], 0
        for i, bits in enumerate(planes):
            digits.append(f"plane{i}: " + "".join(str(shift + b) for b in reversed(range(bits))))
            shift += bits
        lines.append(f"{shift} bits  [ {' | '.join(reversed(digits))} ]".ljust(40) + names)
    return "\n".join([*lines, "```"])


def part_table() -> str:
    """Return the markdown table of stored parts: one line per set of parts that occurs."""
    shown: dict[str, list[str]] = {}
    for row in FORMATS.values():
        parts = []
        for name, part in part_layout(row, (1, 64), row.group_size).items():
            unit = part.unit[1]
            if not name.startswith(("plane", "values")):
                width = "ceil(K / G)"
            else:
                width = "K" if unit == 1 else f"ceil(K / {unit})"
            parts.append(f"`{name}` {str(part.dtype).removeprefix('torch.')} [N, {width}]")
        shown.setdefault(", ".join(parts), []).append(row.name)
    lines = [f"| {', '.join(names)} | {parts} |" for parts, names in shown.items()]
    return "\n".join(["| formats | parts |", "|---|---|", *lines])


def codebook_table() -> str:
    """Return the codebooks of up to 16 codes, code by code."""
    books = [row for row in FORMATS.values() if 0 < len(row.codebook) <= 16]
    lines = ["| code | " + " | ".join(row.name for row in books) + " |", "|---" * (len(books) + 1) + "|"]
    for code in range(max(len(row.codebook) for row in books)):
        cells = [f"{row.codebook[code]:.9g}" if code < len(row.codebook) else "" for row in books]
        lines.append(f"| {code} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "table": format_table,
    "planes": plane_drawings,
    "parts": part_table,
    "codebooks": codebook_table,
}
_MARKED = re.compile(r"(<!-- generated from formats: (\w+) -->\n).*?(<!-- end generated -->)", re.DOTALL)


def refresh(text: str) -> str:
    """Return a document with each marked section generated anew; an unknown section's name is a KeyError."""
    return _MARKED.sub(lambda match: f"{match[1]}{SECTIONS[match[2]]()}\n{match[3]}", text)
