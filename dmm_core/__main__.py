"""``python -m dmm_core`` is ``dmm``."""

import sys

from dmm_core.cli import main

sys.exit(main())
