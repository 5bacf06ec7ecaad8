"""The examples do what they say: on one rank and on two, under every launcher that is here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from dist_lowbit.launcher.runners import RUNNERS

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
GREEDY = ("--max-new-tokens", "12")
SAMPLED = (*GREEDY, "--sample", "--seed", "5")


def run(*command: object, limit: float = 110, **more: str) -> str:
    """Run a command outside the checkout and return its stdout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}
    # The launchers of this environment come first on PATH, as in an activated one.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=limit, env=env, cwd="/", check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def refused(script: str, *words: str) -> str:
    """Return what an example says that ends with an error."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    return done.stderr


@cache
def alone(*words: str) -> str:
    """Return what generate.py says on one rank."""
    return run(sys.executable, EXAMPLES / "generate.py", *words).strip()


Style = Callable[[], list[object]]
STYLES: dict[str, Style] = {
    "local": lambda: [sys.executable, "-m", "dist_lowbit.cli", "run", "-n", 2, "--no-prefix"],
    "torchrun": lambda: [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2],
    "mpirun": lambda: [shutil.which("mpirun", path=launchers()), "-n", 2, sys.executable],
    "deepspeed": lambda: [shutil.which("deepspeed", path=launchers()), "--num_accelerators", 2],
}


def launchers() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def check(style: str, words: tuple[str, ...]) -> None:
    why_not = RUNNERS[style]().why_not()
    if why_not is not None:
        pytest.skip(f"--style {style} cannot be used: {why_not}")
    said = run(*STYLES[style](), EXAMPLES / "generate.py", *words, DS_ACCELERATOR="cpu")
    # deepspeed and Intel MPI add lines of their own around the text.
    assert said.count(alone(*words)) == 1, said


def test_generate_has_at_most_sixty_lines() -> None:
    assert len((EXAMPLES / "generate.py").read_text().splitlines()) <= 60


def test_generate_goes_on_from_its_prompt() -> None:
    assert alone(*GREEDY).startswith("Once upon a time")


@pytest.mark.slow
@pytest.mark.parametrize("words", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("style", STYLES)
def test_generate_under_every_launcher(style: str, words: tuple[str, ...]) -> None:
    check(style, words)


@pytest.mark.slow
@pytest.mark.parametrize("style", RUNNERS)
def test_generate_in_every_style_writes_the_same_lines(style: str) -> None:
    why_not = RUNNERS[style]().why_not()
    if why_not is not None:
        pytest.skip(f"--style {style} cannot be used: {why_not}")
    said = run(
        sys.executable, "-m", "dist_lowbit.cli", "run", "-n", 2, "--style", style, EXAMPLES / "generate.py", *GREEDY
    )
    lines = [line for line in said.splitlines() if re.match(r"\[\d+\] ", line)]
    assert "\n".join(lines) == "\n".join(f"[0] {line}" for line in alone(*GREEDY).splitlines())


@pytest.fixture(scope="session")
def mpich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return MPICH's mpirun, in a folder of its own: its wheel would put it in the place of Intel's."""
    folder = tmp_path_factory.mktemp("mpich")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "mpich"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mpich cannot be installed here: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return folder / "bin" / "mpirun"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_generate_under_mpich_directly_and_as_a_style(mpich: Path) -> None:
    assert run(mpich, "-n", 2, sys.executable, EXAMPLES / "generate.py", *GREEDY).count(alone(*GREEDY)) == 1
    words = ["-n", 2, "--style", "mpirun", "--no-prefix", EXAMPLES / "generate.py"]
    said = run(sys.executable, "-c", WITH_MPICH, mpich, *words, *GREEDY)
    assert said.count(alone(*GREEDY)) == 1, said


# The launcher would take the mpirun beside this Python first.
WITH_MPICH = """
import sys
from dist_lowbit.launcher import __main__ as launcher
from dist_lowbit.launcher.runners import RUNNERS, mpirun
found = mpirun.MpirunRunner(sys.argv[1], "mpich")
RUNNERS["mpirun"] = lambda: found
sys.exit(launcher.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_sampling_is_not_greedy() -> None:
    assert alone(*GREEDY) != alone(*SAMPLED)


@pytest.mark.slow
def test_save_from_two_ranks_and_load_on_one(tmp_path: Path) -> None:
    script = EXAMPLES / "save_and_load.py"
    saved = run(*STYLES["local"](), script, "--save", tmp_path / "story")
    assert len(list((tmp_path / "story").glob("lowbit-*-of-00002.safetensors"))) == 2
    loaded = run(sys.executable, script, "--load", tmp_path / "story")
    assert saved.startswith("2 rank(s), sum of the logits ")
    assert loaded.startswith("1 rank(s), ")
    assert saved.split(",")[1] == loaded.split(",")[1]


@pytest.mark.slow
def test_any_module() -> None:
    said = run(sys.executable, EXAMPLES / "optimize_any_module.py")
    assert float(said.split()[2]) > 0.99
    assert "loaded equals saved: True" in said


def needs_deepspeed() -> None:
    if (why_not := RUNNERS["deepspeed"]().why_not()) is not None:
        pytest.skip(f"--style deepspeed cannot be used: {why_not}")


@pytest.mark.slow
@pytest.mark.timeout(400)  # DeepSpeed compiles its all-reduce at its first use
@pytest.mark.parametrize("style", ["deepspeed", "mpirun"])
def test_a_model_that_deepspeed_split_says_what_one_rank_says(style: str) -> None:
    needs_deepspeed()
    if (why_not := RUNNERS[style]().why_not()) is not None:
        pytest.skip(f"--style {style} cannot be used: {why_not}")
    words = ("--n-predict", "12", "--prompt", "Once upon a time")
    more = {"DS_ACCELERATOR": "cpu", "RANK_WAIT_TIME": "0.1"}
    said = run(*STYLES[style](), EXAMPLES / "deepspeed_autotp.py", *words, limit=300, **more)
    assert "Inference time of generating 12 tokens: " in said
    assert said.count(alone(*GREEDY)) == 1, said


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [2, 3])
def test_models_that_deepspeed_split_are_taken_over_bit_for_bit(ranks: int, tmp_path: Path) -> None:
    needs_deepspeed()
    start = [shutil.which("deepspeed", path=launchers()), "--num_accelerators", ranks, "--no_local_rank"]
    script = Path(__file__).with_name("deepspeed_taken_over.py")
    said = run(*start, script, tmp_path, limit=300, DS_ACCELERATOR="cpu")
    right = "equal: True, saved equal: True, refused: True, llm equal: True, told: True"
    assert said.count(right) == 3 * ranks, said


@pytest.mark.slow
@pytest.mark.parametrize("beams", [[], ["--greedy", "--token-latency"]])
def test_the_metrics_of_ipex_are_printed(beams: list[str]) -> None:
    words = ["--benchmark", "--num-iter", 3, "--num-warmup", 1, "--max-new-tokens", 4, "--print-memory", *beams]
    said = run(sys.executable, EXAMPLES / "run_generation_with_deepspeed.py", *words, "--dtype", "float32",
               "--ipex-weight-only-quantization", "--weight-dtype", "INT4", "--ipex", "--autotp")  # fmt: skip
    lines = [line for line in said.splitlines() if line.endswith(" sec.")]
    names = [line.partition(":")[0] for line in lines]
    tokens = ["First token average latency", "Average 2... latency", "P90 2... latency", "P99 2... latency"]
    assert names == ["Inference latency", *(tokens if beams else [])]
    assert all(float(line.split()[-2]) > 0 for line in lines)
    assert said.count("Iteration: ") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--benchmark", "--num-iter", "0"], "--num-iter is 0; expected a whole number of at least 1"),
        (["--input-tokens", "0"], "--input-tokens is 0; expected a whole number of at least 1"),
    ],
)
def test_numbers_that_generate_nothing_are_a_sentence(words: list[str], text: str) -> None:
    assert refused("run_generation_with_deepspeed.py", *words) == f"error: {text}\n"


@pytest.mark.slow
def test_whisper() -> None:
    pytest.importorskip("whisper", reason="openai-whisper is not installed")
    assert "loaded says the same: True" in run(sys.executable, EXAMPLES / "whisper_transcribe.py")


@pytest.mark.slow
def test_a_bad_model_is_a_sentence() -> None:
    said = refused("generate.py", "--model", "/nowhere")
    assert said == "error: /nowhere does not exist; expected a model directory or a hub id\n"
