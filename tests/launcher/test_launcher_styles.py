"""The commands of every style, as --dry-run prints them; and that each style that is here starts the right ranks."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

import pytest
from test_launcher_topology import GOLDEN, machine

from dist_lowbit.launcher.__main__ import main
from dist_lowbit.launcher.binding import bind, resolve
from dist_lowbit.launcher.job import Job, Place, Program, inherited, make_job
from dist_lowbit.launcher.runners import RUNNERS, Runner
from dist_lowbit.launcher.runners.deepspeed import DeepspeedRunner
from dist_lowbit.launcher.runners.foreign import TRAMPOLINE
from dist_lowbit.launcher.runners.local import LocalRunner
from dist_lowbit.launcher.runners.mpirun import MpirunRunner, dialect_of
from dist_lowbit.launcher.runners.slurm import SlurmRunner
from dist_lowbit.launcher.runners.torchrun import TorchrunRunner
from tests.launcher.conftest import READY, Launch, gone, until

SCRIPT = Program("script", "gen.py", ("--x", "a b"), "/py")


def job(
    name: str = "one_socket_2_cores.lscpu",
    bind_mode: str = "none",
    ranks: int = 2,
    program: Program = SCRIPT,
    environ: Mapping[str, str] | None = None,
    user: Mapping[str, str] | None = None,
    prefix: bool = True,
    log_dir: str | None = None,
    hosts: tuple[str, ...] = (),
    counts: tuple[int, ...] = (),
    node: int = 0,
    masks: Sequence[Mapping[str, str]] = (),
) -> Job:
    topology = machine(name)
    return make_job(
        program,
        bind(topology, ranks, bind_mode),
        Place("here", 29400, "cafe", user_env=user or {}, hosts=hosts, counts=counts, node=node),
        environ if environ is not None else {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
        bind=resolve(topology, ranks, bind_mode),
        prefix=prefix,
        log_dir=log_dir,
        masks=masks,
    )


def line(runner: object, of: Job) -> str:
    (command,) = runner.command(of)  # type: ignore[attr-defined]
    return str(shlex.join(command.argv))


SHARED = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "DIST_LOWBIT_LAUNCH_ID": "cafe"}
GENV = "-genv MASTER_ADDR 127.0.0.1 -genv MASTER_PORT 29400 -genv DIST_LOWBIT_LAUNCH_ID cafe -genv OMP_NUM_THREADS 1"
END = "/py gen.py --x 'a b'"
LINES = f"/py -I -S {TRAMPOLINE} --lines all -- {END}"
LOGS = os.path.abspath("logs")
ALONE = f"/py -I -S {TRAMPOLINE} --lines others -- {END}"


def test_local_environment_is_the_contract() -> None:
    second = LocalRunner().command(job(environ={}, ranks=2))[1]
    assert second.env == SHARED | {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    assert second.argv == ("/py", "gen.py", "--x", "a b")


def test_threads_follow_the_cores_of_each_rank() -> None:
    commands = LocalRunner().command(job("two_sockets_ht.lscpu", "core", 3))
    assert [c.env["OMP_NUM_THREADS"] for c in commands] == ["18", "19", "19"]
    assert job("two_sockets_ht.lscpu", "core", 3).env["OMP_NUM_THREADS"] == "18"


def test_the_user_wins() -> None:
    assert "OMP_NUM_THREADS" not in job(environ={"OMP_NUM_THREADS": "7"}).ranks[0].env
    assert job(user={"OMP_NUM_THREADS": "5", "A": "b"}).ranks[1].env["OMP_NUM_THREADS"] == "5"
    assert job(user={"A": "b"}).env["A"] == "b"


def test_oneccl_is_told_how_ranks_meet_without_mpirun(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-n", "1", "--dry-run", "--env", "DIST_LOWBIT_BACKEND=ccl", "--env", "FI_PROVIDER=verbs", "-m", "mod"]
    told = "CCL_PROCESS_LAUNCHER=none CCL_ATL_TRANSPORT=ofi"
    assert main(words) == 0
    said = capsys.readouterr().out
    assert told in said
    assert "FI_PROVIDER=verbs" in said
    assert told not in LocalRunner().command(job())[0].shell()
    managed = make_job(SCRIPT, bind(machine("one_socket_2_cores.lscpu"), 1, "none"), Place("here", 1, "cafe"),
                       {"DIST_LOWBIT_BACKEND": "ccl"}, bind="none", style="mpirun")  # fmt: skip
    assert "CCL_ATL_TRANSPORT" not in managed.env


def test_what_another_launcher_left_is_not_inherited() -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "GROUP_RANK", "ROLE_RANK", "PMI_FD")
    names += ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "PALS_RANKID")
    stale = dict.fromkeys((*names, "TORCHELASTIC_USE_AGENT_STORE"), "1")
    kept = {"PATH": "/bin", "OMPI_MCA_btl": "self", "I_MPI_DEBUG": "5", "RANKS": "x", "SLURM_PROCID": "0"}
    assert inherited(stale | kept) == kept


@pytest.mark.parametrize(
    ("version", "dialect"),
    [
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626 (id: b44796a)\n", "intel"),
        ("HYDRA build details:\n    Version:                                 5.0.2\n", "mpich"),
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n", "openmpi"),
        ("mpirun.real (OpenRTE) 4.1.4\n", "openmpi"),
        ("some other program 1.0\n", None),
    ],
)
def test_dialects_are_told_by_their_version(version: str, dialect: str | None) -> None:
    assert dialect_of(version) == dialect


MPIRUN = [
    ("intel", job(), f"{GENV} -genv I_MPI_PIN 0 -n 2 {LINES}"),
    ("intel", job(bind_mode="core", prefix=False),
     f"{GENV} -genv I_MPI_PIN 1 -genv I_MPI_PIN_DOMAIN '[0x1,0x2]' -n 2 {ALONE}"),
    ("intel", job(hosts=("a", "b"), counts=(2, 1)), f"{GENV} -genv I_MPI_PIN 0 -hosts a:2,b:1 -n 3 {LINES}"),
    ("mpich", job(), f"-bind-to none {GENV} -n 2 {LINES}"),
    ("mpich", job("hybrid_8p_16e.sysfs", "core", user={"OMP_NUM_THREADS": "1"}),
     f"-bind-to user:0+2+4+6,8+10+12+14 {GENV} -n 2 {LINES}"),
    ("openmpi", job(), "--bind-to none --map-by slot:OVERSUBSCRIBE -x MASTER_ADDR=127.0.0.1 "
     f"-x MASTER_PORT=29400 -x DIST_LOWBIT_LAUNCH_ID=cafe -x OMP_NUM_THREADS=1 -n 2 {LINES}"),
    ("openmpi", job(hosts=("a", "b"), counts=(2, 2)), "--bind-to none --map-by slot:OVERSUBSCRIBE -x "
     "MASTER_ADDR=127.0.0.1 -x MASTER_PORT=29400 -x DIST_LOWBIT_LAUNCH_ID=cafe -x OMP_NUM_THREADS=1 "
     f"--host a:2,b:2 -n 4 {LINES}"),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "of", "expected"), MPIRUN)
def test_mpirun(dialect: str, of: Job, expected: str) -> None:
    assert line(MpirunRunner("/bin/mpirun", dialect), of) == f"/bin/mpirun {expected}"


def test_openmpi_binds_by_the_trampoline_and_admits_root() -> None:
    text = line(MpirunRunner("/bin/mpirun", "openmpi", root=True), job(bind_mode="core", prefix=False))
    assert "--allow-run-as-root" in text
    assert text.endswith(f"-n 2 /py -I -S {TRAMPOLINE} --cpus '0;1' --lines others -- {END}")


def test_memory_nodes_come_by_the_trampoline_under_hydra() -> None:
    text = line(MpirunRunner("/bin/mpirun", "intel"), job("two_sockets_ht.lscpu", "numa"))
    assert f"I_MPI_PIN_DOMAIN '[{hex((1 << 28) - 1)},{hex(((1 << 28) - 1) << 28)}]'" in text
    assert text.endswith(f"-n 2 /py -I -S {TRAMPOLINE} --nodes '0;1' --lines all -- {END}")


def test_masks_come_by_the_trampoline() -> None:
    masks = [{"ZE_AFFINITY_MASK": "0"}, {"ZE_AFFINITY_MASK": "1"}]
    text = line(TorchrunRunner(("torchrun",)), job(masks=masks))
    assert text.endswith(f"/py -I -S {TRAMPOLINE} --mask 'ZE_AFFINITY_MASK=0;1' --lines all -- {END}")


def test_mpirun_outside_the_path_finds_its_siblings() -> None:
    (command,) = MpirunRunner("/elsewhere/bin/mpirun", "intel").command(job())
    assert command.env["PATH"].startswith("/elsewhere/bin:")


TORCHRUN = "--nnodes 1 --nproc-per-node 2 --max-restarts 0 --master-addr 127.0.0.1 --master-port 29400"
DEEPSPEED = "--num_accelerators 2 --no_local_rank --master_addr 127.0.0.1 --master_port 29400"
OTHERS = [
    (TorchrunRunner(("torchrun",)), job(), f"{TORCHRUN} --no-python {LINES}"),
    (TorchrunRunner(("torchrun",)), job(program=Program("module", "m", ("y",), "/py"), prefix=False, log_dir="logs"),
     f"{TORCHRUN} --no-python /py -I -S {TRAMPOLINE} --lines others --keep {LOGS} -- /py -m m y"),
    (TorchrunRunner(("torchrun",)), job(program=Program("program", "/bin/ls", (), "/py"), prefix=False),
     f"{TORCHRUN} --no-python /py -I -S {TRAMPOLINE} --lines others -- /bin/ls"),
    (TorchrunRunner(("torchrun",)), job(bind_mode="core", prefix=False),
     f"{TORCHRUN} --no-python /py -I -S {TRAMPOLINE} --cpus '0;1' --lines others -- {END}"),
    (TorchrunRunner(("torchrun",)), job(counts=(2, 2), node=1, prefix=False), "--nnodes 2 --nproc-per-node 2 "
     "--max-restarts 0 --node-rank 1 --master-addr 127.0.0.1 --master-port 29400 --no-python " + ALONE),
    (DeepspeedRunner("deepspeed"), job(), f"{DEEPSPEED} --no_python {LINES}"),
    (DeepspeedRunner("deepspeed"), job(program=Program("module", "m", (), "/py"), log_dir="logs"),
     f"{DEEPSPEED} --no_python /py -I -S {TRAMPOLINE} --lines all --keep {LOGS} -- /py -m m"),
    (DeepspeedRunner("deepspeed"), job("two_sockets_ht.lscpu", "socket"),
     f"{DEEPSPEED} --no_python /py -I -S {TRAMPOLINE} --cpus '0-27;28-55' --nodes '0;1' --lines all -- {END}"),
]  # fmt: skip


@pytest.mark.parametrize(("runner", "of", "expected"), OTHERS)
def test_torchrun_and_deepspeed(runner: TorchrunRunner | DeepspeedRunner, of: Job, expected: str) -> None:
    assert line(runner, of) == f"{runner.name} {expected}"


def test_one_of_several_hosts_of_deepspeed_is_started_as_deepspeed_does() -> None:
    (command,) = DeepspeedRunner("deepspeed").command(job(counts=(2, 1), node=0))
    assert command.argv[:5] == ("/py", "-u", "-m", "deepspeed.launcher.launch", "--world_info")
    world = json.loads(base64.urlsafe_b64decode(command.argv[5]))
    assert world == {"node0": [0, 1], "node1": [0]}
    rest = "--node_rank 0 --no_local_rank --master_addr 127.0.0.1 --master_port 29400 --no_python "
    assert shlex.join(command.argv[6:]) == rest + LINES


def test_deepspeed_runs_on_the_cpu_unless_told_otherwise() -> None:
    assert DeepspeedRunner("deepspeed").command(job())[0].env["DS_ACCELERATOR"] == "cpu"
    assert DeepspeedRunner("deepspeed").command(job(user={"DS_ACCELERATOR": "xpu"}))[0].env["DS_ACCELERATOR"] == "xpu"


@pytest.mark.parametrize(
    ("runner", "words"),
    [
        (MpirunRunner(None, None), "mpirun is neither beside this Python nor on PATH"),
        (MpirunRunner("/bin/mpirun", None, "hello"), "none of Intel MPI, MPICH and Open MPI"),
        (TorchrunRunner(None), "this Python has no torch"),
        (DeepspeedRunner(None), "deepspeed is neither"),
        (SlurmRunner(None), "srun is not on PATH"),
        (SlurmRunner("/bin/srun"), "this is no Slurm allocation"),
    ],
)
def test_what_is_missing_is_said(runner: Runner, words: str) -> None:
    assert not runner.backend_exists()
    assert words in str(runner.why_not())


def test_dry_run_prints_everything_and_starts_nothing(launch: Launch) -> None:
    script = launch.script("open('started', 'w')")
    done = launch("-n", "3", "--topology", str(GOLDEN / "two_sockets_ht.lscpu"), "--bind", "core", "--dry-run",
                  "--master-port", "29411", "--env", "A=b c", script, "--n", "5")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("# style local, 3 ranks, bind core, launch id ")
    assert lines[1] == "# machine: 2 packages, 2 NUMA nodes, 56 physical cores, 112 CPUs"
    assert [text.partition(", ")[2] for text in lines[2:5]] == [
        f"CPUs {cpus}, any memory" for cpus in ("0-17", "18-36", "37-55")
    ]
    for rank, text in enumerate(lines[5:]):
        words = shlex.split(text)
        assert {f"RANK={rank}", "MASTER_PORT=29411", "A=b c", "WORLD_SIZE=3"} < set(words)
        assert words[-4:] == [sys.executable, script, "--n", "5"]
    assert len(lines) == 8
    assert not (launch.folder / "started").exists()


RANK_OF_ANY = """
names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
rank = next(os.environ[name] for name in names if name in os.environ)
"""
WHO = """
with open("who" + rank, "w") as f:
    f.write(f"{sorted(os.sched_getaffinity(0))} {os.environ['A']} {os.environ['MASTER_PORT']} {sys.argv[1:]}")
"""


# torch and DeepSpeed take seconds to be imported.
STYLES = [pytest.param(name, marks=[pytest.mark.slow] if name in ("torchrun", "deepspeed") else []) for name in RUNNERS]


@pytest.mark.parametrize("style", STYLES)
def test_each_style_that_is_here_starts_bound_ranks(launch: Launch, style: str) -> None:
    why_not = RUNNERS[style]().why_not()
    if why_not is not None:
        pytest.skip(f"--style {style} cannot be used: {why_not}")
    path = launch.folder / "who.py"
    path.write_text("import os, sys\n" + RANK_OF_ANY + WHO)
    ranks = min(2, len(os.sched_getaffinity(0)))
    done = launch("-n", str(ranks), "--bind", "core", "--style", style, "--env", "A=b c", str(path), "--local", "x y")
    assert done.returncode == 0, done.stderr
    places = [(launch.folder / f"who{rank}").read_text() for rank in range(ranks)]
    assert len({place.partition("]")[0] for place in places}) == ranks
    assert len({place.partition("]")[2] for place in places}) == 1
    assert " b c " in places[0]
    assert places[0].endswith("['--local', 'x y']")


def skip_without(style: str) -> None:
    why_not = RUNNERS[style]().why_not()
    if why_not is not None:
        pytest.skip(f"--style {style} cannot be used: {why_not}")


FAILURES = {
    "sys.exit(7)": (7, "ended with exit code 7"),
    "os.kill(os.getpid(), 11)": (139, "was killed by signal 11 (SIGSEGV)"),
}


@pytest.mark.parametrize(
    "failure", [pytest.param(name, marks=[pytest.mark.slow] * (index > 0)) for index, name in enumerate(FAILURES)]
)
@pytest.mark.parametrize("style", STYLES)
def test_the_failure_of_each_style_is_passed_on(launch: Launch, style: str, failure: str) -> None:
    skip_without(style)
    path = launch.folder / "fails.py"
    path.write_text(f"import os, sys, time\n{RANK_OF_ANY}{READY}if rank == '1': {failure}\ntime.sleep(60)\n")
    done = launch("-n", "2", "--bind", "none", "--style", style, str(path))
    code, words = FAILURES[failure]
    assert done.returncode == code, done.stderr
    pid = launch.wait_for("pid1")
    who = f"rank 1 (pid {pid} on host {os.uname().nodename})"
    assert f"dist-lowbit run: {who} {words}, so the job was ended" in done.stderr
    assert done.stderr.count("dist-lowbit run: ") == 1


@pytest.mark.parametrize("switch", [[], ["--no-prefix"]])
@pytest.mark.parametrize("style", STYLES)
def test_each_style_writes_lines_and_logs_by_rank(launch: Launch, style: str, switch: list[str]) -> None:
    skip_without(style)
    path = launch.folder / "says.py"
    path.write_text(
        f"import os, sys, time\n{RANK_OF_ANY}"
        "for piece in ['one', ' two', '\\nthr', 'ee\\n']:\n"
        "    print(piece, end='', flush=True)\n"
        "    time.sleep(0.01)\n"
        "print('err', rank, file=sys.stderr)\n"
    )
    done = launch("-n", "2", "--bind", "none", "--style", style, "--log-dir", "logs", *switch, str(path))
    assert done.returncode == 0, done.stderr
    prefixes = ["" if switch and rank == 0 else f"[{rank}] " for rank in range(2)]
    said = [
        line for line in done.stdout.splitlines() if line and not re.search(r"\] \[(INFO|WARNING)\] ", line)
    ]  # deepspeed's own
    if switch:  # rank 0 streams, so the other's lines may stand in the middle of its own
        assert len(said) >= 3
    else:
        assert sorted(said) == sorted(f"{p}{text}" for p in prefixes for text in ("one two", "three"))
    assert sorted(os.listdir(launch.folder / "logs")) == ["rank0.err", "rank0.out", "rank1.err", "rank1.out"]
    for rank in range(2):
        assert (launch.folder / "logs" / f"rank{rank}.out").read_text() == "one two\nthree\n"
        assert f"err {rank}\n" in (launch.folder / "logs" / f"rank{rank}.err").read_text()
        assert f"{prefixes[rank]}err {rank}\n" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("style", [name for name in RUNNERS if name != "local"])
def test_a_killed_launcher_leaves_no_rank_of_another_launcher(launch: Launch, style: str) -> None:
    why_not = RUNNERS[style]().why_not()
    if why_not is not None:
        pytest.skip(f"--style {style} cannot be used: {why_not}")
    path = launch.folder / "sleeps.py"
    path.write_text("import os, time\n" + RANK_OF_ANY + READY + "time.sleep(60)\n")
    process = launch.start("-n", "2", "--bind", "none", "--style", style, str(path))
    pids = launch.pids(2, seconds=60)
    process.kill()
    process.wait()
    until(lambda: all(map(gone, pids)), 10)
