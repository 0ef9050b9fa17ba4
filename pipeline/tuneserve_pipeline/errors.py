"""How a stage says that it cannot finish: an exit code of the contract, a reason, and what the user should do.

A message names the place (file, line, field) as the user knows it, and never points at the logs.
Anything else that is raised counts as a defect of the stage itself (`InternalError`, exit code 1).
"""

from tuneserve_pipeline.contract import ExitCode, StageError

#: Exit code of a failure that is neither the user's nor a known condition: retried, and counted.
FAILED = 1


class StageFailure(Exception):  # noqa: N818 - how a stage ends, not a defect
    """The stage cannot finish. `reason` is CamelCase and becomes the reason of a condition."""

    code: int = FAILED

    def __init__(self, *, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    @property
    def error(self) -> StageError:
        return StageError(reason=self.reason, message=self.message)


class InvalidConfig(StageFailure):
    """The spec, or the base model that it names, cannot work: never retried."""

    code = ExitCode.INVALID_CONFIG


class InvalidData(StageFailure):
    """The data set cannot be learned from: never retried."""

    code = ExitCode.INVALID_DATA


class Unavailable(StageFailure):
    """A source did not answer: retried with backoff."""

    code = ExitCode.UNAVAILABLE


class OutOfMemory(StageFailure):
    """The GPU memory did not suffice: retried with a smaller plan."""

    code = ExitCode.OUT_OF_MEMORY


class Interrupted(BaseException):
    """A signal asked the stage to stop, and what it will resume from is saved.

    Not an `Exception`: library code that swallows those must not swallow the wish to stop.
    """

    code = ExitCode.INTERRUPTED

    def __init__(self, message: str = "stopped by a signal; the next run goes on from here") -> None:
        super().__init__(message)

    @property
    def error(self) -> StageError:
        return StageError(reason="Interrupted", message=str(self))
