"""The operator: `python -m tuneserve --config /etc/tuneserve/operator.yaml`.

It finds the API server by `KUBECONFIG` if that is set, else by the service account of its pod.
"""

import argparse
import asyncio
import logging
import sys
from pathlib import Path

import kopf

from tuneserve.config import ConfigError, parse_config
from tuneserve.process import run

DEFAULT_PORT = 8080

logger = logging.getLogger("tuneserve")


def main() -> int:
    """The exit code."""
    arguments = _arguments()
    kopf.configure(log_format=kopf.LogFormat.JSON if arguments.log_format == "json" else kopf.LogFormat.FULL)
    # Of the watch layer only trouble is news; that it leaves the signals to us is intended.
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
    try:
        config = parse_config(arguments.config.read_text())
    except (OSError, ConfigError) as error:
        logger.error("%s: %s", arguments.config, error)
        return 1
    return asyncio.run(run(config, host=arguments.host, port=arguments.port))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tuneserve", description="The operator of TuneServe.")
    parser.add_argument("--config", type=Path, required=True, help="configuration, YAML")
    parser.add_argument("--host", default=None, help="address of /healthz, /readyz and /metrics (default: all)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"their port (default: {DEFAULT_PORT}; 0: a free one)"
    )
    parser.add_argument("--log-format", choices=("json", "text"), default="json", help="default: json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
