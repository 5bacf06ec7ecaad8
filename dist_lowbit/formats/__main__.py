"""`python -m dist_lowbit.formats` prints the formats as markdown; given documents, it refreshes their sections."""

from __future__ import annotations

import sys
from pathlib import Path

from .describe import SECTIONS, refresh

if len(sys.argv) == 1:
    print("\n\n".join(section() for section in SECTIONS.values()))
for name in sys.argv[1:]:
    path = Path(name)
    path.write_text(refresh(path.read_text(encoding="utf-8")), encoding="utf-8")
