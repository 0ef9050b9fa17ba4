"""`python -m tuneserve_pipeline <stage kind> --config FILE`: all that a Job runs, and the same on a laptop.

On a laptop `artifacts` in the config is any directory, and the options say where the model and the data lie.
"""

import argparse
import sys
from pathlib import Path

from tuneserve_pipeline import contract, stage


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tuneserve_pipeline", description=__doc__)
    parser.add_argument("kind", choices=stage.KINDS, help="kind of the stage")
    parser.add_argument("--config", type=Path, default=Path(contract.CONFIG_PATH), help="JSON file (StageConfig)")
    parser.add_argument(
        "--base-model-root",
        type=Path,
        default=Path(contract.BASE_MODEL_PATH),
        help="directory of the base model's claim (default: %(default)s)",
    )
    parser.add_argument(
        "--datasets-root",
        type=Path,
        default=Path(contract.DATASETS_PATH),
        help="directory with <claim>/<path> and <split>-<index>/<key> (default: %(default)s)",
    )
    parser.add_argument(
        "--hub-token",
        type=Path,
        default=Path(contract.HUB_TOKEN_PATH),
        help="file with the token of the hub, if it asks for one (default: %(default)s)",
    )
    parser.add_argument(
        "--termination-log",
        type=Path,
        default=Path(contract.TERMINATION_PATH),
        help="file for the outcome; standard output where it is absent (default: %(default)s)",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        default=contract.METRICS_PORT,
        help="port of /metrics, 0 for a free one (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    stage.configure_logging()
    return stage.execute(
        kind=given.kind,
        config_path=given.config,
        mounts=stage.Mounts(base_model=given.base_model_root, datasets=given.datasets_root, hub_token=given.hub_token),
        termination_path=given.termination_log,
        metrics_port=given.metrics_port,
    )


if __name__ == "__main__":
    sys.exit(main())
