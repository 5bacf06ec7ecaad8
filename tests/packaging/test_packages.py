"""The sdist, the wheel and the bare checkout hold what they should and install where there is no checkout."""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from builds import ROOT, Environment, build, run

ROOMS = ("dist_lowbit", "dist_lowbit.launcher", "dist_lowbit.kernels", "dist_lowbit.sample")
# Prints where each room was found and what the sample model holds; run in an environment's own interpreter.
PROBE = f"""
import importlib
for room in {ROOMS!r}:
    print(importlib.import_module(room).__file__)
from dist_lowbit import sample
print(sample.path() / "model.safetensors", (sample.path() / "model.safetensors").stat().st_size)
"""
SAMPLE_BYTES = (ROOT / "dist_lowbit" / "sample" / "storyteller" / "model.safetensors").stat().st_size
# What a C++ library may need of a machine: the C and C++ runtimes and nothing else.
SYSTEM_LIBRARIES = r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|numa)\.so\.\d+|ld-linux-x86-64\.so\.2"


@pytest.fixture(scope="session")
def pure_wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it would be with no compiled library: built in a second."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("pure"), {"wheel.cmake": "false"})


@pytest.fixture(scope="session")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, compiled."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def names_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_build_requirements_are_small() -> None:
    """Build isolation installs these anew for each build: torch among them would be a second download of it."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert [re.split(r"\W*[<>=]", text)[0] for text in config["build-system"]["requires"]] == ["scikit-build-core"]


def test_sdist_holds_sources_and_no_products(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2]: member for name, member in ((m.name, m) for m in archive.getmembers())}
    for name in ("LICENSE", "NOTICE", "README.md", "CMakeLists.txt", "kernels/cpu/CMakeLists.txt", "launcher/job.py"):
        assert name in names, name
    assert names["dist_lowbit/launcher"].linkname == "../launcher"
    assert names["dist_lowbit/kernels"].linkname == "../kernels"
    assert not [name for name in names if re.search(r"\.(so|o|pyc)$|__pycache__|^(build|dist|\.venv|demo-out)/", name)]


def test_wheel_holds_the_package_and_nothing_else(pure_wheel: Path) -> None:
    names = names_of(pure_wheel)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dist_lowbit"}
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "dist_lowbit").rglob("*.py")}
    for top in ("launcher", "kernels"):
        inside |= {f"dist_lowbit/{path.relative_to(ROOT)}" for path in (ROOT / top).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == inside
    assert "dist_lowbit/py.typed" in names
    compiled_later = {"dist_lowbit/kernels/ccl/shim.cpp"}  # on the user's machine, against Intel's library there
    assert {name for name in names if name.endswith((".cpp", ".h", ".def", "CMakeLists.txt"))} == compiled_later


def test_metadata(pure_wheel: Path) -> None:
    import dist_lowbit

    with zipfile.ZipFile(pure_wheel) as archive:
        folder = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        meta = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
        licences = {name for name in archive.namelist() if "/licenses/" in name}
    assert meta["Version"] == dist_lowbit.__version__
    assert meta["License-Expression"] == "Apache-2.0"
    assert len(licences) == 2  # LICENSE and NOTICE
    assert {"deepspeed", "mpi", "ccl", "serve", "bench", "test", "dev"} <= set(meta.get_all("Provides-Extra", []))
    assert "dist-lowbit = dist_lowbit.cli.main:main" in scripts.replace("=", " = ").replace("  ", " ")


def test_python_parts_install_outside_the_checkout(pure_wheel: Path, environment: Environment) -> None:
    environment.install(pure_wheel)
    *rooms, model = environment.run("python", "-I", "-c", PROBE).splitlines()
    assert all(Path(place).is_relative_to(environment.site) for place in rooms), rooms
    assert model.endswith(f" {SAMPLE_BYTES}")
    why = "from dist_lowbit.core.native import native, native_why_not; assert native() is None; print(native_why_not())"
    assert "no compiled library at" in environment.run("python", "-I", "-c", why)


def test_bare_checkout_resolves_every_room(environment: Environment) -> None:
    # An environment in which nothing is installed: the tree is found because it is the current folder.
    places = run(environment.python, "-c", PROBE, cwd=ROOT).splitlines()[: len(ROOMS)]
    assert all(Path(place).is_relative_to(ROOT) for place in places), places
    assert "usage" in run(environment.python, "-m", "launcher", "--help", cwd=ROOT).lower()


def check_library(path: Path) -> None:
    """Fail if the library at `path` needs Python or torch, or shows symbols that are not ours."""
    dynamic = run("readelf", "--dynamic", "--wide", path, cwd=path.parent)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed
    assert not [name for name in needed if not re.fullmatch(SYSTEM_LIBRARIES, name)], needed
    assert "RUNPATH" not in dynamic
    table = run("nm", "--dynamic", path, cwd=path.parent)
    symbols = [line.split()[-2:] for line in table.splitlines()]
    assert not [name for kind, name in symbols if kind in "TDBRV" and not name.startswith("dlb_")]
    assert not [name for kind, name in symbols if kind == "U" and re.match(r"_?Py|_ZN(2at|3c10|5torch)", name)]


def test_library_of_this_environment_needs_neither_python_nor_torch() -> None:
    from dist_lowbit.core.native import native, native_why_not

    library = native()
    if library is None:
        pytest.skip(f"no compiled kernels: {native_why_not()}")
    check_library(Path(library._name))


def check_installed(environment: Environment) -> None:
    *rooms, model = environment.run("python", "-I", "-c", PROBE).splitlines()
    assert all(Path(place).is_relative_to(environment.site) for place in rooms), rooms
    assert model.endswith(f" {SAMPLE_BYTES}")
    place = environment.run("python", "-I", "-c", "from dist_lowbit.kernels import open_library as o; print(o()._name)")
    library = Path(place.strip())
    assert library.is_relative_to(environment.site)
    check_library(library)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_installs_and_runs(wheel: Path, environment: Environment) -> None:
    """The whole job with nothing but the wheel: convert the sample model, generate on two ranks."""
    assert re.fullmatch(r"dist_lowbit-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    environment.install(wheel)
    check_installed(environment)
    sample = environment.run("python", "-I", "-c", "from dist_lowbit import sample; print(sample.path())").strip()
    environment.run("dist-lowbit", "convert", sample, "out", "--low-bit", "sym_int4", "--tp", "2")
    words = "generate out -n 2 --max-new-tokens 8 --greedy --json --prompt"
    answer = json.loads(environment.run("dist-lowbit", *words.split(), "Once upon a time").splitlines()[-1])
    assert len(answer["tokens"]) == 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sdist_installs(sdist: Path, environment: Environment) -> None:
    environment.install(sdist, "-C", "cmake.build-type=Debug")  # the whole build, without the time that -O3 takes
    check_installed(environment)


def test_checkout_and_sdist_make_the_same_wheel(pure_wheel: Path, tmp_path: Path) -> None:
    other = build("wheel", ROOT, tmp_path / "out", {"wheel.cmake": "false"})
    assert names_of(other) == names_of(pure_wheel)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_editable_install_resolves_every_room(unpacked: Path, environment: Environment) -> None:
    environment.install(unpacked, "-C", "cmake.build-type=Debug", "--editable")
    *rooms, model = environment.run("python", "-c", PROBE).splitlines()
    assert all(Path(place).is_relative_to(unpacked) for place in rooms), rooms
    assert model.endswith(f" {SAMPLE_BYTES}")
    environment.run("python", "-c", "from dist_lowbit.kernels import open_library; open_library()")
    # A module that is written after the install is found too.
    late = unpacked / "launcher" / "written_later.py"
    late.write_text("", encoding="utf-8")
    try:
        environment.run("python", "-c", "import dist_lowbit.launcher.written_later")
    finally:
        late.unlink()


def test_types_are_seen_by_users(pure_wheel: Path, environment: Environment) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    environment.install(pure_wheel)
    code = "from dist_lowbit.kernels import open_library\nfrom dist_lowbit.launcher import job\nopen_library(1)\n"
    (environment.outside / "use.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--python-executable", str(environment.python)]
    done = subprocess.run([*command, "use.py"], cwd=environment.outside, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if "error" in line and line.startswith("use.py")]
    assert len(lines) == 1, done.stdout + done.stderr
    assert "arg-type" in lines[0]
