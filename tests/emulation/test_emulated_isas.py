"""ISAs above AVX2, in software: every format's bits, for few tokens and many, ragged shapes, odd and even blocks.

Where the CPU has an ISA, tests/ops runs it natively too; these run wherever AVX2 is.
"""

from __future__ import annotations

import pytest

from dist_lowbit.formats import FORMATS


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("isa", ["avx_vnni_emulated", "avx512_vnni_emulated", "amx_emulated"])
def test_equals_the_reference(isa: str, format: str, differences: dict[str, dict[str, list[str]]]) -> None:
    assert differences[isa][format] == []
