"""Jobs and pods of a FineTune as the plan sees them: typed views of what the API server returned. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import ValidationError

from tuneserve import names
from tuneserve.finetune.ledger import StageRun, is_finished
from tuneserve_pipeline.contract import ExitCode, Outcome

#: Name of the one container of a stage pod.
CONTAINER = "stage"
_EPOCH = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, kw_only=True)
class PodView:
    """A pod of a stage."""

    name: str
    uid: str
    run: StageRun
    job_uid: str
    phase: str
    deleting: bool
    created: datetime
    node: str | None
    ip: str | None
    started: datetime | None
    """When the container started; None before that."""
    unschedulable: str | None
    """The scheduler's sentence, while it finds no node."""
    waiting: tuple[str, str] | None
    """Reason and message of a container that does not start."""
    exit_code: int | None
    exit_reason: str
    finished: datetime | None
    termination_message: str
    disruption: str | None
    """Why the cluster, not the stage, ended it: an eviction, a preemption, a lost node."""

    @property
    def live(self) -> bool:
        """Whether its processes may still write to the volume."""
        return self.phase not in ("Succeeded", "Failed")

    @property
    def running(self) -> bool:
        return self.phase == "Running" and not self.deleting

    @property
    def counts_as_failure(self) -> bool:
        """Whether it used up a try: neither stopped with a checkpoint nor ended by the cluster."""
        return self.phase == "Failed" and self.exit_code != ExitCode.INTERRUPTED and self.disruption is None

    @property
    def is_starting(self) -> bool:
        """Whether it has a node, and neither runs nor says why not: it waits for its volumes or its image."""
        silent = self.waiting is None or self.waiting[0] in ("ContainerCreating", "PodInitializing")
        return self.phase == "Pending" and self.node is not None and silent and not self.deleting

    @property
    def outcome(self) -> Outcome | None:
        """What the stage told at its end; None when it told nothing that can be read."""
        try:
            return Outcome.model_validate_json(self.termination_message)
        except ValidationError:
            return None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        metadata, status = body["metadata"], body.get("status") or {}
        container = _named(status.get("containerStatuses"), CONTAINER)
        state = container.get("state") or {}
        ended = state.get("terminated") or {}
        running = state.get("running") or {}
        waiting = state.get("waiting") or {}
        scheduled = _condition(status, "PodScheduled")
        disrupted = _condition(status, "DisruptionTarget")
        disruption = None
        if disrupted.get("status") == "True":
            disruption = disrupted.get("message") or disrupted.get("reason") or "the cluster ended the pod"
        elif status.get("phase") == "Failed" and status.get("reason"):
            disruption = status.get("message") or status["reason"]
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            run=_run(metadata),
            job_uid=(names.controller_of(body) or {}).get("uid", ""),
            phase=status.get("phase") or "Pending",
            deleting=bool(metadata.get("deletionTimestamp")),
            created=_time(metadata.get("creationTimestamp")) or _EPOCH,
            node=(body.get("spec") or {}).get("nodeName"),
            ip=status.get("podIP"),
            started=_time(running.get("startedAt") or ended.get("startedAt")),
            unschedulable=scheduled.get("message", "")
            if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
            else None,
            waiting=(waiting["reason"], waiting.get("message", "")) if waiting.get("reason") else None,
            exit_code=ended.get("exitCode"),
            exit_reason=ended.get("reason", ""),
            finished=_time(ended.get("finishedAt")),
            termination_message=ended.get("message", ""),
            disruption=disruption,
        )


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A Job of a stage with its pods, the oldest first."""

    name: str
    uid: str
    run: StageRun
    owner_uid: str
    deleting: bool
    suspended: bool
    ended: Literal["Complete", "Failed"] | None
    end_reason: str
    end_message: str
    created: datetime | None
    started: datetime | None
    finished: datetime | None
    failed_pods: int
    annotations: Mapping[str, str]
    spec: Mapping[str, Any]
    pods: tuple[PodView, ...]

    @property
    def active(self) -> bool:
        """Neither finished nor on its way out."""
        return self.ended is None and not self.deleting

    @property
    def attempt(self) -> int:
        """Which try runs, or ran last: 1 for the first. Interrupted and evicted pods count as tries too."""
        return max(1, len(self.pods), self.failed_pods)

    @property
    def failures(self) -> int:
        """Tries that count against the retries; a pod's end is seen before the Job controller has counted it."""
        return max(self.failed_pods, sum(pod.counts_as_failure for pod in self.pods))

    @property
    def pod(self) -> PodView | None:
        """The pod that runs or waits, else the last one."""
        alive = tuple(pod for pod in self.pods if pod.live and not pod.deleting)
        return (alive or self.pods)[-1] if self.pods else None

    @property
    def told(self) -> Outcome | None:
        """What the finished stage told of its output; None when it is not finished, or that is lost or unreadable."""
        if self.ended != "Complete":
            return None
        outcomes = (pod.outcome for pod in self.pods if pod.exit_code == 0)
        return next(
            (
                outcome
                for outcome in outcomes
                if outcome is not None and (outcome.stage, outcome.hash) == self.run and is_finished(outcome)
            ),
            None,
        )

    def stuck_since(self, moment: datetime) -> str | None:
        """UID of what should have gone on by then: the Job without a pod, or its pod that does not start."""
        if not self.active or self.suspended:
            return None
        pod = self.pod
        if pod is None:
            return self.uid if self.created is not None and self.created < moment else None
        return pod.uid if pod.is_starting and pod.created < moment else None

    @property
    def has_started(self) -> bool:
        """Whether any of its pods has got as far as running the stage."""
        return self.ended is not None or any(pod.started is not None for pod in self.pods)

    @classmethod
    def of(cls, body: Mapping[str, Any], *, pods: Iterable[PodView]) -> Self:
        metadata, status = body["metadata"], body.get("status") or {}
        complete, failed = _condition(status, "Complete"), _condition(status, "Failed")
        end = next((found for found in (failed, complete) if found.get("status") == "True"), {})
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            run=_run(metadata),
            owner_uid=(names.controller_of(body) or {}).get("uid", ""),
            deleting=bool(metadata.get("deletionTimestamp")),
            suspended=bool(body["spec"].get("suspend")),
            ended=end.get("type"),
            end_reason=end.get("reason", ""),
            end_message=end.get("message", ""),
            created=_time(metadata.get("creationTimestamp")),
            started=_time(status.get("startTime")),
            finished=_time(status.get("completionTime") or end.get("lastTransitionTime")),
            failed_pods=status.get("failed") or 0,
            annotations=metadata.get("annotations") or {},
            spec=body["spec"],
            pods=tuple(
                sorted((pod for pod in pods if pod.job_uid == metadata["uid"]), key=lambda pod: (pod.created, pod.name))
            ),
        )


def views(
    jobs: Iterable[Mapping[str, Any]], pods: Iterable[Mapping[str, Any]]
) -> tuple[tuple[JobView, ...], tuple[PodView, ...]]:
    """Jobs with their pods, and all pods: also those whose Job is gone but that still run."""
    seen = tuple(PodView.of(pod) for pod in pods if _is_stage(pod))
    return tuple(JobView.of(job, pods=seen) for job in jobs if _is_stage(job)), seen


def _is_stage(body: Mapping[str, Any]) -> bool:
    labels = body["metadata"].get("labels") or {}
    return names.STAGE in labels and names.HASH in labels


def _run(metadata: Mapping[str, Any]) -> StageRun:
    return StageRun(metadata["labels"][names.STAGE], metadata["labels"][names.HASH])


def _named(items: Iterable[Mapping[str, Any]] | None, name: str) -> Mapping[str, Any]:
    return next((item for item in items or () if item.get("name") == name), {})


def _condition(status: Mapping[str, Any], type: str) -> Mapping[str, Any]:
    return next((item for item in status.get("conditions") or () if item.get("type") == type), {})


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
