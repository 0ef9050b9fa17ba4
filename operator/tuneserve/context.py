"""What a reconcile may use of the outside world, handed in, so that a test can hand in something else."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import aiohttp

from tuneserve.config import OperatorConfig
from tuneserve.events import Events
from tuneserve.kube import Kube


@dataclass(frozen=True, kw_only=True)
class Context:
    kube: Kube
    config: OperatorConfig
    events: Events
    now: Callable[[], datetime]
    """The time in UTC, for conditions and the status."""
    http: aiohttp.ClientSession
    """For the metrics endpoints of stage pods."""
