"""Plays the containers of stages on fake nodes: every pod of a stage ends with the outcome that a test wants.

KWOK lets such a pod run until its annotations give it an exit code and a termination message, as a kubelet would
report them.
"""

import hashlib
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from support.kubectl import Kubectl, KubectlError, Object
from tuneserve_pipeline.contract import ExitCode, Outcome

EXIT_CODE = "fake.tuneserve.dev/exit-code"
MESSAGE = "fake.tuneserve.dev/message"

Ending = tuple[int, Outcome | None]
#: What a stage says at its end: by stage name and hash; none: it goes on running.
Play = Callable[[str, str], Ending | None]

_FACTS: Mapping[str, Mapping[str, str]] = {
    "prepare": {
        "baseDigest": "sha256:base",
        "datasetDigest": "sha256:data",
        "templateHash": "sha256:template",
        "trainRows": "80",
        "validationRows": "10",
        "testRows": "10",
    },
    "train": {"steps": "40"},
}


def succeed(stage: str, hash: str, *, accuracy: float = 0.9) -> Ending:
    """The stage did its work; its output has a digest of its own."""
    metrics: dict[str, float] = {}
    if stage.startswith("evaluate"):
        metrics = {"accuracy": accuracy, "macroF1": accuracy, "invalidRatio": 0.0, "samples": 10.0}
    elif stage == "train":
        metrics = {"loss": 0.4, "evalLoss": 0.5, "tokensPerSecond": 100.0}
    digest = "sha256:" + hashlib.sha256(f"{stage}/{hash}".encode()).hexdigest()
    outcome = Outcome(
        stage=stage, hash=hash, digest=digest, size_bytes=1000, metrics=metrics, facts=_FACTS.get(stage, {})
    )
    return ExitCode.DONE, outcome


class StagePlayer:
    """Ends the pods of stages in one namespace, for as long as it is entered."""

    def __init__(self, kubectl: Kubectl, play: Play = succeed) -> None:
        self._kubectl = kubectl
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stage player", daemon=True)
        self._done: set[str] = set()
        self.play = play
        """May be exchanged while it runs."""
        self.ended: list[tuple[str, str]] = []
        """Stage and hash of every pod that was ended, in order."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            try:
                for pod in self._kubectl.list("pods", selector="tuneserve.dev/stage"):
                    self._end(pod)
            except KubectlError:
                continue  # deleted meanwhile, or the API server is away: the next look tells

    def _end(self, pod: Object) -> None:
        metadata = pod["metadata"]
        if metadata["uid"] in self._done or metadata.get("deletionTimestamp") or pod["status"]["phase"] != "Running":
            return
        stage, hash = metadata["labels"]["tuneserve.dev/stage"], metadata["labels"]["tuneserve.dev/hash"]
        ending = self.play(stage, hash)
        if ending is None:
            return
        code, outcome = ending
        annotations = {EXIT_CODE: str(int(code)), MESSAGE: outcome.to_message() if outcome else ""}
        self._kubectl.patch("pod", metadata["name"], {"metadata": {"annotations": annotations}})
        self._done.add(metadata["uid"])
        self.ended.append((stage, hash))
