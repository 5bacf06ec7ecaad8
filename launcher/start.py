"""Start the launcher whose folder this file is in, by path: python -P start.py OPTIONS.

sys.path is left as it is. The folder above may hold anything in an editable install, also files with the names of
standard modules, and nothing is gained from it: the launcher imports the standard library and itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

PACKAGE = "launcher"


def main() -> int:
    """Make the folder a package, whatever it is called elsewhere, and run its command line."""
    folder = Path(__file__).absolute().parent
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return int(importlib.import_module(f"{PACKAGE}.__main__").main())


if __name__ == "__main__":
    sys.exit(main())
