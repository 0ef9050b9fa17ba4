"""`python -m tuneserve_cluster`."""

import sys

from tuneserve_cluster.cli import main

sys.exit(main(sys.argv[1:]))
