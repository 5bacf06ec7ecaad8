"""Time generation with the arguments and the printed metrics of IPEX's script of this name; DeepSpeed is not needed.

    deepspeed --num_accelerators 2 examples/run_generation_with_deepspeed.py -m MODEL --benchmark --token-latency \
        --ipex-weight-only-quantization --weight-dtype INT4
    dist-lowbit run -n 2 examples/run_generation_with_deepspeed.py -m MODEL --benchmark --greedy

Each rank reads its own part of the model. --ipex, --autotp, --shard-model, --deployment-mode, --quant-with-amp and --ki
are accepted and change nothing: what they ask for is so anyway, or there is nothing to inject.
"""

import argparse
import sys
import time

import torch
from transformers import AutoTokenizer

import dist_lowbit.sample
from dist_lowbit import BenchmarkWrapper, init_group
from dist_lowbit.core.errors import DistLowbitError, UsageError
from dist_lowbit.engine.generate import peak_rss
from dist_lowbit.optimize import is_low_bit
from dist_lowbit.transformers import AutoModelForCausalLM

WEIGHTS = {"INT8": "sym_int8", "INT4": "sym_int4", "NF4": "nf4", "FP8": "fp8"}
LIKE_NOTHING = ("--ipex", "--autotp", "--shard-model", "--deployment-mode", "--disable-deployment-mode", "--ki")
LEAST = {"batch_size": 1, "num_iter": 1, "num_warmup": 0, "input_tokens": 1, "max_new_tokens": 1, "num_beams": 1}
PROMPT = "Once upon a time, there was a little girl who lived near a forest. "


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add = parser.add_argument
    add("-m", "--model-id", "--model-name-or-path", dest="model", default=str(dist_lowbit.sample.path()))
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of activations")
    add("--ipex-weight-only-quantization", action="store_true")
    add("--weight-dtype", choices=list(WEIGHTS), default="INT8")
    add("--group-size", type=int)
    add("--benchmark", action="store_true", help="time --num-iter runs; without it, generate once and print the text")
    add("--batch-size", type=int, default=1)
    add("--num-iter", type=int, default=50)
    add("--num-warmup", type=int, default=5)
    add("--input-tokens", type=int, default=32)
    add("--max-new-tokens", type=int, default=32)
    add("--prompt")
    add("--greedy", action="store_true", help="one beam instead of --num-beams")
    add("--num-beams", type=int, default=4)
    add("--token-latency", action="store_true", help="print the time of tokens, not only of runs")
    add("--print-memory", action="store_true")
    add("--local_rank", help="passed by the deepspeed launcher; the environment says it too")
    for name in (*LIKE_NOTHING, "--quant-with-amp"):
        add(name, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is {getattr(args, name)}; expected a whole number of at least {least}")
    if args.prompt == "":
        raise UsageError("--prompt is empty; expected a text to go on from")
    return args


def encode(tokenizer, args: argparse.Namespace) -> torch.Tensor:
    """Return ids [batch, tokens]: those of --prompt, else --input-tokens of a text that is long enough."""
    if args.prompt is not None:
        ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    else:
        ids = tokenizer(PROMPT * (1 + args.input_tokens // 8), return_tensors="pt").input_ids[:, : args.input_tokens]
    return ids.repeat(args.batch_size, 1)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def print_metrics(totals: list[float], firsts: list[float], rests: list[float], tokens: bool) -> None:
    """Print IPEX's lines: `First token` includes the prompt, `2...` are all tokens after the first."""
    print("\n----------- Summary -----------")
    print(f"Inference latency: {sum(totals) / len(totals):.5f} sec.")
    if tokens:
        print(f"First token average latency: {sum(firsts) / len(firsts):.5f} sec.")
        if rests:
            print(f"Average 2... latency: {sum(rests) / len(rests):.5f} sec.")
            print(f"P90 2... latency: {percentile(rests, 0.9):.5f} sec.")
            print(f"P99 2... latency: {percentile(rests, 0.99):.5f} sec.")


def main() -> None:
    args = read_arguments()
    with init_group() as group:
        low_bit = WEIGHTS[args.weight_dtype] if args.ipex_weight_only_quantization else None
        if is_low_bit(args.model):
            if low_bit is not None:
                raise UsageError(f"{args.model} is quantized already; leave --ipex-weight-only-quantization out")
            options = {}
        else:
            options = {"load_in_low_bit": low_bit or {"float32": "fp32", "float16": "fp16"}.get(args.dtype, "bf16")}
            options |= {"group_size": args.group_size} if low_bit else {}
        model = BenchmarkWrapper(
            AutoModelForCausalLM.from_pretrained(
                args.model, tensor_parallel=group, torch_dtype=getattr(torch, args.dtype), **options
            ),
            do_print=False,
        )
        ids = encode(AutoTokenizer.from_pretrained(args.model), args)
        beams = 1 if args.greedy else args.num_beams
        rounds = args.num_iter if args.benchmark else 1
        warm = min(args.num_warmup, rounds - 1)
        totals, firsts, rests = [], [], []
        for i in range(rounds):
            started = time.perf_counter()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.max_new_tokens,
                min_new_tokens=args.max_new_tokens if args.benchmark else None,
                do_sample=False,
                num_beams=beams,
            )
            took = time.perf_counter() - started
            if args.benchmark and group.rank == 0:
                print(f"Iteration: {i}, Time: {took:.6f} sec", flush=True)
            if i >= warm:
                totals.append(took)
                firsts.append(model.first_cost)
                rests += model.rest_costs
        peaks = group.gather_object(peak_rss())
        if group.rank == 0:
            if args.benchmark:
                print_metrics(totals, firsts, rests, args.token_latency)
            else:
                print(AutoTokenizer.from_pretrained(args.model).decode(output[0], skip_special_tokens=True))
            if args.print_memory:
                print("Peak memory:", ", ".join(f"rank {r} {peak / 2**20:.0f} MiB" for r, peak in enumerate(peaks)))


if __name__ == "__main__":
    try:
        main()
    except DistLowbitError as error:
        sys.exit(f"error: {error}")
