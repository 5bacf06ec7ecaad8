"""The compiled kernels: C++ sources, and the loader of the shared object built from them.

Knows pointers and shapes; nothing of models, ranks or files.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

ABI_VERSION = 6  # raised with every incompatible change of the dlb_* functions
LIBRARY_NAME = "libdist_lowbit.so"


class LibraryMissing(Exception):
    """The shared object cannot be found or does not fit; the message says why."""


def _candidates() -> list[Path]:
    # An editable install keeps the library in site-packages and the sources elsewhere, so every search
    # location of the package counts, not only the folder of this file.
    folders = [Path(__file__).parent]
    spec = importlib.util.find_spec("dist_lowbit.kernels")
    if spec is not None and spec.submodule_search_locations:
        folders += [Path(place) for place in spec.submodule_search_locations]
    unique = list(dict.fromkeys(folders))
    return [folder / LIBRARY_NAME for folder in unique]


def open_library(path: str = "") -> ctypes.CDLL:
    """Open the compiled library at `path`, or the installed one, and check its ABI version.

    Raises LibraryMissing with the places looked at, or with the two versions that do not fit.
    """
    places = [Path(path)] if path else _candidates()
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        looked = ", ".join(map(str, places))
        raise LibraryMissing(f"no compiled library at {looked}; install the package with a C++ compiler present")
    try:
        library = ctypes.CDLL(str(found))
        library.dlb_abi_version.restype = ctypes.c_int
        version = library.dlb_abi_version()
    except (OSError, AttributeError) as error:
        raise LibraryMissing(f"{found} is no library of dist_lowbit: {error}") from error
    if version != ABI_VERSION:
        raise LibraryMissing(f"{found} has ABI version {version}, expected {ABI_VERSION}; reinstall the package")
    return library
