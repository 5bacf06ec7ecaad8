"""dist-lowbit convert."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .options import TrustRemoteCode


def convert(
    model: Annotated[str, typer.Argument(help="A model directory, or a hub id.")],
    out: Annotated[str, typer.Argument(help="The directory to write the checkpoint into.")],
    low_bit: Annotated[str, typer.Option(help="The format of the weights.")] = "sym_int4",
    tp: Annotated[int, typer.Option(help="How many rank files to write; any number of ranks can load them.")] = 1,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: a multiple of 32, or -1 for a whole row.")
    ] = None,
    modules_to_not_convert: Annotated[
        list[str] | None, typer.Option(help="Keep these in high precision: part of a name, or a glob. Repeatable.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantize a model into a low-bit checkpoint, tensor by tensor."""
    from dist_lowbit.assembly.hub import resolve
    from dist_lowbit.assembly.paths import check_conversion, expand, require_path
    from dist_lowbit.quantize import Recipe

    started = time.monotonic()
    recipe = Recipe(low_bit, group_size, modules_to_not_convert or ())
    require_path(model, "convert", "a model and a directory to write", "the model")
    directory = Path(require_path(out, "convert", "a model and a directory to write"))
    check_conversion(expand(model), directory, tp)  # before a download
    source = resolve(model, revision)

    from dist_lowbit.assembly.convert import convert as convert_model

    convert_model(source, directory, recipe, tp, trust_remote_code=trust_remote_code)
    size = sum(path.stat().st_size for path in directory.glob("lowbit-*.safetensors"))
    typer.echo(f"{out}: {low_bit}, {tp} rank file(s), {size / 1e6:.1f} MB in {time.monotonic() - started:.1f} s")
