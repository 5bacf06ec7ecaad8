"""Save a model from any number of ranks, and load it on any other number.

    dist-lowbit run -n 2 examples/save_and_load.py --save /tmp/story      # quantizes; each rank writes one file
    python examples/save_and_load.py --load /tmp/story                    # one rank reads both files

Each rank holds its part of the model only, and reads only the bytes of that part.
"""

import argparse
import sys

import torch
from transformers import AutoTokenizer

import dist_lowbit.sample
from dist_lowbit.comm import init_group
from dist_lowbit.core.errors import DistLowbitError
from dist_lowbit.transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(dist_lowbit.sample.path()))
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--save", metavar="DIR")
    parser.add_argument("--load", metavar="DIR")
    args = parser.parse_args()

    with init_group() as group:
        if args.load:
            model = AutoModelForCausalLM.load_low_bit(args.load, tensor_parallel=group)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                args.model, load_in_low_bit=args.low_bit, tensor_parallel=group
            )
        if args.save:
            model.save_low_bit(args.save)  # all ranks together
        ids = AutoTokenizer.from_pretrained(args.model)("Once upon a time", return_tensors="pt").input_ids
        with torch.inference_mode():
            total = model(ids).logits.double().sum().item()
        if group.rank == 0:  # the same bits on 1, 2, 4 or 8 ranks
            print(f"{group.size} rank(s), sum of the logits {total:.17g}")


if __name__ == "__main__":
    try:
        main()
    except DistLowbitError as error:
        sys.exit(f"error: {error}")
