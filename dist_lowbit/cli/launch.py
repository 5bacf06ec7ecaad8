"""Start the same command once per rank, after every check that needs no model in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dist_lowbit.core.errors import UsageError
from dist_lowbit.core.settings import check_choice


def check_choices(decoder: str | None, kv_cache_dtype: str | None) -> None:
    """Refuse a decoder or a cache's dtype that there is none of, before anything is imported or started."""
    for name, value in (("decoder", decoder), ("kv_cache_dtype", kv_cache_dtype)):
        if value is not None:
            check_choice(name, name, value)


def start_ranks(directory: Path, ranks: int | None, bind: str, words: Sequence[str], device: str = "cpu") -> int | None:
    """Run a command line once per rank through the launcher and return its exit code; None where this process is one.

    directory: the low-bit language model to run. ranks: what -n said. words: the command line; the ranks read the same.
    device: cpu, or what each rank is shown one of. Rank 0 has this terminal. What does not fit is a UsageError, before
    anything heavy is imported or started.
    """
    check_settings(device)
    _check_model(directory)
    if ranks is not None and not started():
        _check_ranks(directory, ranks)
    return launch_ranks(ranks, bind, words, device=device)


def started() -> bool:
    """Return whether a launcher started this process."""
    from dist_lowbit.core.rank import discover

    return discover(os.environ).source != "none"


def launch_ranks(
    ranks: int | None, bind: str, words: Sequence[str], option: str = "-n", device: str = "cpu"
) -> int | None:
    """Run a command line once per rank (see start_ranks); `option` is the name under which ranks were asked for."""
    from dist_lowbit.core.rank import discover

    if started():
        size = discover(os.environ).world_size
        if ranks not in (None, size):
            raise UsageError(f"{option} is {ranks}, but this job has {size} rank(s); leave {option} out inside a job")
        return None
    if ranks is not None and ranks < 1:
        raise UsageError(f"{option} is {ranks}; expected at least 1 rank")
    if ranks in (None, 1) and bind in ("none", "auto"):
        return None

    from dist_lowbit.launcher.__main__ import main as launch

    shown = device.partition(":")[0]
    return launch(
        ["-n", str(ranks or 1), "--bind", bind, "--device", shown, "--no-prefix", "-m", "dist_lowbit.cli", *words]
    )


def check_settings(device: str = "cpu") -> None:
    """Refuse settings and a device that only a rank would meet, after seconds of loading."""
    from dist_lowbit.comm.backends import BACKENDS
    from dist_lowbit.core.native import native
    from dist_lowbit.core.settings import settings
    from dist_lowbit.ops import isas, usable_device

    given = settings()
    if given.backend not in ("auto", *BACKENDS):
        raise UsageError(f"DIST_LOWBIT_BACKEND is {given.backend!r}; expected auto, {', '.join(BACKENDS)}")
    usable_device(device)
    native()  # raises for a library that was asked for by name and does not open
    if given.isa != "auto":
        isas()  # raises for an instruction set that is unknown or that this CPU lacks


def _check_model(directory: Path) -> None:
    from dist_lowbit.assembly.paths import require_checkpoint

    if not (require_checkpoint(directory) / "config.json").is_file():
        raise UsageError(f"{directory} has no config.json, so it is no language model; load it with load_low_bit")


def _check_ranks(directory: Path, ranks: int) -> None:
    from dist_lowbit.checkpoint import CheckpointReader
    from dist_lowbit.parallel.units import count

    if ranks < 1:
        raise UsageError(f"-n is {ranks}; expected at least 1 rank")
    if ranks == 1:
        return
    with CheckpointReader(directory) as reader:
        units = reader.metadata.get("units", {})
        summed = [weight for weight in reader.weights.values() if weight.axis == 1]
        most = max((count(w.shape[1], units.get(w.name.removesuffix(".weight"), 1)) for w in summed), default=None)
    if most is not None and ranks > most:
        raise UsageError(f"-n is {ranks}, but this model has work for at most {most} ranks")
    cpus = len(os.sched_getaffinity(0))
    if most is None and ranks > cpus:  # every rank holds the whole model
        raise UsageError(f"-n is {ranks}, but this model cannot be split, and there are {cpus} CPUs to copy it to")
