"""A model by its hub id, from a local cache and without a network; and models with code of their own."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.command_line import SAMPLE, Cli, edit, process
from tests.cli.own_code import cache_as, write_own_code


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, for this process and those it starts, and no network."""
    folder = tmp_path / "home" / "hub"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(folder.parent))
    # huggingface_hub read its variables when it was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def test_convert_a_hub_id_and_its_revisions(hub: Path, tiny: Path, cli: Cli, tmp_path: Path) -> None:
    cache_as(hub, "org/tiny", tiny)
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    edit(other / "config.json", rope_theta=77.0, rope_parameters=None)
    commit = cache_as(hub, "org/tiny", other, "v2")
    for revision, theta in ((), 10000.0), (("--revision", "v2"), 77.0), (("--revision", commit), 77.0):
        assert cli("convert", "org/tiny", tmp_path / "out", *revision).code == 0
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["rope_parameters"]["rope_theta"] == theta
    assert (
        "org/tiny is no local directory, and it is not in the hub's cache"
        in cli("convert", "org/tiny", tmp_path / "none", "--revision", "v3").sentence()
    )


@pytest.mark.usefixtures("hub")
def test_an_id_that_cannot_be_had_is_a_sentence(cli: Cli, tmp_path: Path) -> None:
    for name in ("org/none", "gpt2"):
        sentence = cli("convert", name, tmp_path / "out").sentence()
        assert f"{name} is no local directory, and it is not in the hub's cache" in sentence
        assert "HF_HUB_OFFLINE" in sentence
    for name in ("a/b/c", "org/..", "--x", "./none", "~none/x"):
        words = ("convert", "--", name, tmp_path / "out")
        assert name in cli(*words).sentence()
    assert not (tmp_path / "out").exists()


def test_only_the_files_that_are_read_are_fetched(hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dist_lowbit.assembly import hub as module

    asked: list[list[str]] = []
    (tmp_path / "old").mkdir()

    def snapshot(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / name)

    monkeypatch.setattr(module, "snapshot_download", snapshot)
    monkeypatch.chdir(hub)  # where no directory has the model's name
    module.resolve("old")
    assert [("*.safetensors" in patterns, "*.bin" in patterns) for patterns in asked] == [(True, False), (False, True)]
    asked.clear()
    module.resolve("old", files="config")
    assert [("*.safetensors" in patterns, "*.bin" in patterns) for patterns in asked] == [(False, False)]


TWO = """
import os, sys, time
from pathlib import Path
from dist_lowbit.comm import init_group
from dist_lowbit.core.errors import UsageError
from dist_lowbit.transformers import AutoModelForCausalLM
from dist_lowbit.assembly import hub
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
real, hub._PATIENCE_S = hub.resolve, 0.2

def slow(model, revision=None, files="all"):
    time.sleep(4.0 if model == "org/sample" else 0.0)
    print("rank 0 has it", flush=True)
    return real(model, revision, files)

if rank == 0:  # a download that outlasts the time after which silence is a fault
    hub.resolve = slow
(folder / f"imported{rank}").touch()
while not all((folder / f"imported{other}").exists() for other in range(2)):
    time.sleep(0.01)
with init_group(timeout=3.0) as group:
    try:
        AutoModelForCausalLM.from_pretrained("org/none", load_in_4bit=True, tensor_parallel=group)
    except UsageError as error:
        print("refused:", error, flush=True)
    model = AutoModelForCausalLM.from_pretrained("org/sample", load_in_4bit=True, tensor_parallel=group)
    print("heads", model.model.layers[0].self_attn.o_proj.in_features, flush=True)
"""


@pytest.mark.slow
def test_one_rank_of_a_host_downloads_while_the_others_wait(hub: Path, tmp_path: Path) -> None:
    cache_as(hub, "org/sample", SAMPLE)
    script = tmp_path / "two.py"
    script.write_text(TWO)
    done = process("run", "-n", 2, script, tmp_path, HF_HOME=str(hub.parent))
    assert done.code == 0, done.err
    for rank in range(2):
        assert f"[{rank}] refused: org/none is no local directory, and it is not in the hub's cache" in done.out
        assert f"[{rank}] heads 128" in done.out
    assert done.out.count("rank 0 has it") == 2  # the others never ask before it is there
    assert "[1] waiting for the first rank of this host to have org/sample" in done.err
    assert "[0] waiting" not in done.err


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let transformers keep copies of models' code in a folder of this test, and forget them afterwards."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds the folder
    forget()
    yield
    forget()


@pytest.mark.usefixtures("own_modules")
def test_own_code_runs_only_when_it_is_trusted(cli: Cli, tmp_path: Path) -> None:
    folder = write_own_code(tmp_path / "model")
    assert "Python code of its own" in cli("convert", folder, tmp_path / "out").sentence()
    assert not (folder / "ran").exists()
    assert not (tmp_path / "out").exists()
    assert cli("convert", folder, tmp_path / "out", "--trust-remote-code").code == 0
    assert (folder / "ran").exists()
    (folder / "ran").unlink()
    assert cli("inspect", tmp_path / "out").code == 0
    assert "Python code of its own" in cli("generate", tmp_path / "out").sentence()
    assert not (folder / "ran").exists()


@pytest.mark.usefixtures("own_modules")
def test_own_code_in_every_way_of_loading(tmp_path: Path) -> None:
    import transformers

    from dist_lowbit import load_low_bit, low_memory_init, optimize_model
    from dist_lowbit.core.errors import UsageError
    from dist_lowbit.parallel import LowBitLinear
    from dist_lowbit.transformers import AutoModelForCausalLM

    folder = write_own_code(tmp_path / "model")
    ids = torch.arange(6).reshape(1, 6)
    trusted = {"trust_remote_code": True}
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, **trusted)
    model = optimize_model(plain, low_bit="sym_int8")
    assert isinstance(model.head, LowBitLinear)
    expected = model(ids).logits
    ours = AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="sym_int8", **trusted)
    assert torch.equal(ours(ids).logits, expected)
    saved = tmp_path / "saved"
    ours.save_low_bit(saved)
    with pytest.raises(UsageError, match="Python code of its own"):
        AutoModelForCausalLM.from_pretrained(saved)
    with low_memory_init(), pytest.raises(Exception, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=False)
    with low_memory_init():
        empty = transformers.AutoModelForCausalLM.from_pretrained(saved, torch_dtype="auto", **trusted)
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = [
        load_low_bit(empty, saved),
        AutoModelForCausalLM.from_pretrained(saved, **trusted),
        AutoModelForCausalLM.load_low_bit(saved, **trusted),
        transformers.AutoModelForCausalLM.from_pretrained(saved, **trusted),
    ]
    for found in loaded:
        assert torch.equal(found(ids).logits, expected)
