"""Bad input gets one sentence on stderr, quickly, and an exit code; never a traceback."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.command_line import SAMPLE, Cli, edit, environment, process


class Places:
    """Directories that commands are given, made when asked for."""

    def __init__(self, tmp: Path, checkpoint: Path, tiny: Path) -> None:
        self.tmp, self.checkpoint, self.tiny = tmp, checkpoint, tiny
        self.out = tmp / "out"

    def empty(self) -> Path:
        (self.tmp / "empty").mkdir()
        return self.tmp / "empty"

    def file(self) -> Path:
        (self.tmp / "file").write_text("text")
        return self.tmp / "file"

    def other(self) -> Path:
        (self.tmp / "other").mkdir()
        (self.tmp / "other" / "pytorch_model.bin").write_bytes(b"precious")
        return self.tmp / "other"

    def model(self, **config: object) -> Path:
        """A copy of the tiny model with a changed config."""
        copy = self.tmp / "copy"
        shutil.copytree(self.tiny, copy)
        edit(copy / "config.json", **config)
        return copy

    def broken(self, name: str, text: str, source: Path | None = None) -> Path:
        """A copy of the tiny model (or of `source`) with another text in one file."""
        copy = self.tmp / "broken"
        shutil.copytree(source or self.tiny, copy)
        (copy / name).write_text(text)
        return copy


@pytest.fixture
def places(tmp_path: Path, checkpoint: Path, tiny: Path) -> Places:
    return Places(tmp_path, checkpoint, tiny)


Words = Callable[[Places], list[object]]
MODELS: dict[str, tuple[Words, str]] = {
    "unknown format": (
        lambda p: ["convert", p.tiny, p.out, "--low-bit", "int4"],
        r"unknown --low-bit 'int4'; expected one of sym_int4, asym_int4,.*bf16",
    ),
    "group of 48": (
        lambda p: ["convert", p.tiny, p.out, "--group-size", 48],
        r"error: --group-size is 48; expected a multiple of 32",
    ),
    "tp 0": (lambda p: ["convert", p.tiny, p.out, "--tp", 0], r"--tp is 0; expected a number of rank files from 1"),
    "tp 100000": (lambda p: ["convert", p.tiny, p.out, "--tp", 100000], r"--tp is 100000; expected a number of rank"),
    "empty pattern": (
        lambda p: ["convert", p.tiny, p.out, "--modules-to-not-convert", ""],
        r"error: --modules-to-not-convert expects a list of names or globs, none of them empty",
    ),
    "no path": (
        lambda p: ["convert", p.tmp / "no", p.out],
        r"/no does not exist; expected a model directory or a hub id",
    ),
    "no model": (lambda p: ["convert", p.empty(), p.out], r"/empty holds no config\.json, so it is no model directory"),
    "a file": (lambda p: ["convert", p.file(), p.out], r"/file is a file; expected a model directory"),
    "a checkpoint": (lambda p: ["convert", p.checkpoint, p.out], r"is already a low-bit checkpoint; give the original"),
    "onto itself": (lambda p: ["convert", p.tiny, p.tiny], r"is the model itself; choose another directory"),
    "out is a file": (lambda p: ["convert", p.tiny, p.file()], r"/file is a file; expected a directory to save into"),
    "out in a file": (lambda p: ["convert", p.tiny, p.file() / "out"], r"/file is a file; expected a directory"),
    "out cannot be made": (
        lambda p: ["convert", p.tiny, "/proc/x"],
        r"error: cannot make the directory /proc/x to save into: No such file or directory; choose another place",
    ),
    "out is nothing": (
        lambda p: ["convert", p.tiny, ""],
        r"convert takes a model and a directory to write, and was given an empty string for the directory",
    ),
    "model is nothing": (lambda p: ["convert", "", p.out], r"and was given an empty string for the model"),
    "out holds another": (
        lambda p: ["convert", p.tiny, p.other()],
        r"holds another model's weights \(pytorch_model\.bin\)",
    ),
    "weights missing": (
        lambda p: ["convert", p.model(num_hidden_layers=3), p.out],
        r"holds no tensor model\.layers\.2\.",
    ),
    "unknown type": (
        lambda p: ["convert", p.model(model_type="gpt9"), p.out],
        r"/config\.json says model_type 'gpt9'; expected one that transformers \S+ knows, such as llama; correct",
    ),
    **{
        f"config: {name} is {value!r}": (
            lambda p, name=name, value=value: ["convert", p.model(**{name: value}), p.out],  # type: ignore[misc]
            r"config\.json describes: \w+Error: .*; correct its values|cannot read the config of",
        )
        for name, value in (("num_attention_heads", 0), ("hidden_size", -64), ("rope_scaling", {"type": "zzz"}))
    },
    "no type": (lambda p: ["convert", p.model(model_type=None), p.out], r"/config\.json says no model_type; expected"),
    "type is a list": (
        lambda p: ["convert", p.model(model_type=[1]), p.out],
        r"/config\.json says model_type \[1\]; exp",
    ),
    "a size is a text": (
        lambda p: ["convert", p.model(hidden_size="x"), p.out],
        r"cannot read the config of .*hidden_size.* expected int",
    ),
    "config is no json": (lambda p: ["convert", p.broken("config.json", "{"), p.out], r"config\.json cannot be read"),
    "config is a list": (lambda p: ["convert", p.broken("config.json", "[]"), p.out], r"holds a list; expected an obj"),
    "weights are no tensors": (lambda p: ["convert", p.broken("model.safetensors", "x"), p.out], r"model\.safetensors"),
    "own code": (
        lambda p: ["convert", p.model(model_type="mine", auto_map={"AutoConfig": "configuration_mine.C"}), p.out],
        r"comes with Python code of its own; read it, then allow it with --trust-remote-code",
    ),
    "generate: model": (
        lambda p: ["generate", p.tiny],
        r"holds an ordinary model, no low-bit checkpoint .*dist-lowbit convert",
    ),
    "chat: model": (lambda p: ["chat", p.tiny], r"holds an ordinary model, no low-bit checkpoint"),
    "inspect: model": (lambda p: ["inspect", p.tiny], r"holds an ordinary model, no low-bit checkpoint"),
    "generate: no path": (
        lambda p: ["generate", p.tmp / "no", "-n", 2],
        r"/no is no directory; expected one written by",
    ),
    **{
        f"{verb}: nothing": (
            lambda p, verb=verb: [verb, ""],  # type: ignore[misc]
            r"the directory of the checkpoint is an empty string; expected a low-bit checkpoint",
        )
        for verb in ("generate", "chat", "inspect")
    },
    "generate: empty": (lambda p: ["generate", p.empty()], r"holds no model, no low-bit checkpoint"),
    "a damaged shard": (
        lambda p: ["generate", p.broken(next(p.checkpoint.glob("lowbit-*-00002-of-*")).name, "x", p.checkpoint)],
        r"lowbit-\S*-00002-of-00002\.safetensors (has|is) ",
    ),
    "manifest": (lambda p: ["inspect", p.broken("lowbit.json", "{", p.checkpoint)], r"lowbit\.json"),
    "no such option": (lambda p: ["generate", p.checkpoint, "--beams", 3], r"No such option.*--beams"),
    "no argument": (lambda p: ["generate"], r"Missing argument '(?i:directory)'"),
    "no such verb": (lambda p: ["quantise"], r"No such command 'quantise'"),
    "run nothing": (lambda p: ["run"], r""),
    "-n x": (lambda p: ["generate", p.checkpoint, "-n", "x"], r"Invalid value for '-n': .*'x'"),
    "-n 1.5": (lambda p: ["chat", p.checkpoint, "-n", "1.5"], r"Invalid value for '-n': .*'1\.5'"),
    "top_p x": (lambda p: ["chat", p.checkpoint, "--top-p", "x"], r"Invalid value for '--top-p': .*'x'"),
    "-n 0": (lambda p: ["generate", p.checkpoint, "-n", 0], r"-n is 0; expected at least 1 rank"),
    "-n -1": (lambda p: ["chat", p.checkpoint, "-n", -1], r"-n is -1; expected at least 1 rank"),
    # 768 / 64 units of the MLP's sum, the most that any matrix of the sample model has.
    "-n 99": (
        lambda p: ["generate", p.checkpoint, "-n", 99],
        r"-n is 99, but this model has work for at most 12 ranks",
    ),
    "bind": (lambda p: ["generate", p.checkpoint, "--bind", "core:9"], r""),
    "max_new_tokens": (
        lambda p: ["generate", p.checkpoint, "--max-new-tokens", 0],
        r"error: --max-new-tokens is 0; expected at",
    ),
    "temperature": (
        lambda p: ["generate", p.checkpoint, "--temperature", 0],
        r"error: --temperature is 0\.0; expected more than 0",
    ),
    "temperature nan": (
        lambda p: ["chat", p.checkpoint, "--temperature", "nan"],
        r"error: --temperature is nan; expected more",
    ),
    "top_p": (
        lambda p: ["generate", p.checkpoint, "--top-p", 1.5],
        r"error: --top-p is 1\.5; expected more than 0 and at most 1",
    ),
    "top_k": (lambda p: ["generate", p.checkpoint, "--top-k", -1], r"error: --top-k is -1; expected 0 \(off\) or more"),
    "chat: top_k": (
        lambda p: ["chat", p.checkpoint, "--top-k", -1],
        r"error: --top-k is -1; expected 0 \(off\) or more",
    ),
    "chat: top_p": (
        lambda p: ["chat", p.checkpoint, "--top-p", 0],
        r"error: --top-p is 0\.0; expected more than 0 and at most",
    ),
    "seed": (lambda p: ["generate", p.checkpoint, "--seed", 1 << 63], r"error: --seed is 92\d+; expected 0 to"),
    **{
        f"{verb}: greedy {option}": (
            lambda p, verb=verb, option=option: [verb, p.checkpoint, "--greedy", option, "1"],  # type: ignore[misc]
            rf"error: {option} is 1(\.0)?, and --greedy always takes the most likely token; leave one of the two out",
        )
        for verb in ("generate", "chat")
        for option in ("--temperature", "--top-k", "--top-p", "--seed")
    },
    "bench decode: empty shape": (
        lambda p: ["bench", "decode", "--shape", ""],
        "error: --shape is ''; expected a directory",
    ),
    "decoder": (
        lambda p: ["generate", p.checkpoint, "--decoder", "fast"],
        r"--decoder is 'fast'; expected auto, native",
    ),
    "a cache without our decoder": (
        lambda p: ["generate", p.checkpoint, "--decoder", "off", "--kv-cache-dtype", "int8"],
        r"error: --kv-cache-dtype is 'int8', and Hugging Face's forward, which runs this model, has a cache of its own",
    ),
    "long prompt": (
        lambda p: ["generate", p.checkpoint, "--prompt", "the cat " * 1200],
        r"the prompt has \d+ tokens; this model holds 1024 with its answer",
    ),
    "tokenizer is no json": (
        lambda p: ["generate", p.broken("tokenizer.json", "{", p.checkpoint)],
        r"holds no usable tokenizer: ",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_one_sentence(case: str, places: Places, cli: Cli) -> None:
    words, text = MODELS[case]
    if case in ("run nothing", "bind"):  # the launcher's own sentences
        done = cli(*words(places))
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        return
    sentence = cli(*words(places)).sentence()
    assert re.search(text, sentence), sentence
    assert not places.out.exists(), "a refused conversion left something behind"


SETTINGS = {
    "BACKENDS": ("x", r"DIST_LOWBIT_BACKENDS is no setting; the settings are DIST_LOWBIT_ISA, "),
    "BACKEND": (
        "carrier-pigeon",
        r"DIST_LOWBIT_BACKEND is 'carrier-pigeon'; expected auto, single, shm, hierarchical, ccl, mpi, gloo",
    ),
    "COMPUTE": ("int3", r"DIST_LOWBIT_COMPUTE is 'int3'; expected int8 or fp32"),
    "TIMEOUT": ("soon", r"DIST_LOWBIT_TIMEOUT is 'soon'; expected a number of seconds"),
    "LOG": ("loud", r"DIST_LOWBIT_LOG is 'loud'; expected one of"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, checkpoint: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    value, text = SETTINGS[name]
    monkeypatch.setenv(f"DIST_LOWBIT_{name}", value)
    assert re.search(text, cli("generate", checkpoint).sentence())


def test_a_bad_setting_is_a_sentence_from_the_first_import_on() -> None:
    for name, (value, text) in SETTINGS.items():
        if name != "BACKEND":  # known only once the backends are imported
            assert re.search(text, process("doctor", **{f"DIST_LOWBIT_{name}": value}).sentence())


@pytest.mark.slow  # tests/core and tests/ops have each of the two by itself
def test_settings_of_the_compiled_kernels(checkpoint: Path) -> None:
    from dist_lowbit.core.native import native, native_why_not

    library = process("generate", checkpoint, DIST_LOWBIT_LIBRARY="/nowhere.so").sentence()
    assert re.search(r"DIST_LOWBIT_LIBRARY is '/nowhere\.so': no compiled library at /nowhere\.so", library)
    if native() is None:
        pytest.skip(f"no compiled kernels: {native_why_not()}")
    isa = process("generate", checkpoint, DIST_LOWBIT_ISA="sse9").sentence()
    assert re.search(r"DIST_LOWBIT_ISA is 'sse9'; expected auto or one of scalar, ", isa)


@pytest.mark.parametrize("asked", [1, 2, 4])
def test_a_number_of_ranks_that_is_not_the_jobs(
    asked: int, checkpoint: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    sentence = cli("generate", checkpoint, "-n", asked).sentence()
    assert f"-n is {asked}, but this job has 3 rank(s); leave -n out inside a job" in sentence


@pytest.fixture
def bound_by_permissions() -> Iterator[None]:
    """Take from this thread the right to overlook file permissions, which root has, and give it back."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their upper halves
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] = before & ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0


@pytest.mark.usefixtures("bound_by_permissions")
def test_permissions(tiny: Path, cli: Cli, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    for words, text in {
        ("convert", tiny, locked): r"cannot save into .*/locked: .*/locked is not writable",
        ("convert", tiny, locked / "a" / "b"): r"cannot save into .*/b: .*/locked is not writable",
    }.items():
        locked.chmod(0o555)
        assert re.search(text, cli(*words).sentence())
    for words in (("convert", locked, tmp_path / "out"), ("generate", locked), ("inspect", locked / "x")):
        locked.chmod(0o000)
        assert re.search(r"/locked", cli(*words).sentence())
    locked.chmod(0o755)


QUICK = """
import sys
from dist_lowbit.cli.main import main
for words in {commands!r}:
    assert main(words) == 2, words
heavy = {{"transformers", "accelerate"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_cheap_checks_come_before_heavy_imports(checkpoint: Path, tiny: Path, tmp_path: Path) -> None:
    commands = [
        ["convert", str(tiny), str(tmp_path / "out"), "--low-bit", "int4"],
        ["convert", str(tmp_path / "no"), str(tmp_path / "out")],
        ["convert", "some/model", str(tmp_path / "out")],  # offline, and not in the cache
        ["convert", str(checkpoint), str(tmp_path / "out")],
        ["generate", str(tiny), "-n", "2"],
        ["generate", str(checkpoint), "-n", "99"],
        ["generate", str(checkpoint), "--temperature", "0"],
        ["chat", str(tmp_path)],
        ["inspect", str(tiny)],
    ]
    done = subprocess.run(
        [sys.executable, "-c", QUICK.format(commands=commands)],
        env=environment(HF_HOME=str(tmp_path / "hub")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(commands)
    assert "some/model is no local directory, and it is not in the hub's cache" in done.stderr


def test_an_empty_prompt_starts_from_nothing(checkpoint: Path, cli: Cli) -> None:
    done = cli("generate", checkpoint, "--greedy", "--max-new-tokens", 3, "--json")
    assert (done.code, done.err) == (0, "no --prompt: starting from the model's beginning-of-text token\n")
    assert json.loads(done.out)["prompt_tokens"] == 1  # the sample model's <s>


def test_the_sample_model_itself_is_no_checkpoint(cli: Cli) -> None:
    assert "holds an ordinary model" in cli("generate", SAMPLE).sentence()
