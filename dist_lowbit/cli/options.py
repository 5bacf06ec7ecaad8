"""Options that several verbs have, each written once: `temperature: Temperature = 0.8`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_lowbit.core.errors import UsageError


def _directory(word: str) -> Path:
    if not word:  # which pathlib takes for the current directory
        raise UsageError("the directory of the checkpoint is an empty string; expected a low-bit checkpoint")
    return Path(word)


Checkpoint = Annotated[Path, typer.Argument(help="A low-bit checkpoint.", parser=_directory)]
Ranks = Annotated[
    int | None, typer.Option("-n", help="Ranks to start. Default: those this process was started with, else one.")
]
Bind = Annotated[str, typer.Option(help="Bind ranks to: auto, none, core, numa, socket.")]
Device = Annotated[str, typer.Option(help="Run on cpu, cuda or xpu, each rank on one.")]
Decoder = Annotated[
    str | None,
    typer.Option(help="auto, native (compiled), torch, or off (Hugging Face's forward). Default: DIST_LOWBIT_DECODER."),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(help="Of the decoder's cache: auto, fp32, fp16, bf16, int8. Default: DIST_LOWBIT_KV_CACHE_DTYPE."),
]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run Python code that comes with the model.")]

Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")]
Temperature = Annotated[float, typer.Option(help="Flattens (above 1) or sharpens the distribution.")]
TopK = Annotated[int, typer.Option(help="Draw from so many most likely tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Draw from the most likely tokens of so much probability.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def check_greedy(context: typer.Context) -> None:
    """Refuse options of drawing beside --greedy, which has no use for them."""
    for name in ("temperature", "top_k", "top_p", "seed"):
        source = context.get_parameter_source(name)
        if context.params["greedy"] and source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                f"{name} is {context.params[name]}, and --greedy always takes the most likely token; leave one of the "
                "two out",
                argument=name,
            )
