"""Split a model by DeepSpeed AutoTP, quantize it, and time its tokens: the steps that ipex-llm's users know.

    deepspeed --num_accelerators 2 examples/deepspeed_autotp.py --repo-id-or-model-path MODEL
    mpirun -n 2 python examples/deepspeed_autotp.py --repo-id-or-model-path MODEL

Needs DeepSpeed, which compiles an operator at its first run (minutes; if it stands still, docs/troubleshoot.md).
DS_ACCELERATOR=cpu where it would choose another device. RANK_WAIT_TIME=30 lets each rank begin to load
30 seconds after the one before. examples/generate.py does the same without DeepSpeed and without the whole model on
every rank.
"""

import argparse
import os
import time

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dist_lowbit.sample
from dist_lowbit import BenchmarkWrapper, optimize_model
from dist_lowbit.core.rank import current


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repo-id-or-model-path", default=str(dist_lowbit.sample.path()))
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--n-predict", type=int, default=32, help="tokens to generate")
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--local_rank", help="passed by the deepspeed launcher; the environment says it too")
    args = parser.parse_args()

    rank = current()  # whichever launcher started it
    places = {"RANK": rank.rank, "WORLD_SIZE": rank.world_size, "LOCAL_RANK": rank.local_rank}
    places |= {"LOCAL_SIZE": rank.local_size, "MASTER_ADDR": rank.master_addr, "MASTER_PORT": rank.master_port}
    os.environ.update({name: str(value) for name, value in places.items()})
    time.sleep(rank.local_rank * float(os.environ.get("RANK_WAIT_TIME", "0")))

    model = AutoModelForCausalLM.from_pretrained(args.repo_id_or_model_path, dtype=torch.bfloat16)
    engine = deepspeed.init_inference(
        model, tensor_parallel={"tp_size": rank.world_size}, dtype=torch.bfloat16, replace_with_kernel_inject=False
    )
    model = BenchmarkWrapper(optimize_model(engine.module, low_bit=args.low_bit), do_print=rank.rank == 0)

    tokenizer = AutoTokenizer.from_pretrained(args.repo_id_or_model_path)
    inputs = tokenizer(args.prompt, return_tensors="pt")
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=args.n_predict, do_sample=False)  # warm up
        started = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=args.n_predict, do_sample=False)
        took = time.perf_counter() - started
    if rank.rank == 0:
        made = output.shape[1] - inputs.input_ids.shape[1]
        print(f"Inference time of generating {made} tokens: {took:.3f} s, first token cost {model.first_cost:.4f} s, "
              f"rest tokens average cost {model.rest_cost_mean:.4f} s")  # fmt: skip
        print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
