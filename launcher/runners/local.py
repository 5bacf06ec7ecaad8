"""The launcher's own style: it starts and watches each rank itself."""

from __future__ import annotations

import os

from ..job import Command, Job, RankSpec


class LocalRunner:
    """Starts the ranks of one machine. Needs nothing."""

    name = "local"

    def backend_exists(self) -> bool:
        return True

    def why_not(self) -> str | None:
        return None

    def command(self, job: Job) -> list[Command]:
        """Return one Command per rank."""
        return [_rank(job, spec) for spec in job.ranks]


def _rank(job: Job, spec: RankSpec) -> Command:
    name = f"{job.name}.{spec.rank}" if job.name else str(spec.rank)
    return Command(
        name=name,
        argv=spec.command,
        env=spec.env,
        rank=spec.rank,
        title=f"rank {spec.rank}" + (f" of instance {job.name}" if job.name else ""),
        cpus=spec.cpus,
        nodes=spec.nodes,
        prefer=spec.prefer,
        prefix=None if spec.rank == 0 and not job.prefix and not job.name else f"[{name}] ",
        stdin="own" if spec.rank == 0 and job.stdin and not job.name else "none",
        log=os.path.join(job.log_dir, f"rank{name}") if job.log_dir else None,
    )
