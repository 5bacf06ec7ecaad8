"""The verbs, each doing its work: convert, generate, inspect, doctor, run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_lowbit.checkpoint import CheckpointReader
from dist_lowbit.formats.table import USER_FORMATS
from tests.cli.command_line import ROOT, SAMPLE, Cli, environment, process

GREEDY = ("--prompt", "Once upon a time", "--greedy", "--max-new-tokens", 12, "--json")


def reference(checkpoint: Path, tokens: int) -> list[int]:
    """Return the greedy tokens that Hugging Face's own entry to our directory gives."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint)("Once upon a time", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    found = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist()
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, object]:
    """What generate --json says on one rank."""
    from dist_lowbit.comm import SingleGroup
    from dist_lowbit.engine.generate import Sampling, generate
    from dist_lowbit.engine.session import open_session

    result = generate(open_session(checkpoint, SingleGroup()), "Once upon a time", 12, Sampling(greedy=True))
    return dataclasses.asdict(result)


def test_generate_json_on_one_rank(checkpoint: Path, cli: Cli, alone: dict[str, object]) -> None:
    done = cli("generate", checkpoint, *GREEDY)
    assert (done.code, done.err) == (0, "")
    answer = json.loads(done.out.splitlines()[-1])
    assert answer.keys() == alone.keys()
    assert answer["tokens"] == alone["tokens"] == reference(checkpoint, 12)
    assert (answer["text"], answer["prompt_tokens"], answer["finish_reason"]) == (alone["text"], 5, "length")
    assert answer["ttft_ms"] > 0
    assert answer["itl_ms"] > 0
    assert answer["tokens_per_s"] > 0
    assert len(answer["peak_rss_bytes"]) == 1


@pytest.mark.slow
def test_generate_json_on_two_ranks_says_the_same(checkpoint: Path, alone: dict[str, object]) -> None:
    done = process("generate", checkpoint, "-n", 2, *GREEDY)
    assert (done.code, done.err) == (0, "")
    answer = json.loads(done.out.splitlines()[-1])
    assert {"text", "tokens", "ttft_ms", "itl_ms", "tokens_per_s"} <= answer.keys()
    assert (answer["text"], answer["tokens"]) == (alone["text"], alone["tokens"])
    assert len(answer["peak_rss_bytes"]) == 2


def test_generate_streams_the_prompt_the_text_and_the_timing(
    checkpoint: Path, cli: Cli, alone: dict[str, object]
) -> None:
    done = cli("generate", checkpoint, *GREEDY[:-1])
    assert done.code == 0
    assert done.out.startswith(f"Once upon a time{alone['text']}\n\n12 tokens after 5 of the prompt (length)\nTTFT ")
    for unit in ("ms   mean ITL ", " tokens/s", "peak memory  rank 0 ", " MiB"):
        assert unit in done.out


def test_generate_without_a_prompt_says_where_it_begins(checkpoint: Path, cli: Cli) -> None:
    words = ("generate", checkpoint, "--greedy", "--max-new-tokens", 2)
    silent = cli(*words)
    assert silent.code == 0
    assert silent.err == "no --prompt: starting from the model's beginning-of-text token\n"
    asked = cli(*words, "--prompt", "")
    assert (asked.code, asked.err) == (0, "")
    assert "2 tokens after 1 of the prompt" in asked.out
    assert asked.out.splitlines()[0] == silent.out.splitlines()[0]


def test_sampling_is_repeatable_by_its_seed(checkpoint: Path, cli: Cli) -> None:
    words = ("generate", checkpoint, "--prompt", "-n 2", "--max-new-tokens", 12, "--temperature", 2, "--json")

    def tokens(*more: object) -> list[int]:
        return list(json.loads(cli(*words, *more).out)["tokens"])

    first = json.loads(cli(*words).out)
    assert tokens("--seed", first["seed"]) == first["tokens"]
    assert len({tuple(tokens("--seed", seed)) for seed in range(4)}) > 1


def test_convert_says_what_it_wrote(tiny: Path, cli: Cli, tmp_path: Path) -> None:
    done = cli("convert", tiny, tmp_path / "out", "--low-bit", "nf4", "--tp", 3)
    assert (done.code, done.err) == (0, "")
    assert f"{tmp_path / 'out'}: nf4, 3 rank file(s), 0." in done.out
    with CheckpointReader(tmp_path / "out") as reader:
        assert reader.tp == 3


@pytest.mark.parametrize("name", USER_FORMATS)
def test_every_format_converts_over_the_last(name: str, tiny: Path, cli: Cli, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path_factory.getbasetemp() / "one-directory-for-all"
    assert cli("convert", tiny, out, "--low-bit", name).code == 0
    rows = json.loads(cli("inspect", out, "--json", "--verify").out)
    assert rows["verified"]["problems"] == []
    assert len(list(out.glob("lowbit-*.safetensors"))) == 1


def test_convert_options(tiny: Path, cli: Cli, tmp_path: Path) -> None:
    words = ("--group-size", 32, "--modules-to-not-convert", "lm_head", "--modules-to-not-convert", "*.0.mlp.*")
    assert cli("convert", tiny, tmp_path / "out", *words).code == 0
    report = json.loads(cli("inspect", tmp_path / "out", "--json").out)
    assert report["recipe"] == {
        "format": "sym_int4",
        "group_size": 32,
        "modules_to_not_convert": ["lm_head", "*.0.mlp.*"],
    }
    formats = {row["name"]: row["format"] for row in report["tensors"]}
    assert formats["model.layers.1.mlp.up_proj.weight"] == "sym_int4"
    assert formats["model.layers.0.mlp.up_proj.weight"] != "sym_int4"
    assert formats["lm_head.weight"] != "sym_int4"


def test_inspect_shows_modules_formats_shards_and_bytes(
    checkpoint: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = cli("inspect", checkpoint, "--verify")
    assert (done.code, done.err) == (0, "")
    assert "LlamaForCausalLM, sym_int4 in groups of 64, 2 rank file(s)" in done.out
    row = next(line for line in done.out.splitlines() if "layers.0.mlp.down_proj" in line)
    # 256 x 768 codes of 4 bits and 12 fp16 scales a row.
    for cell in ("sym_int4", "64", "256 x 768", " K ", "0:0-384 1:384-768", f"{256 * 768 // 2 + 256 * 12 * 2:,}"):
        assert cell in row, (cell, row)
    assert "every checksum fits" in done.out


def test_inspect_verify_finds_a_flipped_byte(tiny: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("convert", tiny, tmp_path / "out").code == 0
    (data,) = (tmp_path / "out").glob("lowbit-*.safetensors")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    done = cli("inspect", tmp_path / "out", "--verify")
    assert done.code == 2
    assert "every checksum fits" not in done.out
    assert data.name in done.err


def test_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    report = json.loads(cli("doctor", "--json").out)
    assert report["packages"]["torch"] == torch.__version__
    assert {"single", "shm", "gloo"} <= report["backends (yes, or why not, for this process)"].keys()
    assert report["recommended"].startswith("dist-lowbit run -n ")
    if report["kernels"] == "compiled":
        assert "tested under emulation only" in report["instruction sets"]["amx"]
    text = cli("doctor").out
    for part in (*report, "transformers", "torchrun", "NUMA node"):
        assert part in text, part


@pytest.mark.parametrize(
    ("shm", "files", "memory", "expected"),
    [
        (64 << 20, 1 << 20, -1, ["/dev/shm has 64 MiB; start the container with --shm-size=1g or more"]),
        (1 << 30, 256, -1, ["only 256 files may be open at once (ulimit -n); large checkpoints may need more"]),
        (1 << 30, 1 << 20, 1 << 30, ["the address space is limited to 1024 MiB (ulimit -v)"]),
        (1 << 30, 1 << 20, -1, []),
    ],
)
def test_doctor_warns(shm: int, files: int, memory: int, expected: list[str]) -> None:
    from dist_lowbit.cli.doctor import warnings

    assert warnings(shm, files, memory) == expected


def test_run_starts_ranks_and_returns_their_exit_code(cli: Cli, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(*sys.argv[1:]); sys.exit(7 * int(os.environ['RANK']))")
    done = process("run", "-n", 2, script, "--", "-n", "x")
    assert done.code == 7
    assert "[0] -- -n x" in done.out
    assert "rank 1" in done.err


def test_version_and_help(cli: Cli) -> None:
    import dist_lowbit

    assert cli("--version").out == f"{dist_lowbit.__version__}\n"
    for words in ([], ["--help"]):
        done = cli(*words)
        assert done.code == 0
        for verb in ("convert", "generate", "chat", "inspect", "doctor", "run"):
            assert verb in done.out
    for verb in ("convert", "generate", "chat", "inspect", "doctor"):
        assert cli(verb, "--help").code == 0
    assert "--style" in process("run", "--help").out


@pytest.mark.parametrize("verb", ["run", pytest.param("inspect", marks=pytest.mark.slow)])
def test_a_reader_that_leaves_is_no_traceback(verb: str, checkpoint: Path) -> None:
    words = {"run": ("-n", "2", "--dry-run", __file__), "inspect": (str(checkpoint),)}[verb]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "dist_lowbit.cli", verb, *words],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141  # 128 + SIGPIPE, as a shell says it


def test_a_checkpoint_of_no_language_model(cli: Cli, tmp_path: Path) -> None:
    from dist_lowbit import optimize_model

    optimize_model(torch.nn.Sequential(torch.nn.Linear(8, 8))).save_low_bit(tmp_path)
    assert "no language model; load it with load_low_bit" in cli("generate", tmp_path).sentence()
    assert cli("inspect", tmp_path).code == 0


def test_ranks_are_limited_by_cpus_where_the_model_stays_whole(cli: Cli, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "model"
    )
    assert cli("convert", tmp_path / "model", tmp_path / "out").code == 0
    sentence = cli("generate", tmp_path / "out", "-n", 4096).sentence()
    assert "-n is 4096, but this model cannot be split, and there are " in sentence


def test_the_sample_is_not_touched(cli: Cli) -> None:
    assert not list(SAMPLE.glob("lowbit*"))
