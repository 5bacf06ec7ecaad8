"""Two network namespaces as two hosts, a virtual cable between them: ranks generate together until it is cut."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import dist_lowbit.sample
from dist_lowbit.comm.gloo import LINGER
from dist_lowbit.comm.hierarchical import NEWS
from dist_lowbit.comm.notes import POST_SECONDS
from dist_lowbit.launcher.watch import BLAME_WINDOW
from dist_lowbit.optimize import convert
from tests.e2e.command_line import ROOT, environment

PORT = "29417"
TIMEOUT = 8.0  # seconds of silence; the ranks' imports must not differ by more either
# Seconds more until a host has ended: a rank asks for notes at a store that is gone, leaves its last words there for
# each group that it is in, and the launcher waits for the cause and gives its --grace.
ENDING = NEWS + LINGER + BLAME_WINDOW + 3.0
BUSY = 2.0  # what two busy cores add to that

# Each piece of text is a byte more in tokensR; whole texts are in textR.
GENERATES = """
import sys
from dist_lowbit.comm import init_group
from dist_lowbit.engine.generate import generate
from dist_lowbit.engine.sampling import Sampling
from dist_lowbit.engine.session import open_session

with init_group() as group, open(f"{sys.argv[2]}/tokens{group.rank}", "w", buffering=1) as tokens:
    print("backend", group.name, flush=True)
    session = open_session(sys.argv[1], group)
    while True:
        made = generate(session, "Once upon a time", 24, Sampling(greedy=True), lambda text: print(".", file=tokens))
        with open(f"{sys.argv[2]}/text{group.rank}", "w") as text:
            text.write(made.text)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Hosts:
    """Two hosts, `left` and `right`, of one job."""

    names: tuple[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, node: int, ranks: int, *words: str) -> None:
        """Start the launcher on one of them, with a host name, processes and a network of its own."""
        launcher = [sys.executable, "-m", "dist_lowbit.launcher", "-n", str(ranks), "--bind", "none", "--nnodes", "2"]
        launcher += ["--node-rank", str(node), "--master-addr", "10.77.0.1", "--master-port", PORT, *words]
        inside = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]
        inside += ['hostname "$0" && exec "$@"', ("left", "right")[node], *launcher]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], *inside],
            env=environment(DIST_LOWBIT_TIMEOUT=str(TIMEOUT)),
            cwd=ROOT,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)

    def cut(self) -> None:
        """Cut the cable: packets go nowhere, and nobody is told."""
        ip("-n", self.names[0], "link", "set", "cable", "down")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    names = (f"dlb{os.getpid()}left", f"dlb{os.getpid()}right")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for number, name in enumerate(names, 1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
                for link in ("lo", "cable"):
                    ip("-n", name, "link", "set", link, "up")
            subprocess.run(["ip", "netns", "exec", names[0], "unshare", "--uts", "--pid", "--fork", "--mount-proc",
                            "hostname", "left"], check=True, capture_output=True)  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no network namespaces for tests here")
        here = Hosts(names)
        yield here
        for process in here.started:
            process.kill()
            process.communicate()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2], ids=["one rank each", "two ranks each"])
def test_a_cut_cable_ends_both_hosts_by_name(hosts: Hosts, ranks: int, tmp_path: Path) -> None:
    convert(dist_lowbit.sample.path(), tmp_path / "model", "sym_int4")
    (tmp_path / "generates.py").write_text(GENERATES)
    for node in range(2):
        hosts.start(node, ranks, str(tmp_path / "generates.py"), str(tmp_path / "model"), str(tmp_path))
    texts = [tmp_path / f"text{rank}" for rank in range(2 * ranks)]
    deadline = time.monotonic() + 150
    while not all(size_of(text) for text in texts):
        ended = [process for process in hosts.started if process.poll() is not None]
        assert not ended, [process.communicate() for process in ended]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len({text.read_text() for text in texts}) == 1
    before = size_of(tmp_path / "tokens0")
    while size_of(tmp_path / "tokens0") == before:  # in the middle of a text
        time.sleep(0.005)
    hosts.cut()
    begun = time.monotonic()
    for node, process in enumerate(hosts.started):
        out, err = process.communicate(timeout=120)
        took = time.monotonic() - begun
        assert process.returncode not in (0, None)
        other = ("right", "left")[node]
        assert f" on {other})" in err, err
        assert "was silent for" in err, err
        assert "backend hierarchical" in out or ranks == 1, out
        assert took < TIMEOUT + ranks * POST_SECONDS + ENDING + BUSY, (took, out, err)
