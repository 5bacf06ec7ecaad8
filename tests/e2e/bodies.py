"""What the ranks of tests/e2e do. Each body runs on every rank and returns JSON values; tensors go to files."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.cache_utils import DynamicCache

from dist_lowbit import transformers as low_bit
from dist_lowbit.comm import Group, SingleGroup, init_group
from dist_lowbit.core.errors import DistLowbitError
from dist_lowbit.engine.generate import generate
from dist_lowbit.engine.sampling import Sampling
from dist_lowbit.engine.session import open_session
from dist_lowbit.formats import FORMATS, PackedWeight, dequantize, quantize
from dist_lowbit.optimize import load_low_bit, low_memory_init, optimize_model
from dist_lowbit.parallel import LowBitLinear, ParallelEmbedding
from tests.bounds import cast_bound, exact_linear, linear_bound, reorder_bound
from tests.comm.harness import Job
from tests.e2e import tiny  # noqa: F401 - imports the models' code once, before ranks are forked
from tests.parallel.split_cases import CASES, local_x, operands, part, split_of

PROMPT = [[1, 5, 17, 80, 33, 99, 4, 4, 62, 9, 21, 50]]  # 12 tokens of the tiny vocabulary
FORCED = (7, 55, 98, 3)  # decode steps with given tokens
PADDED = [PROMPT[0], [0] * 5 + PROMPT[0][2:9]]
WAYS = ("live", "files", "saved")


def digest(value: torch.Tensor) -> str:
    """Return a text that differs where any bit differs."""
    raw = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(raw).hexdigest()[:16]}"


def stages(model: Any, prompt: list[list[int]], forced: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return the logits of a prefill and of decode steps with a cache of given tokens."""
    found = {}
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        found["prefill"] = model(torch.tensor(prompt), past_key_values=cache, use_cache=True).logits
        for step, token in enumerate(forced):
            ids = torch.full((len(prompt), 1), token)
            found[f"decode {step}"] = model(ids, past_key_values=cache, use_cache=True).logits
    return found


def padded(model: Any) -> dict[str, torch.Tensor]:
    """Return the logits and the greedy continuation of a batch whose second row is padded on the left."""
    ids = torch.tensor(PADDED)
    mask = (ids != 0).long()
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = model(ids, attention_mask=mask, position_ids=position).logits
        tokens = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    return {"padded": logits, "padded greedy": tokens}


def make(way: str, directory: str, saved: Path, form: str, compute: str, group: Group) -> Any:
    """Return a low-bit model of some ordinary files, made in one of the three ways."""
    if way == "files":
        return low_bit.AutoModelForCausalLM.from_pretrained(
            directory, load_in_low_bit=form, tensor_parallel=group, compute=compute
        )
    if way == "live":
        live = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        model = optimize_model(live, form, group=group, compute=compute)
        model.save_low_bit(saved)  # type: ignore[operator]
        return model
    with low_memory_init():
        empty = transformers.AutoModelForCausalLM.from_pretrained(saved)
    return load_low_bit(empty, saved, group=group, compute=compute)


def families(job: Job) -> Any:
    """Run each model in each form and way; return digests, and from rank 0 the tensors of the live ones."""
    result: dict[str, Any] = {}
    with init_group() as group:
        for name, directory in job.args["models"].items():
            for form, compute in job.args["forms"]:
                for way in job.args["ways"]:
                    saved = job.folder / f"{name}-{form}"
                    model = make(way, directory, saved, form, compute, group)
                    found = stages(model, PROMPT, FORCED)
                    if way == "live":
                        found |= padded(model)
                        if group.rank == 0:
                            save_file(found, str(job.folder / f"{name}-{form}.safetensors"))
                    result[f"{name} {form} {way}"] = {stage: digest(value) for stage, value in found.items()}
    return result


def sample(job: Job) -> Any:
    """Run the sample model in each format; return digests, and from rank 0 the tensors of the first prompt."""
    result = {}
    with init_group() as group:
        for form, compute in job.args["forms"]:
            model = low_bit.AutoModelForCausalLM.from_pretrained(
                job.args["model"], load_in_low_bit=form, tensor_parallel=group, compute=compute
            )
            found = stages(model, job.args["prompt"], tuple(job.args["forced"]))
            if group.rank == 0:
                save_file(found, str(job.folder / f"{form}-{compute}.safetensors"))
            result[f"{form} {compute}"] = {stage: digest(value) for stage, value in found.items()}
    return result


def greedy(job: Job) -> Any:
    """Generate from checkpoints as dist-lowbit generate does; return text and tokens of each prompt."""
    with init_group() as group:
        session = open_session(job.args["checkpoint"], group)
        found = []
        for prompt in job.args["prompts"]:
            for sampling in (Sampling(greedy=True), Sampling(greedy=False, seed=11)):
                one = generate(session, prompt, job.args["tokens"], sampling)
                found.append({"text": one.text, "tokens": one.tokens})
        return found


def linears(job: Job) -> Any:
    """Compare split Linears with the whole ones in each format; return what is wrong."""
    wrong = []
    with init_group(job.args.get("backend", "auto")) as group:
        alone = SingleGroup()
        for form in job.args["formats"]:
            for case in CASES:
                x, weight, bias = operands(case, form)
                split = split_of(case, weight.group_size, group.size)
                whole = split_of(case, weight.group_size, 1)
                for b in (None, bias):
                    want = part(case, weight, b, whole, alone, "int8")(x)
                    found = part(case, weight, b, split, group, "int8")(local_x(x, split, group.rank))
                    limit = reorder_bound(x, weight)
                    limit = limit if b is None else cast_bound(want, limit, torch.float32, roundings=2)
                    right = bool(((found.double() - want.double()).abs() <= limit).all())
                    exact = FORMATS[form].integer and group.size in (1, 2, 4)
                    if not right or (exact and not torch.equal(found, want)):
                        wrong.append(f"{form} {case.named()} bias={b is not None}")
                    if len(set(group.gather_object(digest(found)))) > 1:
                        wrong.append(f"{form} {case.named()}: the ranks hold different results")
        return {"wrong": wrong, "backend": group.name}


def direct(directory: str, form: str, group_size: int | None) -> dict[str, PackedWeight]:
    """Return every Linear of a model, quantized whole, straight from its tensors."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return {
        name: quantize(module.weight.detach(), form, group_size)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _ranges(module: LowBitLinear, rank: int) -> list[tuple[int, int]]:
    axis = module.split.axis
    return [(0, module.split.shape[0])] if axis is None else list(module.split.ranges[rank])


def loaded(job: Job) -> Any:
    """Load a checkpoint and compare each Linear's part, dequantized, with the same part of a direct quantization."""
    wrong = []
    with init_group() as group:
        for entry in job.args["checkpoints"]:
            want = direct(entry["model"], entry["form"], entry["group_size"])
            model = low_bit.AutoModelForCausalLM.load_low_bit(entry["checkpoint"], tensor_parallel=group)
            linears = {name: m for name, m in model.named_modules() if isinstance(m, LowBitLinear)}
            if linears.keys() != want.keys():
                wrong.append(f"{entry['checkpoint']}: {sorted(linears.keys() ^ want.keys())}")
            for name, module in linears.items():
                axis = module.split.axis or 0
                whole = dequantize(want[name])
                pieces = [whole.narrow(axis, a, b - a) for a, b in _ranges(module, group.rank)]
                if digest(dequantize(module.unpack())) != digest(torch.cat(pieces, axis)):
                    wrong.append(f"{entry['checkpoint']} {name} on rank {group.rank}")
            for name, m in model.named_modules():
                if isinstance(m, ParallelEmbedding) and m.weight.dtype != torch.float16:
                    wrong.append(f"{name} is {m.weight.dtype}")
    return wrong


def save(job: Job) -> Any:
    """Quantize models and save each to its directory."""
    with init_group() as group:
        for entry in job.args["models"]:
            model = low_bit.AutoModelForCausalLM.from_pretrained(
                entry["model"],
                load_in_low_bit=entry["form"],
                group_size=entry["group_size"],
                modules_to_not_convert=entry.get("keep"),
                tensor_parallel=group,
            )
            model.save_low_bit(entry["to"])  # type: ignore[operator]
    return None


def load_fails(job: Job) -> Any:
    """Load checkpoints that are damaged; return what each rank is told about each."""
    told = []
    with init_group() as group:
        for directory in job.args["checkpoints"]:
            try:
                low_bit.AutoModelForCausalLM.load_low_bit(directory, tensor_parallel=group)
                told.append(["nothing", ""])
            except DistLowbitError as error:
                told.append([type(error).__name__, str(error)])
    return told


def kept(job: Job) -> Any:
    """Quantize models with modules kept; return their formats, digests, and what is wrong with weights and logits."""
    result = []
    with init_group() as group:
        for entry in job.args["models"]:
            model = low_bit.AutoModelForCausalLM.from_pretrained(
                entry["model"],
                load_in_low_bit="sym_int4",
                tensor_parallel=group,
                modules_to_not_convert=entry["keep"],
            )
            source = transformers.AutoModelForCausalLM.from_pretrained(entry["model"], dtype="auto")
            found = stages(model, PROMPT, FORCED)
            again = stages(copy.deepcopy(model), PROMPT, FORCED)
            one = {
                "formats": {n: m.format for n, m in model.named_modules() if isinstance(m, LowBitLinear)},
                "linears": sorted(n for n, m in source.named_modules() if type(m).__name__ in ("Linear", "Conv1D")),
                "embedding": [str(m.weight.dtype) for m in model.modules() if isinstance(m, ParallelEmbedding)],
                "logits": {stage: digest(value) for stage, value in found.items()},
                "copies agree": all(torch.equal(found[stage], again[stage]) for stage in found),
            }
            if "lm_head" in entry["keep"]:
                one |= _kept_head(model, source, found["prefill"])
            result.append(one)
    return result


def _kept_head(model: Any, source: Any, logits: torch.Tensor) -> dict[str, Any]:
    """Compare the logits of a head that was kept with its product in fp64; return the digest of its input, too."""
    with torch.inference_mode():
        x = model.model(torch.tensor(PROMPT)).last_hidden_state[0]
    weight = quantize(source.lm_head.weight.detach(), "fp16")  # its own dtype: exact
    error = (logits[0].double() - exact_linear(x, weight)).abs()
    return {"head": bool((error <= linear_bound(x, weight, "fp32")).all()), "hidden": digest(x)}
