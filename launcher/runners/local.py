"""The launcher's own style: it starts and watches each rank itself."""

from __future__ import annotations

import os

from ..job import Command, Job


class LocalRunner:
    """Starts the ranks of one machine. Needs nothing."""

    name = "local"

    def backend_exists(self) -> bool:
        return True

    def why_not(self) -> str | None:
        return None

    def command(self, job: Job) -> list[Command]:
        """Return one Command per rank."""
        return [
            Command(
                name=str(spec.rank),
                argv=spec.command,
                env=spec.env,
                rank=spec.rank,
                cpus=spec.cpus,
                nodes=spec.nodes,
                prefix=job.prefix or spec.rank != 0,
                log=os.path.join(job.log_dir, f"rank{spec.rank}") if job.log_dir else None,
            )
            for spec in job.ranks
        ]
