"""Names and patience of the tests on the real cluster."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "e2e"
SYSTEM = "tuneserve-system"
#: Label of everything that the operator makes.
OURS = "app.kubernetes.io/managed-by=tuneserve"
#: Seconds a tiny FineTune may take on two busy cores before a test gives up.
TRAINED = 600.0
#: Seconds a server may take to load on two busy cores before a test gives up.
STARTED = 600.0
