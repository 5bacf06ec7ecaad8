"""Talking with a model: through a terminal on two ranks, through a pipe, and to the end of what it can remember."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from dist_lowbit.cli.chat import Lines
from dist_lowbit.comm import SingleGroup
from dist_lowbit.engine.chat import render
from dist_lowbit.engine.generate import Sampling, generate
from dist_lowbit.engine.session import Session, open_session
from tests.cli.command_line import Cli, environment

LIMIT = 100.0


@pytest.fixture(scope="module")
def session(checkpoint: Path) -> Session:
    return open_session(checkpoint, SingleGroup())


def expected(session: Session, *turns: str) -> list[str]:
    """Return the answers to turns, from ids that are encoded by hand as the checkpoint's template says."""
    text, answers = "", []
    for turn in turns:
        text += f"<s>user: {turn}\n"
        ids = session.tokenizer(text + "assistant:", add_special_tokens=False, return_tensors="pt").input_ids
        answers.append(generate(session, ids, 6, Sampling(greedy=True)).text)
        text += f"<s>assistant: {answers[-1]}\n"
    return answers


def read_until(descriptor: int, text: str, limit: float = LIMIT) -> str:
    """Read from a terminal until a text appears, or fail."""
    found, end = "", time.monotonic() + limit
    while text not in found:
        assert select.select([descriptor], [], [], end - time.monotonic())[0], f"waited in vain for {text!r}: {found!r}"
        try:
            found += os.read(descriptor, 4096).decode(errors="replace")
        except OSError:  # nobody has the other side any more
            pytest.fail(f"it ended before {text!r}: {found!r}")
    return found


@pytest.mark.slow
def test_two_ranks_at_a_terminal(checkpoint: Path, session: Session) -> None:
    first, second = expected(session, "Tell me of a cat", "And then?")
    terminal, inner = pty.openpty()
    mode = termios.tcgetattr(inner)
    mode[3] &= ~termios.ECHO
    termios.tcsetattr(inner, termios.TCSANOW, mode)
    # Of the one most likely token any temperature draws what greedy takes.
    sampling = ("--top-k", "1", "--top-p", "0.5", "--temperature", "9")
    words = ("chat", str(checkpoint), "-n", "2", *sampling, "--max-new-tokens", "6")
    chat = subprocess.Popen(
        [sys.executable, "-m", "dist_lowbit.cli", *words], stdin=inner, stdout=inner, stderr=inner, env=environment()
    )
    os.close(inner)
    try:
        assert read_until(terminal, "> ").endswith("> ")
        os.write(terminal, b"Tell me of a cat\n")
        said = read_until(terminal, "> ")
        assert said.replace("\r\n", "\n") == f"{first}\n> "
        os.write(terminal, b"And then?\n")
        assert read_until(terminal, "> ").replace("\r\n", "\n") == f"{second}\n> "
        os.write(terminal, termios.tcgetattr(terminal)[6][termios.VEOF])  # Ctrl-D
        assert chat.wait(LIMIT) == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(terminal)


def test_piped_lines_and_their_end(
    checkpoint: Path, session: Session, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = expected(session, "Tell me of a cat", "And then?")
    (tmp_path / "lines").write_text("Tell me of a cat\nAnd then?")  # the last one without an end of its own
    with (tmp_path / "lines").open() as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        done = cli("chat", checkpoint, "--greedy", "--max-new-tokens", 6)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"> {first}\n> {second}\n> \n"


def test_lines_that_come_together_are_all_heard() -> None:
    read, write = os.pipe()
    lines = Lines(read)
    assert lines.next(0.0) is None
    os.write(write, "one\ntwo\r\nthr\u00e9e".encode() + b"\xff")
    assert [lines.next(0.0) for _ in range(3)] == ["one", "two", None]
    os.close(write)
    assert [lines.next(0.0) for _ in range(3)] == ["thr\u00e9e\ufffd", "", ""]
    os.close(read)


def test_a_conversation_without_a_template_is_lines(session: Session) -> None:
    class Plain:
        chat_template = None

        def __call__(self, text: str, return_tensors: str, **options: bool) -> object:
            return session.tokenizer(text, return_tensors=return_tensors)

    plain = Session(session.model, Plain(), session.group)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "there"}]
    assert torch.equal(render(plain, messages), session.tokenizer("Hello\nthere", return_tensors="pt").input_ids)


def test_the_oldest_turns_are_forgotten(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    story = "the cat sat on the mat and " * 30  # some 200 tokens
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} {story}"} for i in range(9)]
    ids = render(session, messages)
    assert ids.shape[1] <= 1024 * 3 // 4
    assert messages[0]["role"] == "user"
    assert messages[-1]["content"].startswith("8 ")
    assert len(messages) < 9
