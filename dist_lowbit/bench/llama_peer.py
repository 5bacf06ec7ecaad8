"""llama.cpp on random Q4_0 weights, timed on request: a script of its own (see child.py), which knows no dist_lowbit.

Its argument: the cpus to run on, a thread each. Requests: {"op": "prepare", "config", "rows", "batch"} writes a GGUF
file of the shape of a Hugging Face config, opens it with room for `batch` sequences of `rows` tokens, and removes it.
{"op": "run", "prompts", "new"} answers with the seconds of the prompt and of each further step. {"op": "memory"}.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _BLOCK_BYTES = 32, 18  # Q4_0: 32 weights as an fp16 scale and 16 bytes of nibbles
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ROUTER = "ffn_gate_inp.weight"  # kept in fp32, as llama.cpp's own converter does


def q4_0(rng: Any, shape: tuple[int, ...]) -> Any:
    """Return random Q4_0 rows, uint8 [..., K / 32 * 18], of about the size that keeps activations in range."""
    import numpy as np

    blocks = math.prod(shape) // _BLOCK
    words = rng.integers(0, 1 << 64, size=-(-blocks * _BLOCK_BYTES // 8), dtype=np.uint64)
    data = words.view(np.uint8)[: blocks * _BLOCK_BYTES].reshape(blocks, _BLOCK_BYTES)
    scale = np.full(blocks, 1 / (4 * shape[-1] ** 0.5), dtype=np.float16)
    data[:, :2] = scale.view(np.uint8).reshape(-1, 2)
    return data.reshape(*shape[:-1], shape[-1] // _BLOCK * _BLOCK_BYTES)


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the GGUF name and shape of every tensor of a model (see `quantized`)."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query = config["num_attention_heads"] * head
    key = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head
    yield "token_embd.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"blk.{layer}."
        yield name + "attn_norm.weight", (hidden,)
        for part, size in (("q", query), ("k", key), ("v", key)):
            yield f"{name}attn_{part}.weight", (size, hidden)
            if config["model_type"] == "qwen2":
                yield f"{name}attn_{part}.bias", (size,)
        if config["model_type"] == "qwen3":
            yield name + "attn_q_norm.weight", (head,)
            yield name + "attn_k_norm.weight", (head,)
        yield name + "attn_output.weight", (hidden, query)
        yield name + "ffn_norm.weight", (hidden,)
        experts = config.get("num_local_experts")
        if experts:
            yield name + _ROUTER, (experts, hidden)
        stack, suffix = ((experts,), "_exps.weight") if experts else ((), ".weight")
        yield f"{name}ffn_gate{suffix}", (*stack, ffn, hidden)
        yield f"{name}ffn_up{suffix}", (*stack, ffn, hidden)
        yield f"{name}ffn_down{suffix}", (*stack, hidden, ffn)
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (vocab, hidden)


def quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is written in Q4_0."""
    return len(shape) > 1 and not name.endswith(_ROUTER)


def step_bytes(config: dict[str, Any], batch: int) -> int:
    """Return the bytes of all matrices but the embedding; of experts, as many as `batch` tokens choose on average."""
    experts = config.get("num_local_experts") or 1
    chosen = experts * (1 - (1 - config.get("num_experts_per_tok", 1) / experts) ** batch) / experts
    total = 0.0
    for name, shape in tensors(config):
        if quantized(name, shape) and name != "token_embd.weight":
            total += math.prod(shape) // _BLOCK * _BLOCK_BYTES * (chosen if len(shape) == 3 else 1)
    return int(total)


def write(path: Path, config: dict[str, Any]) -> None:
    """Write the file, tensor by tensor."""
    import gguf
    import numpy as np

    kind = config["model_type"]
    if kind not in _ARCHITECTURES:
        raise ValueError(f"it is given shapes of {', '.join(_ARCHITECTURES)} here, not of {kind}")
    odd = [name for name, shape in tensors(config) if quantized(name, shape) and shape[-1] % _BLOCK]
    if odd:
        raise ValueError(f"Q4_0 takes rows of whole blocks of {_BLOCK}, and {odd[0]} has others")
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[kind])
    heads = config["num_attention_heads"]
    writer.add_context_length(config.get("max_position_embeddings") or 4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    head = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float((config.get("rope_parameters") or config).get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or 1e-5)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    for name, shape in tensors(config):
        if quantized(name, shape):
            stored = (*shape[:-1], shape[-1] // _BLOCK * _BLOCK_BYTES)
            kind_of = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=kind_of)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.Generator(np.random.SFC64(0))
    for name, shape in tensors(config):
        if quantized(name, shape):
            data = q4_0(rng, shape)
        elif name.endswith("norm.weight"):
            data = np.ones(shape, dtype=np.float32)
        else:
            data = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        writer.write_tensor_data(data)
    writer.close()


class Model:
    """A model of llama.cpp with one context, driven by llama_decode alone."""

    def __init__(self, path: Path, threads: int, rows: int, batch: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # the library keeps the pointer
        llama_cpp.llama_log_set(quiet, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise ValueError("llama.cpp does not open the file")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_seq_max = rows * batch, batch
        context.n_batch = rows * batch
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise ValueError("llama.cpp makes no context of that size")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(rows * batch, 0, 1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Run rows of (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        status = self.api.llama_decode(self.context, batch)
        if status != 0:
            raise ValueError(f"llama_decode returned {status}")

    def _likely(self, places: list[int]) -> list[int]:
        import numpy as np

        found = []
        for place in places:
            logits = self.api.llama_get_logits_ith(self.context, place)
            found.append(int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax()))
        return found

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Run the prompts in one call, then `new` - 1 steps of one token for each; return the seconds."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        rows = [
            (token, at, sequence, at == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        began = time.perf_counter()
        self._decode(rows)
        tokens = self._likely([i for i, row in enumerate(rows) if row[3]])
        before = time.perf_counter()
        first, steps, length = before - began, [], len(prompts[0])
        for position in range(length, length + new - 1):
            self._decode([(token, position, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = self._likely(list(range(len(tokens))))
            now = time.perf_counter()
            steps.append(now - before)
            before = now
        return {"first": first, "steps": steps}


def peak_rss() -> int:
    """Return the most memory that this process has had resident, in bytes (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def prepare(request: dict[str, Any], threads: int) -> Model:
    """Write the file and open it; the open file outlives its name."""
    with tempfile.TemporaryDirectory(prefix="dist_lowbit_bench_") as folder:
        path = Path(folder) / "random.gguf"
        write(path, request["config"])
        return Model(path, threads, request["rows"], request["batch"])


def main() -> None:
    """Answer requests until stdin ends."""
    cpus = {int(cpu) for cpu in sys.argv[1].split(",")}
    os.sched_setaffinity(0, cpus)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is none of the protocol
    model: Model | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["op"] == "prepare":
                model = prepare(request, len(cpus))
                answer = {"weight_bytes": step_bytes(request["config"], request["batch"])}
            elif request["op"] == "run":
                assert model is not None
                answer = model.run(request["prompts"], request["new"])
            else:
                answer = {"peak_rss_bytes": peak_rss()}
        except ImportError as error:
            answer = {"error": f"{error}; install the extra bench: pip install 'dist-lowbit[bench]'"}
        except (ValueError, OSError, RuntimeError) as error:
            answer = {"error": " ".join(str(error).split())[:300]}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
