"""Lines are cut right whatever the chunks are, and nothing is lost."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lowbit.launcher.output import LONGEST_LINE, PIPE_BUF, Lines, Sink, Tail


@pytest.mark.parametrize(
    ("chunks", "seen"),
    [
        ([b"a\nb\n"], [b"[1] a\n[1] b\n"]),
        ([b"a", b"b\nc"], [b"", b"[1] ab\n"]),
        ([b"\n\n"], [b"[1] \n[1] \n"]),
        ([b"x\r\ny\r\n"], [b"[1] x\r\n[1] y\r\n"]),
        ([b"x\r", b"\ny\n"], [b"", b"[1] x\r\n[1] y\n"]),  # a \r\n that was torn apart
        ([b"10%\r20%\r", b"30%\r"], [b"[1] 10%\r", b"[1] 20%\r"]),  # a progress bar moves
        (["ä\n".encode()[:1], "ä\n".encode()[1:]], [b"", "[1] ä\n".encode()]),  # half a character
    ],
)
def test_lines(chunks: list[bytes], seen: list[bytes]) -> None:
    lines = Lines(b"[1] ")
    assert [lines.feed(chunk) for chunk in chunks] == seen


@given(st.lists(st.binary(max_size=8).map(lambda b: b.translate(bytes(b"ab\r\n"[i % 4] for i in range(256))))))
def test_nothing_is_lost_whatever_the_chunks(chunks: list[bytes]) -> None:
    pieces = Lines(b"")
    torn = b"".join(pieces.feed(chunk) for chunk in chunks) + pieces.close()
    whole = Lines(b"")
    assert torn == whole.feed(b"".join(chunks)) + whole.close()
    assert torn.rstrip(b"\r\n") == b"".join(chunks).rstrip(b"\r\n")


def test_an_unfinished_line_ends_with_the_stream() -> None:
    lines = Lines(b"[0] ")
    assert lines.feed(b"no end") == b""
    assert lines.close() == b"[0] no end\n"
    assert lines.close() == b""


def test_an_endless_line_does_not_grow_for_ever() -> None:
    lines = Lines(b"")
    passed = sum(len(lines.feed(b"x" * 4096)) for _ in range(100))
    assert passed > 4096 * 100 - 2 * LONGEST_LINE


def test_tail_keeps_the_last_lines() -> None:
    tail = Tail(2)
    tail.feed(b"a\nb\nc")
    tail.feed(b"c\nd")
    assert tail.lines() == ["cc", "d"]


def test_a_sink_without_reader_is_broken_and_takes_no_more() -> None:
    reading, writing = os.pipe()
    sink = Sink(writing)
    sink.write(b"x" * (PIPE_BUF + 1))
    sink.flush_some()
    assert sink.waiting == 1
    assert os.read(reading, 2 * PIPE_BUF) == b"x" * PIPE_BUF
    os.close(reading)
    sink.flush_some()
    assert sink.broken
    sink.write(b"more")
    assert sink.waiting == 0
    os.close(writing)


def test_a_line_is_held_only_while_it_is_the_last() -> None:
    lines = Lines(b"[1] ", b"error: ")
    assert lines.feed(b"a\nerror: x\n") == b"[1] a\n"
    assert lines.held == [b"error: x\n"]
    assert lines.feed(b"b\n") == b"[1] error: x\n[1] b\n"
    assert lines.feed(b"error: y") == lines.close() == b""
    assert lines.release() == b"[1] error: y\n"
