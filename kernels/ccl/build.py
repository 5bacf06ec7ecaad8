"""Build the oneCCL shim on this machine and keep it in the user's cache.

oneCCL's shared libraries need a SYCL device, so the shim links the static CPU library of the package oneccl-devel, with
hwloc from tcmlib and irc from intel-cmplr-lib-rt. Intel's libraries are linked where they are, never copied: the shim
finds them again through an rpath. Its name holds the version of oneCCL and a digest of all that went into it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")
INSTALL = "pip install --no-deps oneccl-devel tcmlib intel-cmplr-lib-rt impi-rt"
# The file that each package brings.
PARTS = {
    "oneccl-devel": "cpu/lib/libccl.a",
    "tcmlib": "libhwloc.so.15",
    "intel-cmplr-lib-rt": "libirc.so",
    "impi-rt": "libfabric.so.1",
}
HEADER = "oneapi/ccl.hpp"
BUILD_SECONDS = 300


class ShimMissing(Exception):
    """The shim cannot be had; the message says why."""


@dataclass(frozen=True)
class Parts:
    """Where the installed packages keep what the shim links."""

    version: str  # of oneccl-devel
    include: Path
    archive: Path
    folders: tuple[Path, ...]  # of shared libraries
    libraries: tuple[str, ...]


def _file(package: str, ending: str) -> Path:
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise ShimMissing(f"the package {package} is not installed ({INSTALL})") from None
    for file in files:
        if str(file).endswith("/" + ending):
            path = Path(str(file.locate())).resolve()
            if path.is_file():
                return path
    raise ShimMissing(f"the package {package} has no {ending}; install it again ({INSTALL})")


def parts() -> Parts:
    """Find the packages that the shim needs; raise ShimMissing naming the first that is not there."""
    found = {package: _file(package, ending) for package, ending in PARTS.items()}
    header = _file("oneccl-devel", HEADER)
    shared = [path for package, path in found.items() if package != "oneccl-devel"]
    return Parts(
        version=metadata.version("oneccl-devel"),
        include=header.parents[1],
        archive=found["oneccl-devel"],
        folders=tuple(dict.fromkeys(path.parent for path in shared)),
        libraries=(found["tcmlib"].name, found["intel-cmplr-lib-rt"].name),
    )


def compiler() -> str | None:
    """Return the C++ compiler: $CXX, else the first of g++, c++, clang++ on PATH."""
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def cache_folder() -> Path:
    """Return where this user's built files are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dist_lowbit"


def _command(found: Parts, out: Path) -> list[str]:
    folders = [option for folder in found.folders for option in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    return [
        *("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"),
        *(f"-I{found.include}", str(SOURCE), "-o", str(out), str(found.archive)),
        *folders,
        *(f"-l:{library}" for library in found.libraries),
        *("-lpthread", "-ldl", "-lrt", "-Wl,--no-undefined", "-Wl,--exclude-libs,ALL"),
    ]


def place() -> Path:
    """Return where the shim for the installed packages lies or will lie; raise ShimMissing where they are absent."""
    found = parts()
    recipe = "\0".join(_command(found, Path("shim.so"))).encode() + SOURCE.read_bytes()
    return cache_folder() / f"ccl-{found.version}-{hashlib.sha256(recipe).hexdigest()[:12]}.so"


def built() -> Path | None:
    """Return the shim if it is built already."""
    try:
        path = place()
    except ShimMissing:
        return None
    return path if path.is_file() else None


def why_not() -> str | None:
    """Return why there is no shim and none can be built, or None; builds nothing."""
    try:
        path = place()
    except ShimMissing as error:
        return str(error)
    if not path.is_file() and compiler() is None:
        return "the oneCCL shim is not built and there is no C++ compiler (set CXX or install g++)"
    return None


def ensure() -> Path:
    """Return the shim, built first if need be (two seconds); raise ShimMissing.

    Any number of processes may call it at once: one builds under a lock, the others wait for it.
    """
    path = place()
    if path.is_file():
        return path
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path.parent / "ccl.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                _build(path)
    except OSError as error:
        raise ShimMissing(
            f"the oneCCL shim cannot be kept in {path.parent} ({error.strerror}); set XDG_CACHE_HOME to one of yours"
        ) from error
    return path


def _build(path: Path) -> None:
    program = compiler()
    if program is None:
        raise ShimMissing("no C++ compiler to build the oneCCL shim with; set CXX or install g++")
    descriptor, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(descriptor)
    try:
        command = [program, *_command(parts(), Path(name))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        if done.returncode:
            cause = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
            raise ShimMissing(f"{program} cannot build the oneCCL shim: {cause.strip()}")
        os.rename(name, path)  # whole or not at all
    except subprocess.TimeoutExpired:
        raise ShimMissing(f"{program} has not built the oneCCL shim within {BUILD_SECONDS} s") from None
    finally:
        if os.path.exists(name):
            os.unlink(name)
