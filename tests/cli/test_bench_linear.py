"""dist-lowbit bench linear: what its lines hold and what it refuses. No time is judged here."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from dist_lowbit import ops
from dist_lowbit.bench.child import Child
from dist_lowbit.bench.linear import Line, Sweep, formats_named, run
from dist_lowbit.bench.machine import cache_bytes
from dist_lowbit.bench.random_weights import generator, random_weight
from dist_lowbit.cli.bench import print_table
from dist_lowbit.core.errors import DistLowbitError, UsageError
from dist_lowbit.core.native import native, native_why_not
from dist_lowbit.formats import dequantize
from dist_lowbit.formats.table import FORMATS
from tests.cli.command_line import Cli

FIELDS = (
    *("format", "m", "n", "k", "group_size", "threads", "isa", "median_us", "gbps", "read_gbps", "fraction_of_read"),
    *("gops", "peer"),
)
SMALL = {"read_bytes": 1 << 20, "cache": 1 << 16}


@pytest.fixture
def kernels() -> None:
    if native() is None:
        pytest.skip(f"no compiled kernels: {native_why_not()}")


def check(line: Line) -> None:
    bytes_read = line.gbps * line.median_us * 1e3
    bits = 8 * bytes_read / line.n / line.k
    assert 2 < bits < 33, "a weight of one of the formats"
    assert line.p10_us <= line.median_us <= line.p90_us
    assert line.runs >= 1
    # Rounded for reading: two figures at least are left of each.
    assert line.fraction_of_read == pytest.approx(line.gbps / line.read_gbps, rel=0.05)
    assert line.gops == pytest.approx(2e-3 * line.m * line.n * line.k / line.median_us, rel=0.05)


@pytest.mark.usefixtures("kernels")
def test_every_combination_gets_a_line() -> None:
    before = ops.active_isa()
    sweep = Sweep(formats_named("all"), [192], [256], [1, 3], [1], rounds=1)
    lines = list(run(sweep, **SMALL))
    for line in lines:
        check(line)
    assert [(line.format, line.m) for line in lines] == [(name, m) for m in (1, 3) for name in list(FORMATS)[:12]]
    assert {(line.isa, line.peer, line.peer_isa) for line in lines} == {(before, None, None)}
    elements = {"fp8_e4m3", "fp8_e5m2", "fp16", "bf16"}  # docs/numerics.md: these never round activations
    assert {line.format for line in lines if line.compute == "fp32"} == elements
    assert {line.compute for line in lines if line.format not in elements} == {"int8"}


@pytest.mark.usefixtures("kernels")
def test_instruction_sets_are_taken_in_turn_and_put_back() -> None:
    before, able = ops.active_isa(), [name for name, supported, _ in ops.isas() if supported]
    lines = list(run(Sweep(["sym_int4"], [64], [100], [2], [1], isas=able, group_size=32, rounds=1), **SMALL))
    assert [line.isa for line in lines] == able
    assert {line.group_size for line in lines} == {32}
    assert ops.active_isa() == before


@pytest.mark.usefixtures("kernels")
def test_torch_is_held_to_the_same_instructions() -> None:
    sweep = Sweep(["sym_int4"], [64], [128], [2], [1], isas=["scalar"], peer=True, rounds=1)
    ours, *peers = run(sweep, **SMALL)
    check(ours)
    for line in peers:
        check(line)
    names = ["torch.int4pack", "torch.int8pack", "torch.float32", "torch.bfloat16"]
    assert [line.peer for line in peers] == names
    assert {line.peer_isa for line in peers} == {"DEFAULT"}
    assert {line.isa for line in peers} == {"scalar"}


@pytest.mark.usefixtures("kernels")
def test_the_command_line(cli: Cli) -> None:
    done = cli("bench", "linear", "--n", 64, "--k", 64, "--m", 1, "--threads", 1, "--rounds", 1, "--json")
    assert (done.code, done.err) == (0, "")
    (line,) = [json.loads(line) for line in done.out.splitlines()]
    assert set(FIELDS) <= line.keys()
    assert (line["format"], line["m"], line["peer"]) == ("sym_int4", 1, None)


def test_the_table_has_a_row_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    ours = Line("nf4", 1, 2, 3, 64, 5, "avx2", 6.0, 7.0, 8.0, 0.875, 10.0, None, None, "int8", 5.0, 7.0, 9)
    peer = dataclasses.replace(ours, peer="torch.float32", peer_isa="AVX2")
    print_table([ours, peer])
    rows = capsys.readouterr().out.splitlines()
    assert [row for row in rows if re.search(r"nf4 .* avx2 .* 6\.0 .* 0\.88 ", row)]
    assert [row for row in rows if "torch.float32 (AVX2)" in row]


REFUSED = {
    "format": (["--format", "sym_int4,int4"], r"unknown --format 'int4'; expected one of sym_int4"),
    "n": (["--n", "many"], r"--n is 'many'; expected numbers of 1 or more"),
    "m 0": (["--m", "1,0"], r"--m is '1,0'; expected numbers of 1 or more"),
    "k -1": (["--k=-1"], r"--k is '-1'; expected numbers"),
    "threads": (["--threads", "4096"], r"--threads is 4096; expected 1 to \d+, the physical cores"),
    "isa": (["--isa", "mmx"], r"--isa is 'mmx'; expected one that this processor has: scalar"),
    "peer": (["--peer", "numpy"], r"--peer is 'numpy'; expected torch"),
    "compute": (["--compute", "fp64"], r"--compute is 'fp64'; expected int8 or fp32"),
    "group": (["--group-size", 48], r"--group-size is 48; expected a multiple of 32"),
    "rounds": (["--rounds", 0], r"--rounds is '0'; expected"),
    "too large": (["--n", 10**9, "--k", 10**6], r"takes about \d+ MiB in 1 forms, and this machine has"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("kernels")
def test_bad_input_is_a_sentence(case: str, cli: Cli) -> None:
    words, text = REFUSED[case]
    sentence = cli("bench", "linear", *words).sentence()
    assert re.search(text, sentence), sentence


def test_without_a_verb(cli: Cli) -> None:
    assert "Missing command" in cli("bench").sentence()


@pytest.mark.parametrize("name", FORMATS)
def test_random_weights_are_sound_and_keep_the_size_of_what_they_multiply(name: str) -> None:
    for k in (100, 4096):
        weight = random_weight(FORMATS[name], (48, k), -1 if FORMATS[name].dtype else 64, generator(name))
        again = random_weight(FORMATS[name], (48, k), -1 if FORMATS[name].dtype else 64, generator(name))
        assert weight.equal(again)
        values = dequantize(weight)
        assert bool(values.isfinite().all())
        # Each output is a sum of k products with values of this size: a factor, not a power, of its input's.
        gain = float(values.square().mean().sqrt()) * k**0.5
        assert 0.1 < gain < 4
    assert weight.format.dtype is not None or int(torch.unique(weight.codes()).numel()) > 2


def test_the_caches_are_those_of_the_cpus_asked_for(tmp_path: Path) -> None:
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        for index, (level, size, who) in enumerate(((1, "48K", str(cpu)), (3, "32768K", shared), (2, "1M", str(cpu)))):
            folder = tmp_path / f"cpu{cpu}/cache/index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", str(level)), ("size", size), ("shared_cpu_list", who)):
                (folder / name).write_text(value + "\n")
    assert cache_bytes({0, 1}, tmp_path) == 32 << 20
    assert cache_bytes({1, 2}, tmp_path) == 64 << 20
    assert cache_bytes({7}, tmp_path) > 0  # a kernel that does not tell


def test_a_peer_that_refuses_or_dies_is_named(tmp_path: Path) -> None:
    script = tmp_path / "somebody.py"
    script.write_text('import sys\nsys.stdin.readline()\nprint(\'{"error": "not today"}\', flush=True)\nsys.exit(7)\n')
    with Child("somebody", script, [0], {}) as child:
        with pytest.raises(UsageError, match="the peer somebody cannot be measured: not today"):
            child.ask(op="prepare")
        with pytest.raises(DistLowbitError, match="the peer somebody ended with code 7"):
            child.ask(op="prepare")
