"""What the ranks of tests/decoder do. Each body runs on every rank and returns JSON values; tensors go to files."""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

import torch
from safetensors.torch import save_file

from dist_lowbit import transformers as low_bit
from dist_lowbit.comm import init_group
from dist_lowbit.core.errors import CommError, UsageError
from dist_lowbit.decoder.native import NativeDecoder
from dist_lowbit.engine.loop import backbone_of
from dist_lowbit.optimize import optimize_model
from tests.comm.harness import Job
from tests.decoder.program_kinds import KINDS, ROUTED
from tests.decoder.runs import (
    EXECUTORS,
    FORCED,
    PROMPT,
    SHORT,
    TEXT,
    Runner,
    low_bit_model,
    padded_inputs,
    program_of,
    run_alone,
    run_in_company,
    tiny_program,
)
from tests.decoder.tiny_families import tiny_model
from tests.decoder.tiny_programs import Builder, mixed
from tests.decoder.tiny_programs import Runner as TinyRunner
from tests.e2e.bodies import digest, make

STEPS = [len(PROMPT)] + [1] * len(FORCED)
LONG = [20, 5, 1, 1, 1, 1, 1, 2]


@torch.inference_mode()
def close_to_exact(job: Job) -> Any:
    """Run each family in fp16 weights and fp32: a prompt and given tokens, then a batch of two lengths."""
    with init_group() as group:
        for name in job.args["families"]:
            _, program = tiny_program(name, "fp16", "fp32", group)
            for executor in job.args["executors"]:
                found = {"text": run_alone(program, executor, TEXT, STEPS)}
                _, short = Runner(program, executor, 2).step([(0, PROMPT), (1, SHORT)])
                found["short"] = short.contiguous()
                model = low_bit_model(name, "fp16", "fp32", group, executor)
                assert isinstance(backbone_of(model).executor, EXECUTORS[executor])
                logits = model(**padded_inputs(model)).logits
                found["padded"], found["beside"] = logits[1, -len(SHORT) :].clone(), logits[0].clone()
                if group.rank == 0:
                    save_file(found, str(job.folder / f"{name} {executor}.safetensors"))
    return None


@torch.inference_mode()
def same_bits(job: Job) -> Any:
    """Run each family in sym_int4 in several ways; return the digests of its logits."""
    result: dict[str, dict[str, str]] = {}
    with init_group() as group:
        for name in job.args["families"]:
            _, program = tiny_program(name, "sym_int4", "int8", group)
            for executor in job.args["executors"]:
                result[f"{name} {executor}"] = {
                    "alone": digest(run_alone(program, executor, TEXT, STEPS)),
                    "whole": digest(run_alone(program, executor, TEXT, [len(TEXT)])),
                    "chunks": digest(run_alone(program, executor, TEXT, [5, 1, 7, 3])),
                    "company": digest(run_in_company(program, executor, TEXT, [6, 1, 6, 1, 2])),
                }
                if any(rope.dynamic for rope in program.ropes):  # beyond the length that changes frequencies
                    result[f"{name} {executor} long"] = {
                        "alone": digest(run_alone(program, executor, 2 * TEXT, LONG)),
                        "company": digest(run_in_company(program, executor, 2 * TEXT, LONG)),
                    }
    return result


@torch.inference_mode()
def lose_a_rank(job: Job) -> Any:
    """Leave in the middle of the work, as rank 1; return what rank 0 hears of it, and how long it had waited."""
    kind = KINDS[0]
    group = init_group(timeout=20.0)
    program = Builder(kind, group).program()
    runner = TinyRunner(NativeDecoder(program), program, 1)
    runner.feed({0: [3, 5]})
    if group.rank == 1:
        time.sleep(0.2)
        runner.feed({0: [7]})
        group.close()
        return None
    runner.feed({0: [7]})
    times = runner.executor.times()
    heard = []
    for _ in range(2):
        try:
            runner.feed({0: [9]})
        except CommError as error:
            heard.append(str(error))
    group.close()
    return {"wait": times.wait, "reduce": times.reduce, "heard": heard}


@torch.inference_mode()
def native_digests(job: Job) -> Any:
    """Run tiny programs with the executor in C++; return the digests of their logits."""
    result = {}
    with init_group() as group:
        for kind in (*KINDS, *ROUTED):
            if kind.name in job.args["kinds"]:
                program = Builder(kind, group).program()
                result[kind.name] = digest(mixed(NativeDecoder(program), kind, program))
    return result


@torch.inference_mode()
def three_ways(job: Job) -> Any:
    """Make each model live, from its files, and from what was saved or converted; return the digests of its logits."""
    result: dict[str, dict[str, str]] = {}
    with init_group() as group:
        for name, directory in job.args["models"].items():
            found = {}
            for way in ("live", "files", "saved", "converted"):
                if way == "converted":
                    model = low_bit.AutoModelForCausalLM.load_low_bit(
                        job.args["converted"][name], tensor_parallel=group
                    )
                else:
                    model = make(way, directory, job.folder / name, "sym_int4", "int8", group)
                found[way] = digest(run_alone(program_of(model, group), "torch", TEXT, STEPS))
            result[name] = found
    return result


@torch.inference_mode()
def hugging_face_forward(job: Job) -> Any:
    """Run Hugging Face's own forward over swapped and cut modules; return its logits from rank 0."""
    with init_group() as group:
        for name in job.args["families"]:
            model: Any = optimize_model(tiny_model(name), "fp16", group=group, compute="fp32", optimize_llm=False)
            found = {"text": model(torch.tensor([TEXT]), use_cache=False).logits[0]}
            if group.rank == 0:
                save_file(found, str(job.folder / f"{name}.safetensors"))
    return None


@torch.inference_mode()
def other_tokens(job: Job) -> Any:
    """Draw samples with a seed of each rank's own, then with one; return what was said and drawn."""
    said: list[str] = []
    with init_group() as group:
        model = low_bit_model("llama", "sym_int4", "fp32", group)
        drawn: list[int] = []
        for seed in (group.rank, 7):
            torch.manual_seed(seed)
            ids = torch.tensor([TEXT])
            try:
                out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=12)
                drawn = out[0].tolist()
            except UsageError as error:
                said.append(str(error))
        for width in (3, 3 + group.rank):
            try:
                model(torch.tensor([TEXT[:width]]), output_hidden_states=True)
            except UsageError as error:
                said.append(str(error))
    return {"said": said, "drawn": drawn}


@torch.inference_mode()
def other_tokens_for_hugging_face(job: Job) -> Any:
    """Call a cut model without the decoder with the same and with other inputs; return what was said and computed."""
    said: list[str] = []
    with init_group() as group:
        model = optimize_model(tiny_model("llama"), "sym_int4", group=group, optimize_llm=False)
        ids, own = torch.tensor([TEXT]), torch.tensor([[*TEXT[:-1], TEXT[-1] + group.rank]])
        hidden = torch.ones_like(ids)
        hidden[0, 0] = group.rank
        embeds = model.get_input_embeddings()(ids) + group.rank  # type: ignore[operator]
        calls: list[dict[str, Any]] = [{"input_ids": own}, {"inputs_embeds": embeds}]
        calls += [{"input_ids": ids, "attention_mask": hidden}, {"input_ids": ids[:, : 3 + group.rank]}]
        for call in calls:
            try:
                model(**call)
            except UsageError as error:
                said.append(str(error))
        again = copy.deepcopy(model)
        found = [digest(each(ids).logits) for each in (model, again)]
    return {"said": said, "found": found}


@torch.inference_mode()
def refused_attentions(job: Job) -> Any:
    """Ask for attention weights in the middle of a text; return what was logged and raised, and whether it goes on."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    with init_group() as group:
        model = low_bit_model("llama", "fp16", "fp32", group)
        ids, refused = torch.tensor([TEXT]), 0
        cache = model(ids[:, :9], use_cache=True).past_key_values
        logging.getLogger("dist_lowbit").addHandler(handler)
        for more in ({}, {"output_hidden_states": True}):
            try:
                model(ids[:, 9:], past_key_values=cache, output_attentions=True, **more)
            except UsageError as error:
                refused += "output_attentions; a rank has a part of the heads" in str(error)
        same = torch.equal(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:])
    return {"told": told, "refused": refused, "same": same}


@torch.inference_mode()
def greedy_texts(job: Job) -> Any:
    """Return each family's most likely tokens after every token of a given text, run one by one."""
    result: dict[str, list[int]] = {}
    with init_group() as group:
        for name, text in job.args["texts"].items():
            _, program = tiny_program(name, "fp16", "fp32", group)
            for executor in job.args["executors"]:
                chunks = [len(PROMPT)] + [1] * (len(text) - len(PROMPT))
                result[f"{name} {executor}"] = run_alone(program, executor, text, chunks).argmax(-1).tolist()
    return result


@torch.inference_mode()
def generated(job: Job) -> Any:
    """Generate with Hugging Face's generate from padded batches, on the decoder; return the tokens."""
    result: dict[str, list[list[int]]] = {}
    with init_group() as group:
        for name, rows in job.args["families"].items():
            ids = torch.tensor(rows)
            model = low_bit_model(name, "fp16", "fp32", group)
            options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
            result[name] = model.generate(ids, attention_mask=(ids != 0).long(), **options).tolist()
    return result
