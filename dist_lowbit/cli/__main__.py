"""`python -m dist_lowbit.cli`: the same as the dist-lowbit command."""

import sys

from .main import main

sys.exit(main())
