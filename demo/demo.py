#!/usr/bin/env python3
"""Entry point of the demo: `make demo`, or `python demo/demo.py --help`. Needs the Python environment of `make env`."""

import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tuneserve_demo.story import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
