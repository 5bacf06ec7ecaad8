"""A peer in a process of its own: its threads sleep while ours run, and its environment can be chosen.

One JSON object a line each way: a request to the child's stdin, the answer from its stdout. An answer with `error` is
raised here; what the child prints otherwise goes to stderr.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dist_lowbit.core.errors import DistLowbitError, UsageError


class Child:
    """A script that answers requests (see the module). Close it, or use it as a context."""

    def __init__(
        self, name: str, script: Path, cpus: Sequence[int], environ: Mapping[str, str], deadline: float = 600.0
    ) -> None:
        """name: of the peer, for messages. cpus: what the child may run on, a thread each. deadline: seconds within
        which each answer must come.
        """
        self._name, self._deadline = name, deadline
        threads = str(len(cpus))
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        # -P: the script's folder holds names that are none of the child's business.
        command = [sys.executable, "-P", str(script), ",".join(map(str, cpus))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **limits, **environ},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request; a UsageError where the child says that it cannot be honoured."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None
        ready, _, _ = select.select([self._process.stdout], [], [], self._deadline)
        if not ready:
            raise DistLowbitError(f"the peer {self._name} was silent for {self._deadline:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UsageError(f"the peer {self._name} cannot be measured: {answer['error']}")
        return answer

    def _gone(self) -> DistLowbitError:
        code = self._process.wait(timeout=self._deadline)
        return DistLowbitError(f"the peer {self._name} ended with code {code}; its last words are above")

    def close(self) -> None:
        """End the child."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
