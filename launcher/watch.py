"""Run the Commands of a job together: pass on output and signals, and let the first failure end all.

One thread, one poll(2): a process's end is a readable pidfd, a signal is a byte in a pipe, output is a readable
pipe. Nothing is looked at on a timer but the two deadlines of an ending job.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import time
from collections.abc import Mapping, Sequence

from .cause import BLAME_WINDOW, Ends, RankEnd, blame, first_cause, lost_a_peer
from .events import Leash, Signals
from .job import Command
from .output import HIGH_WATER, Sink
from .process import End, Guard, Process, Stream, signal_name

# After SIGKILL; what still lives then hangs in the kernel, and waiting longer would help nobody.
KILL_WAIT = 1.5
# So long another launcher has to end the other ranks itself; DeepSpeed's looks every second, Hydra not at all.
FOREIGN_WINDOW = 2.0
# So long may an `error: ` line wait for the end of its rank, and for the same line of the others: unloading libraries
# takes seconds on a busy machine.
HOLD = 5.0
# Where all deaths so far only follow from another, the cause may still be busy unloading its libraries.
CAUSE_WINDOW = 1.0

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_HINTS = {
    signal.SIGKILL: "if nobody sent it, the kernel or the container ran out of memory",
    signal.SIGBUS: "often a full /dev/shm or a file that shrank while it was mapped",
    signal.SIGILL: "this CPU lacks an instruction of the program",
}


def _hint(end: End) -> str:
    return f" ({_HINTS[signal.Signals(end.code)]})" if end.killed and end.code in _HINTS else ""


class Watch:
    """The job while it runs. `run()` once. `leash`: the end of stdin ends the job, as another launcher holds it.

    ends: what the ranks under another launcher tell of theirs, which then counts in the place of its own end.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        environ: Mapping[str, str],
        *,
        host: str,
        grace: float,
        leash: bool = False,
        ends: Ends | None = None,
    ) -> None:
        self._commands, self._environ, self._host, self._grace = commands, environ, host, grace
        self._leash = Leash() if leash else None
        self._ends = ends
        self._out, self._err = Sink(1), Sink(2)
        self._poll = selectors.PollSelector()  # epoll refuses regular files
        self._processes: list[Process] = []
        self._deaths: list[tuple[Process, End]] = []
        self._asked: int | None = None  # the signal that asked us to end
        self._deadline: float | None = None
        self._phase = "running"  # running, blaming, ending, killing
        self._waited_for_cause = False
        self._stopped: list[Process] = []  # what the dead waited for in vain

    def run(self) -> int:
        """Start everything, wait for its end and return the job's exit code; LaunchError if a start fails."""
        with Signals() as signals:
            self._poll.register(signals.fd, selectors.EVENT_READ, signals)
            if self._leash is not None:
                self._poll.register(self._leash.fd, selectors.EVENT_READ, self._leash)
            if self._ends is not None:
                self._poll.register(self._ends.fd, selectors.EVENT_READ, self._ends)
            guard = Guard()
            try:
                for command in self._commands:
                    self._start(command, guard)
                while self._alive() and not self._given_up():
                    self._step(signals)
            finally:
                broken = self._out.broken
                self._close(guard)
                self._poll.close()
        code = self._report(broken)
        self._flush()
        return code

    def _start(self, command: Command, guard: Guard) -> None:
        process = Process(command, self._environ, self._out, self._err)
        self._processes.append(process)
        self._poll.register(process.pidfd, selectors.EVENT_READ, process)
        guard.watch(process)

    # --- the loop

    def _alive(self) -> list[Process]:
        return [p for p in self._processes if p.end is None]

    def _given_up(self) -> bool:
        return self._phase == "killing" and self._deadline is None

    def _step(self, signals: Signals) -> None:
        self._interest()
        for key, _ in self._poll.select(self._timeout()):
            if isinstance(key.data, Process):
                self._ended(key.data)
            elif isinstance(key.data, Sink):
                key.data.flush_some()
            elif isinstance(key.data, Signals):
                for number in signals.read():
                    self._received(number)
            elif isinstance(key.data, Leash):
                if key.data.gone():
                    self._poll.unregister(key.fd)
                    self._begin_ending()
            elif isinstance(key.data, Ends):
                self._told(key.data)
            else:
                key.data.pump()
        if self._out.broken and self._phase in ("running", "blaming"):
            self._begin_ending()  # nobody reads the answer: end as SIGPIPE would
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline_passed()
        for stream in self._holding():
            if stream.held_since is not None and time.monotonic() >= stream.held_since + HOLD:
                stream.release()

    def _timeout(self) -> float | None:
        """Return the seconds until something must be done though nothing happens, None for never."""
        moments = [stream.held_since + HOLD for stream in self._holding() if stream.held_since is not None]
        moments += [] if self._deadline is None else [self._deadline]
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _holding(self) -> list[Stream]:
        """Return the streams of living ranks that hold a line back; those of others wait for the report."""
        return [s for process in self._alive() for s in process.streams if s.held_since is not None]

    def _interest(self) -> None:
        """Poll exactly what can make progress: sinks with something to write, pipes if there is room for it."""
        registered = {key.fd: key for key in self._poll.get_map().values()}
        wanted: dict[int, tuple[object, int]] = {}
        for sink in (self._out, self._err):
            if sink.waiting:
                wanted[sink.fd] = (sink, selectors.EVENT_WRITE)
        if max(self._out.waiting, self._err.waiting) < HIGH_WATER:
            for process in self._processes:
                for stream in process.streams:
                    if not stream.pipe.closed:
                        wanted[stream.pipe.fileno()] = (stream, selectors.EVENT_READ)
        for fd, key in registered.items():
            if not isinstance(key.data, Process | Signals | Leash | Ends) and (
                fd not in wanted or wanted[fd][0] is not key.data
            ):
                self._poll.unregister(fd)
        for fd, (data, events) in wanted.items():
            if fd not in self._poll.get_map():
                self._poll.register(fd, events, data)

    # --- what happens

    def _ended(self, process: Process) -> None:
        end = process.look()
        if end is None:
            return
        self._poll.unregister(process.pidfd)
        if self._phase not in ("running", "blaming"):
            return
        if self._asked is not None:
            # The others have the signal, too. A second one would hit a rank that is on its way out.
            self._phase, self._deadline = "ending", time.monotonic() + self._grace
        elif not end.ok:
            self._deaths.append((process, end))
            if self._phase == "running" or self._waited_for_cause:
                self._phase, self._deadline = "blaming", time.monotonic() + BLAME_WINDOW

    def _told(self, ends: Ends) -> None:
        """Let a rank's failure under another launcher end the job, if that launcher does not do it in time."""
        if first_cause(ends.read()) is not None and self._phase == "running" and self._asked is None:
            self._phase, self._deadline = "blaming", time.monotonic() + FOREIGN_WINDOW

    def _received(self, number: int) -> None:
        if number == signal.SIGTSTP:
            self._suspend()
        elif number not in _ENDING:
            self._send(number)
        elif self._asked is None:
            self._asked = number
            self._send(number)
        elif number == signal.SIGINT:
            self._begin_killing()
        else:
            self._begin_ending()

    def _suspend(self) -> None:
        """Stop the ranks and the launcher as Ctrl-Z asks, and go on with them when the shell says so."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _deadline_passed(self) -> None:
        if self._phase == "blaming":
            lost = bool(self._deaths) and all(self._lost())
            self._stopped = [process for process in self._alive() if process.is_stopped()] if lost else []
            if lost and self._alive() and not self._stopped and not self._waited_for_cause:
                self._waited_for_cause = True
                self._deadline = time.monotonic() + CAUSE_WINDOW
                return
            self._begin_ending()
        elif self._phase == "ending":
            self._begin_killing()
        else:
            self._deadline = None

    def _begin_ending(self) -> None:
        if self._phase in ("running", "blaming"):
            self._phase, self._deadline = "ending", time.monotonic() + self._grace
            for process in self._alive():
                process.ask(signal.SIGTERM)
            self._send(signal.SIGCONT)  # a stopped rank takes SIGTERM only when it goes on

    def _begin_killing(self) -> None:
        self._phase, self._deadline = "killing", time.monotonic() + KILL_WAIT
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in self._alive():
            process.signal(number)

    # --- the end

    def _close(self, guard: Guard) -> None:
        """Close every process that has ended; what is alive gets SIGKILL and a last wait."""
        self._send(signal.SIGKILL)
        give_up = time.monotonic() + KILL_WAIT
        with selectors.PollSelector() as poll:
            for process in self._alive():
                poll.register(process.pidfd, selectors.EVENT_READ, process)
            while poll.get_map() and time.monotonic() < give_up:
                for key, _ in poll.select(max(0.0, give_up - time.monotonic())):
                    key.data.look()
                    poll.unregister(key.fd)
        over = [p for p in self._processes if p.end is not None]
        for process in over:
            process.signal(signal.SIGKILL)  # what it started and left behind
        guard.close(over)
        for process in over:
            process.close()

    def _flush(self) -> None:
        for sink in (self._out, self._err):
            while sink.waiting:
                with selectors.PollSelector() as poll:
                    poll.register(sink.fd, selectors.EVENT_WRITE)
                    poll.select()
                sink.flush_some()

    def _report(self, broken: bool) -> int:
        """Say on stderr why the job ended, unless all went well; return its exit code."""
        for process in self._alive():
            self._say(f"{self._who(process)} did not end on SIGKILL: it hangs in the kernel")
        self._tell_last_words()
        if self._ends is not None and self._asked is None and (told := first_cause(self._ends.read())) is not None:
            return self._report_told(*told)
        if self._deaths:
            return self._report_failure()
        failed = [p.end for p in self._processes if p.end is None or not p.end.ok]
        if self._asked is not None:
            if failed:
                self._say(f"interrupted by {signal_name(self._asked)}")
            return 128 + self._asked if failed else 0
        if self._leash is not None and self._leash.over and failed:
            return 128 + signal.SIGHUP  # whoever held it knows why
        return 128 + signal.SIGPIPE if broken else 0

    def _tell_last_words(self) -> None:
        """Write what ranks said at their end once, with the ranks that said it."""
        said: dict[bytes, list[str]] = {}
        for process in self._processes:
            lines = [line for stream in process.streams for line in stream.last_words()]
            # A rank that repeats what it was told puts the teller in front.
            whole = [re.sub(rb"^(error: )rank \d+: ", rb"\1", line).rstrip(b"\r\n") for line in lines]
            process.spoke = bool(lines)
            for line in dict.fromkeys(whole):
                said.setdefault(line, []).append(process.command.name)
        for line, names in said.items():
            prefix = b"" if len(self._processes) == 1 else f"[{','.join(names)}] ".encode()
            self._err.write(prefix + line + b"\n")

    def _lost(self) -> list[bool]:
        return [lost_a_peer(end, process.tail.lines()) for process, end in self._deaths]

    def _report_failure(self) -> int:
        process, end = self._deaths[blame([end for _, end in self._deaths], self._lost())]
        sentence = f"{self._who(process)} {end.describe()}"
        for stopped in self._stopped:
            sentence = f"{self._who(stopped)} was stopped by a signal and held up the others: {sentence}"
        sentence += _hint(end)
        if len(self._processes) > 1:
            sentence += ", so the job was ended"
        also = [f"{p.title} {e.describe()}" for p, e in self._deaths if p is not process]
        if also:
            sentence += f"; at the same time {', '.join(also)}"
        # A rank's last lines are hidden among the others'; those of another launcher stand above as they were.
        own = process.command.rank is not None and process.command.prefix is not None
        lines = process.tail.lines() if own and not process.spoke else []
        if lines:
            sentence += "; the last lines of its stderr:" + "".join(f"\n  {line}" for line in lines)
        self._say(sentence)
        return end.exit_code

    def _report_told(self, cause: RankEnd, others: Sequence[RankEnd]) -> int:
        """Name the rank that failed under another launcher, and return its code."""
        sentence = f"rank {cause.rank} (pid {cause.pid} on host {cause.host}) {cause.end.describe()}{_hint(cause.end)}"
        sentence += ", so the job was ended"
        if others:
            sentence += f"; at the same time {', '.join(f'rank {e.rank} {e.end.describe()}' for e in others)}"
        self._say(sentence)
        return cause.end.exit_code

    def _who(self, process: Process) -> str:
        return f"{process.title} (pid {process.pid} on host {self._host})"

    def _say(self, sentence: str) -> None:
        self._err.write(f"dist-lowbit run: {sentence}\n".encode())
