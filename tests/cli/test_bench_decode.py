"""dist-lowbit bench decode: what its lines hold, the models it makes, and what it refuses. No time is judged here."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from dist_lowbit.assembly.mode import Mode
from dist_lowbit.assembly.skeleton import class_of, empty_model
from dist_lowbit.assembly.source import source_target
from dist_lowbit.bench import llama_peer
from dist_lowbit.bench.decode import Line, Run, broken_down, percentile, run, weight_bytes
from dist_lowbit.bench.random_model import RandomWeights, make_model
from dist_lowbit.bench.runners import ForwardLoop, LlamaCpp, Parts
from dist_lowbit.bench.shapes import SHAPES, config_of
from dist_lowbit.cli.bench_decode import print_table
from dist_lowbit.comm import SingleGroup
from dist_lowbit.core.native import native, native_why_not
from dist_lowbit.formats.packed import merge
from dist_lowbit.quantize import Recipe
from tests.cli.command_line import Cli, process

FIELDS = (
    *("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "itl_p50_ms", "itl_p90_ms", "itl_p99_ms"),
    *("peak_rss_bytes", "fraction_of_read", "outside_kernels_fraction", "threads", "tp", "batch", "peer"),
)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture
def kernels() -> None:
    if native() is None:
        pytest.skip(f"no compiled kernels: {native_why_not()}")


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shape")
    LlamaConfig(**SIZES, **HEADS).save_pretrained(folder)
    return str(folder)


def check(line: Line) -> None:
    assert 0 < line.itl_p50_ms <= line.itl_p90_ms <= line.itl_p99_ms
    assert line.slowest_decode_tokens_per_s <= line.decode_tokens_per_s <= line.fastest_decode_tokens_per_s
    assert line.prefill_tokens_per_s == pytest.approx(line.batch * line.prompt / line.ttft_ms * 1e3, rel=0.01)
    assert line.peak_rss_bytes > 1 << 20
    assert line.fraction_of_read > 0


@pytest.mark.usefixtures("kernels")
def test_a_line_for_every_way_to_run(shape: str) -> None:
    what = Run(shape, "nf4", 32, prompt=5, new=4, batch=2, rounds=2, num_beams=2)
    own, generate, beams = run(what, SingleGroup(), Mode(), read_bytes=1 << 20)
    for line in (own, generate, beams):
        check(line)
        assert (line.low_bit, line.group_size, line.tp, line.batch, line.peer) == ("nf4", 32, 1, 2, None)
    assert (generate.how, beams.how) == ("generate", "generate, 2 beams")


@pytest.mark.usefixtures("kernels")
def test_the_command_line(shape: str, cli: Cli) -> None:
    done = cli("bench", "decode", "--shape", shape, "--prompt", 4, "--new", 2, "--rounds", 1, "--threads", 1, "--json")
    assert (done.code, done.err) == (0, "")
    for line in map(json.loads, done.out.splitlines()):
        assert set(FIELDS) <= line.keys()
        assert line["low_bit"] == "sym_int4"


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_two_ranks(shape: str) -> None:
    words = ("--prompt", 4, "--new", 3, "--rounds", 1, "--tp", 2, "--threads", 1, "--json")
    done = process("bench", "decode", "--shape", shape, *words)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert {line["tp"] for line in lines} == {2}
    assert len(lines) == 2


@pytest.mark.usefixtures("kernels")
def test_a_checkpoint_is_measured_with_its_own_weights(checkpoint: Path, cli: Cli) -> None:
    subject = make_model(str(checkpoint), None, None, SingleGroup(), Mode())
    assert (subject.low_bit, subject.group_size) == ("sym_int4", 64)
    refused = cli("bench", "decode", "--shape", checkpoint, "--low-bit", "sym_int8").sentence()
    assert "is a low-bit checkpoint with a format of its own; leave out --low-bit" in refused


def test_every_cut_is_one_of_the_same_whole(shape: str) -> None:
    config = config_of(shape)
    model = empty_model(class_of(config), config, shape)
    weights, recipe = RandomWeights(model, Recipe("sym_int4", 32)), Recipe("sym_int4", 32)
    whole, _ = source_target(model, recipe, 1)
    for tp in (2, 3):
        target, _ = source_target(model, recipe, tp)
        for name, split in target.plan.splits.items():
            every = weights.packed(name, whole.plan.splits[name], 0)
            parts = [weights.packed(name, split, rank) for rank in range(tp)]
            assert [part.shape for part in parts] == [split.local_shape(rank) for rank in range(tp)]
            if split.axis is None or len({r for held in split.ranges for r in held}) < tp:
                assert all(part.equal(parts[0]) for part in parts)  # shared by all ranks
            else:
                assert merge(parts, split.axis).equal(every)


@pytest.mark.usefixtures("kernels")
def test_random_models_speak_of_numbers_and_in_turn(shape: str) -> None:
    model = make_model(shape, "sym_int8", None, SingleGroup(), Mode(decoder="off")).model
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        assert bool(logits.isfinite().all())
        assert 0.01 < float(logits.std()) < 100
        expected = model.generate(ids, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)[:, 6:]
    loop = ForwardLoop(model)
    tokens = [loop.start(ids.tolist())]
    for _ in range(4):
        tokens.append(loop.go_on(tokens[-1]))
    assert torch.tensor(tokens).T.tolist() == expected.tolist()


@pytest.mark.parametrize("name", [n for n in SHAPES if n.startswith("llama")])
def test_shapes_have_the_sizes_of_their_names(name: str) -> None:
    config = config_of(name)
    counted = sum(math.prod(sizes) for _, sizes in llama_peer.tensors(config.to_dict()))
    billions = {"1b": 1.1, "7b": 6.74, "13b": 13.0, "8b": 8.03, "70b": 69.0, "70b/8": 69.0 / 8}
    # Known to two figures or three; of the eighth, norms and one key/value head less than a full eighth.
    assert counted / 1e9 == pytest.approx(billions[name.rpartition("-")[2]], rel=0.03)


def test_the_bytes_of_a_step_are_those_of_its_linears(shape: str) -> None:
    model = make_model(shape, "sym_int4", 32, SingleGroup(), Mode()).model
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96
    assert weight_bytes(model, 1) == (2 * layer + 128 * 64) * 4.5 / 8


def test_percentiles() -> None:
    ranked = [float(i) for i in range(1, 11)]
    assert [percentile(ranked, p) for p in (0, 50, 90, 99, 100)] == [1.0, 5.0, 9.0, 10.0, 10.0]
    assert percentile([3.0], 50) == 3.0


def test_a_peer_is_handed_the_same_sizes() -> None:
    config = Qwen2Config(**SIZES, **HEADS).to_dict()
    shapes = dict(llama_peer.tensors(config))
    assert shapes["blk.1.attn_k.weight"] == (32, 64)
    assert shapes["blk.0.attn_q.bias"] == (64,)
    assert sum(1 for shape in shapes.values() if len(shape) == 2) == 2 + 2 * 7
    assert llama_peer.step_bytes(config, 1) == (128 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)) * 18 // 32


@pytest.mark.skipif(not importlib.util.find_spec("llama_cpp"), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("kind", ["mistral", "mixtral", "qwen2", "qwen3"])
def test_llama_cpp_takes_the_files_of_every_kind(kind: str) -> None:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    config = AutoConfig.for_model(kind, **SIZES, **HEADS, **more)
    with LlamaCpp(config.to_dict(), SingleGroup(), [min(os.sched_getaffinity(0))], 8, 2) as peer:
        times = peer.run([[1, 2, 3], [4, 5, 6]], 3)
        assert len(times.steps) == 2
        assert peer.peak_rss() > 1 << 20


@pytest.mark.skipif(not importlib.util.find_spec("llama_cpp"), reason="llama-cpp-python is not installed")
@pytest.mark.usefixtures("kernels")
def test_llama_cpp_runs_beside_ours(shape: str) -> None:
    what = Run(shape, prompt=5, new=3, batch=2, rounds=1, peer=True)
    *_, peer = run(what, SingleGroup(), Mode(), read_bytes=1 << 20)
    check(peer)
    assert (peer.peer, peer.how, peer.low_bit, peer.group_size) == ("llama.cpp", "llama_decode", "q4_0", 32)


def test_the_table_has_a_row_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    parts = broken_down([Parts(0.004, 0.001, 0.002, 0.0015, 0.0075), Parts(0.005, 0.001, 0.001, 0.0005, 0.0075)])
    numbers = (*(1.0,) * 6, 1 << 20, 30.0, 0.5, 0.03, 1, 2, 3, 4, 5, None, 1.0, 1.0, 3, parts)
    print_table([Line("llama-1b", "nf4", 64, "decoder native", *numbers)])  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "llama-1b: 3 x 4 tokens, then 5 each; 2 rank(s) of 1 thread(s); memory reads at 30.0 GB/s" in out
    assert re.search(r"decoder native .* nf4 .* 0\.50 .* 0\.030 .* 1 ", out)
    assert "decoder native: where the milliseconds of a step go; rank 1 is the slowest" in out
    assert re.search(r" 0 .* 4\.000 .* 1\.000 .* 0\.500 .* 1\.500 .* 0\.500 ", out)


REFUSED = {
    "shape": (["--shape", "llama9"], r"--shape is 'llama9'; expected a directory with a config\.json, or one of llama"),
    "directory": (["--shape", "."], r"\. holds no config\.json"),
    "format": (["--low-bit", "int4"], r"unknown --low-bit 'int4'; expected one of sym_int4"),
    "group": (["--group-size", 7], r"--group-size is 7; expected a multiple of 32"),
    "threads": (["--threads", 4096], r"--threads is 4096 for each of 1 rank\(s\); this process may use \d+ core"),
    "tp": (["--tp", 0], r"--tp is 0; expected at least 1 rank"),
    "new": (["--new", 1], r"--new is 1; expected 2 or more"),
    "batch": (["--batch", 0], r"--batch is 0; expected 1 or more"),
    "too long": (["--prompt", 4000, "--new", 200], r"--prompt 4000 and --new 200 exceed the 4096 tokens of llama-1b"),
    "peer": (["--peer", "vllm"], r"--peer is 'vllm'; expected llama\.cpp"),
    "breakdown": (
        ["--breakdown", "--decoder", "off", "--shape", "SHAPE", "--prompt", 4, "--new", 2],
        r"--breakdown needs the compiled decoder, and .* runs by: forward",
    ),
    "decoder": (["--decoder", "fast"], r"decoder is 'fast'; expected"),
    "cache": (["--kv-cache-dtype", "fp4"], r"--kv-cache-dtype is 'fp4'; expected"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("kernels")
def test_bad_input_is_a_sentence(
    case: str, cli: Cli, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, text = REFUSED[case]
    words = [shape if word == "SHAPE" else word for word in words]
    sentence = cli("bench", "decode", *words).sentence()
    assert re.search(text, sentence), sentence
