"""The options of the command line, and where they end and the program begins."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import NoReturn

from .binding import MEMORIES, MODES
from .devices import KINDS
from .errors import LaunchError
from .runners import RUNNERS

USAGE = """%(prog)s -n N [options] script.py [args ...]
       %(prog)s -n N [options] -m module [args ...]
       %(prog)s -n N [options] [--no-python] [--] program [args ...]"""

FLAGS = {"--hyper-threads", "--dry-run", "--no-prefix", "--no-python", "--no-mask", "--leash", "-h", "--help"}
SSH = "ssh -o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LaunchError(message)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of what stands before the program."""
    parser = _Parser(
        prog="dist-lowbit run",
        usage=USAGE,
        allow_abbrev=False,
        description="Start N ranks of a program on each host, bound to their cores and memory; the first that "
        "fails ends all.",
    )
    _where(parser.add_argument_group("ranks and hosts"))
    _place(parser.add_argument_group("cores, memory, devices"))
    _environment(parser.add_argument_group("environment and output"))
    add = parser.add_argument
    add("--style", choices=list(RUNNERS), default="local", help="who starts the ranks (default: local, the launcher)")
    add("--dry-run", action="store_true", help="print each rank's environment, cores and command; start nothing")
    add("--grace", metavar="SECONDS", default="3", help="from SIGTERM to SIGKILL when the job must end (default: 3)")
    add("--no-python", action="store_true", help="run the program as it is, even if it ends in .py")
    add("-m", dest="module", metavar="module", help="run a module, as python -m does; ends the options")
    return parser


def _where(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-n", dest="ranks", metavar="N", help="number of ranks on each host; auto: one for each NUMA node, or for each "
        "GPU with --device; with --nnodes also a list such as 2,4")  # fmt: skip
    add("--hosts", metavar="a:2,b:2", help="hosts and their ranks; this launcher starts them all, those that are not "
        "this host by ssh")  # fmt: skip
    add("--hostfile", metavar="FILE", help="the same from lines such as `a slots=2` or `a:2`")
    add("--ssh", metavar="COMMAND", default=SSH, help=f"how to start on another host (default: {SSH})")
    add("--nnodes", metavar="K", help="number of hosts, where this command is started on each with its --node-rank")
    add("--node-rank", metavar="R", help="which of the --nnodes hosts this is, from 0")
    add(
        "--master-addr", metavar="ADDRESS", help="where rank 0 is reached (default: this host, or the first of --hosts)"
    )
    add("--master-port", metavar="P", help="port of the rendezvous (default: a free one)")
    add("--instances", metavar="K", help="start K independent groups of N ranks on disjoint cores")
    add("--launch-id", help=argparse.SUPPRESS)  # what the launcher tells those that it starts on other hosts
    add("--leash", action="store_true", help=argparse.SUPPRESS)


def _place(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--bind", choices=MODES, default="auto", help="what a rank gets whole pieces of; auto: NUMA nodes where each "
        "rank gets as many, else cores, else (more ranks than cores) none")  # fmt: skip
    add("--hyper-threads", action="store_true", help="bind to all hyper-threads of a core, not to its first")
    add("--memory", choices=MEMORIES, default="near", help="hbm: memory comes first from the nodes without cores (HBM "
        "in flat mode)")  # fmt: skip
    add("--device", choices=KINDS, default="cpu", help="xpu, cuda: show each rank one GPU, and bind it near to it")
    add("--no-mask", action="store_true", help="with --device: leave ZE_AFFINITY_MASK and CUDA_VISIBLE_DEVICES alone, "
        "so that each rank sees all GPUs")  # fmt: skip
    add("--topology", metavar="FILE", help="with --dry-run: the machine recorded in FILE by lscpu -p=CPU,CORE,SOCKET,"
        "NODE, or from sysfs, instead of this one")  # fmt: skip


def _environment(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--env", metavar="K=V", action="append", default=[], help="set a variable for all ranks; may be repeated")
    add("-x", dest="forward", metavar="NAME", action="append", default=[], help="hand a variable of this host to the "
        "ranks of all hosts; may be repeated")  # fmt: skip
    add("--log-dir", metavar="DIR", help="write each rank's output to DIR/rankR.out and .err as well")
    add("--no-prefix", action="store_true", help="give rank 0 the terminal: no [0] before its lines, no waiting for "
        "whole ones")  # fmt: skip


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the launcher's own options and the rest: the program and its arguments, which nobody else may read."""
    i = 0
    while i < len(argv):
        word = argv[i]
        if word == "--":
            return list(argv[:i]), list(argv[i + 1 :])
        if not word.startswith("-") or word == "-":
            break
        if word == "-m":
            return list(argv[: i + 2]), list(argv[i + 2 :])
        i += _width(word)
    return list(argv[:i]), list(argv[i:])


def _width(word: str) -> int:
    attached = "=" in word or (word[:2] in ("-n", "-x") and len(word) > 2)
    return 1 if word in FLAGS or attached else 2


def without(own: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the launcher's own options but those in `names`, with their values."""
    kept: list[str] = []
    i = 0
    while i < len(own):
        word = own[i]
        width = _width(word)
        name = word[:2] if word[:2] in ("-n", "-x") else word.partition("=")[0]
        if name not in names:
            kept += own[i : i + width]
        i += width
    return kept


def number(name: str, text: str, low: int, high: int) -> int:
    """Return the whole number of an option; LaunchError for another text or one out of range."""
    try:
        value = int(text)
    except ValueError:
        raise LaunchError(f"{name} {text} is no whole number") from None
    if not low <= value <= high:
        raise LaunchError(f"{name} {text} is out of range: expected {low} to {high}")
    return value


def command(name: str, text: str) -> list[str]:
    """Return the words of an option that is a command; LaunchError for none, or for quotes that do not close."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise LaunchError(f"{name} {text} is no command ({error})") from None
    if not words:
        raise LaunchError(f"{name} is empty; expected a command such as `ssh -p 2222`")
    return words


def seconds(text: str) -> float:
    """Return the seconds of --grace."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise LaunchError(f"--grace {text} is no number of seconds from 0 to 3600")
    return value
