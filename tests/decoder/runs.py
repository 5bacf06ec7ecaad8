"""Programs run step by step: helpers for the ranks and for the tests."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_lowbit.assembly.build import state_of
from dist_lowbit.comm import Group
from dist_lowbit.decoder.blocks import BlockTables
from dist_lowbit.decoder.build_program import build_program
from dist_lowbit.decoder.native import NativeDecoder
from dist_lowbit.decoder.program import Program
from dist_lowbit.decoder.step import Executor, Step
from dist_lowbit.decoder.torch_decoder import TorchDecoder
from dist_lowbit.optimize import optimize_model
from dist_lowbit.transformers import AutoModelForCausalLM
from tests.decoder import plain_forwards
from tests.decoder.tiny_families import tiny_model

EXECUTORS: dict[str, type[Executor]] = {"torch": TorchDecoder, "native": NativeDecoder}
PROMPT = [1, 5, 17, 80, 33, 99, 4, 4, 62, 9, 21, 50]
FORCED = [7, 55, 98, 3]  # decode steps with given tokens
SHORT = PROMPT[2:9]
TEXT = PROMPT + FORCED


def program_of(model: Any, group: Group) -> Program:
    """Return the program of a model that was built low-bit."""
    state = state_of(model)
    assert state is not None
    assert state.target.family is not None, type(model)
    return build_program(model, state.target.family, state.target.plan, group)


def tiny_program(name: str, form: str, compute: str, group: Group) -> tuple[Any, Program]:
    """Return a rank's tiny model in a format, and its program."""
    model = low_bit_model(name, form, compute, group)
    return model, program_of(model, group)


def low_bit_model(name: str, form: str, compute: str, group: Group, decoder: str = "auto") -> Any:
    """Return a rank's tiny model in a format: of tiny_families, or of plain_forwards, which exists as files only."""
    if name not in plain_forwards.MODELS:
        return optimize_model(tiny_model(name), form, group=group, compute=compute, decoder=decoder)
    with tempfile.TemporaryDirectory() as folder:
        plain_forwards.write_files(Path(folder), name)
        return AutoModelForCausalLM.from_pretrained(
            folder, load_in_low_bit=form, compute=compute, tensor_parallel=group, decoder=decoder
        )


def padded_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return what a model is called with for the prompt and a shorter row, padded on the left."""
    pads = len(PROMPT) - len(SHORT)
    mask = torch.tensor([[1] * len(PROMPT), [0] * pads + [1] * len(SHORT)])
    inputs = {"input_ids": torch.tensor([PROMPT, [0] * pads + SHORT]), "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


class Runner:
    """Sequences of one program, run by one executor."""

    def __init__(self, program: Program, executor: str, sequences: int, kv: str = "fp32") -> None:
        self.executor: Any = EXECUTORS[executor](program)  # type: ignore[call-arg]
        self.tables = BlockTables(program, kv)
        self.tables.start(sequences)

    def step(self, parts: Sequence[tuple[int, Sequence[int]]], logits: bool = True) -> list[torch.Tensor]:
        """Append tokens to some sequences in one step; return each one's logits [tokens, vocab]."""
        positions = []
        for sequence, tokens in parts:
            start = self.tables.lengths[sequence]
            positions.append(torch.arange(start, start + len(tokens)))
            self.tables.extend(sequence, len(tokens))
        chosen = [sequence for sequence, _ in parts]
        counts = [len(tokens) for _, tokens in parts]
        step = Step(
            ids=torch.tensor([token for _, tokens in parts for token in tokens], dtype=torch.int32),
            embeds=None,
            positions=torch.cat(positions).to(torch.int32),
            row_begin=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            lengths=torch.tensor([self.tables.lengths[s] for s in chosen], dtype=torch.int32),
            table=self.tables.table(chosen),
            wanted=torch.arange(sum(counts)),
            store=self.tables.store,
        )
        return list(self.executor.step(step, logits).split(counts))


def run_alone(program: Program, executor: str, tokens: Sequence[int], chunks: Sequence[int], kv: str = "fp32") -> Any:
    """Return the logits [T, vocab] of one sequence run in chunks."""
    runner, parts, at = Runner(program, executor, 1, kv), [], 0
    for count in chunks:
        parts += runner.step([(0, tokens[at : at + count])])
        at += count
    return torch.cat(parts)


def run_in_company(program: Program, executor: str, tokens: Sequence[int], chunks: Sequence[int]) -> Any:
    """Return the logits of one sequence of a batch of seven, whose steps mix prefill chunks and decode rows."""
    runner, parts, at = Runner(program, executor, 7), [], 0
    others: list[list[int]] = [[(7 * i + 3 * j) % 97 + 3 for j in range(1 + 4 * i)] for i in range(6)]
    for number, count in enumerate(chunks):
        company = [(i + (i >= 3), rest if number == 0 else rest[:1]) for i, rest in enumerate(others)]
        company.insert(3, (3, list(tokens[at : at + count])))
        parts.append(runner.step(company)[3])
        at += count
    return torch.cat(parts)
