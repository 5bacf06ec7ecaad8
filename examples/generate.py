"""Generate text with a low-bit model, on one rank or many.

    python examples/generate.py                                       # one rank, the bundled sample model
    dist-lowbit run -n 2 examples/generate.py --model MODEL           # two ranks of one machine
    mpirun -n 2 python examples/generate.py --model MODEL
    torchrun --nproc-per-node 2 examples/generate.py --model MODEL
    deepspeed --num_accelerators 2 examples/generate.py --model MODEL

MODEL is an ordinary model (quantized while it loads) or a low-bit checkpoint, a directory or a hub id.
"""

import argparse
import sys

import torch
from transformers import AutoTokenizer, TextStreamer

import dist_lowbit.sample
from dist_lowbit.comm import init_group
from dist_lowbit.core.errors import DistLowbitError
from dist_lowbit.optimize import is_low_bit
from dist_lowbit.transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(dist_lowbit.sample.path()))
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the most likely one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", help="passed by the deepspeed launcher; the environment says it too")
    args = parser.parse_args()

    with init_group() as group:  # every rank that the launcher started; one without a launcher
        low_bit = None if is_low_bit(args.model) else args.low_bit
        model = AutoModelForCausalLM.from_pretrained(args.model, load_in_low_bit=low_bit, tensor_parallel=group)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        inputs = tokenizer(args.prompt, return_tensors="pt")
        torch.manual_seed(args.seed)  # the ranks hold the same logits, bit for bit: with one seed they draw alike
        streamer = TextStreamer(tokenizer, skip_special_tokens=True) if group.rank == 0 else None
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=args.sample, streamer=streamer)
        tokens = output[0].tolist()
        if any(other != tokens for other in group.gather_object(tokens)):
            raise DistLowbitError(f"rank {group.rank}: the ranks chose different tokens")


if __name__ == "__main__":
    try:
        main()
    except DistLowbitError as error:
        sys.exit(f"error: {error}")
