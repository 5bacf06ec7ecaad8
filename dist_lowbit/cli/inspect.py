"""dist-lowbit inspect."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer

from .options import Checkpoint


def inspect(
    directory: Checkpoint,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and check it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a low-bit checkpoint holds: modules, formats, shards and bytes."""
    from rich.console import Console
    from rich.table import Table

    from dist_lowbit.assembly.paths import require_checkpoint
    from dist_lowbit.checkpoint import CheckpointReader, describe
    from dist_lowbit.checkpoint import verify as verify_all

    path = require_checkpoint(directory)
    rows = describe(path)
    with CheckpointReader(path) as reader:
        head: dict[str, Any] = {
            "model": reader.metadata.get("model_class"),
            "recipe": reader.metadata.get("recipe"),
            "tp": reader.tp,
            "producer": reader.producer,
            "files": [{"name": file.name, "bytes": file.bytes} for file in reader.files],
        }
    report = verify_all(path) if verify else None
    if as_json:
        found = None if report is None else dataclasses.asdict(report)
        print(json.dumps(head | {"tensors": [dataclasses.asdict(row) for row in rows], "verified": found}))
    else:
        recipe = head["recipe"] or {}
        form = f"{recipe.get('format')} in groups of {recipe.get('group_size')}"
        table = Table(title=f"{path}: {head['model']}, {form}, {head['tp']} rank file(s)")
        for name in ("tensor", "format", "group", "shape", "cut along", "shards (file: range)", "bytes"):
            table.add_column(name, overflow="fold")
        for row in rows:
            shards = " ".join(f"{file}:{start}-{stop}" for file, start, stop in row.ranges)
            axis = "" if row.axis is None else "NK"[row.axis]
            group = "" if row.group_size in (None, -1) else str(row.group_size)
            shape = " x ".join(map(str, row.shape))
            table.add_row(row.name, row.format, group, shape, axis, shards, f"{row.bytes:,}")
        console = Console() if sys.stdout.isatty() else Console(width=200)
        console.print(table)
        console.print(f"{len(rows)} tensors, {sum(row.bytes for row in rows):,} bytes in {len(head['files'])} file(s)")
    if report is not None:
        if not as_json:
            for problem in report.problems:
                print(f"error: {problem}", file=sys.stderr)
            for name in report.unlisted:
                print(f"{name} belongs to no checkpoint: a save was cut off; it can be removed")
            if report.ok:
                print(f"every checksum fits: {report.blocks} blocks, {report.bytes:,} bytes")
        if not report.ok:
            raise typer.Exit(2)
