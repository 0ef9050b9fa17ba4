"""Why a stage failed or does not get on, as a sentence that names the true cause and what to do. Pure.

Never "see the logs": whoever reads the sentence may have no right to read them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tuneserve import names
from tuneserve.finetune.children import JobView, PodView
from tuneserve_pipeline.contract import ExitCode

#: The kubelet's reasons for an image that it cannot get; it goes on trying, but somebody must act.
_IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
_CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_KILLED = 137
_FINAL_CODES = (ExitCode.INVALID_CONFIG, ExitCode.INVALID_DATA, ExitCode.OUT_OF_MEMORY)
_REASON = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]{0,126}[A-Za-z0-9_])?")
_POLICY_EXIT_CODE = re.compile(r"failed with exit code (\d+)")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What holds a stage up."""

    reason: str
    """CamelCase, becomes the reason of a condition."""
    message: str
    stalled: bool = True
    """Whether it lasts until somebody changes something; else it may pass by itself."""
    final: bool = False
    """Whether the inputs themselves are wrong, so that the same stage would fail again anywhere."""
    blames_data: bool = False
    """Whether the inputs that are wrong are the user's data."""
    inherited: bool = False
    """Whether it only follows from what holds up another stage."""
    awaits_removal: bool = False
    """Whether it passes as soon as something that is on its way out is gone."""

    def __post_init__(self) -> None:
        # Stages and kubelets name reasons too; one that is no word would make the status unacceptable.
        if not _REASON.fullmatch(self.reason):
            object.__setattr__(self, "reason", "StageFailed")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the sentences need to know beyond the Job and its pods."""

    finetune: str
    namespace: str
    stage: str
    profile: str
    retries: int
    deadline_seconds: int | None = None
    rebuild: str = ""
    """Present value of the rebuild annotation."""

    @property
    def tries(self) -> int:
        return self.retries + 1

    @property
    def again(self) -> str:
        """How to ask for another try."""
        used = re.search(rf"(?:^|,)\s*{re.escape(self.stage)}\.(\d+)\s*(?:,|$)", self.rebuild)
        number = int(used.group(1)) + 1 if used else 1
        return (
            f"for another try: kubectl annotate finetune {self.finetune} --namespace {self.namespace} --overwrite "
            f"{names.REBUILD}={self.stage}.{number}"
        )


def failed(job: JobView, *, at: Surroundings) -> Finding:
    """Why the Job failed for good."""
    if job.end_reason == "DeadlineExceeded":
        limit = job.spec.get("activeDeadlineSeconds") or at.deadline_seconds
        return Finding(
            reason="DeadlineExceeded",
            message=f"{at.stage} took longer than spec.deadlineSeconds ({limit} s): raise it, and {at.stage} goes on "
            "from its last checkpoint if it has one",
        )
    pod = _told(job)
    code = pod.exit_code if pod else _policy_exit_code(job)
    if code is None and pod is None:
        return Finding(
            reason="PodsLost",
            message=f"{at.stage} failed ({job.end_message or job.end_reason}), and its pods are gone with the cause; "
            f"{at.again}",
        )
    return _ended(pod, code=code, tries=job.attempt, at=at)


def hindrance(job: JobView, *, at: Surroundings, warnings: Mapping[str, str]) -> Finding | None:
    """What keeps an unfinished Job from running, or what went wrong on the way; None when all is well.

    `warnings` is what the cluster says of Jobs and pods, by UID.
    """
    pod = job.pod
    if pod is None and job.uid in warnings:
        return Finding(reason="PodRefused", message=f"{at.stage} gets no pod: {warnings[job.uid]}")
    if pod is not None and pod.live and not pod.running:
        waiting = _waiting(pod, at=at) or _starting(pod, at=at, warning=warnings.get(pod.uid))
        if waiting is not None:
            return waiting
    last = next((pod for pod in reversed(job.pods) if not pod.live), None)
    if last is None or (pod is not None and pod.running and last.outcome is None and last.disruption is None):
        return None
    again = f"try {job.attempt if pod is not last else job.attempt + 1} of {at.stage}"
    verb = "runs" if pod is not None and pod.running else "starts soon"
    if last.disruption is not None:
        return Finding(
            reason="Disrupted",
            message=f"{again} {verb}; the one before was ended by the cluster, which does not count as a failure: "
            f"{last.disruption}",
            stalled=False,
        )
    if last.exit_code == ExitCode.INTERRUPTED:
        return Finding(
            reason="Interrupted",
            message=f"{again} {verb} and goes on from the last checkpoint; the one before was stopped by a signal",
            stalled=False,
        )
    cause = _ended(last, code=last.exit_code, tries=None, at=at)
    left = at.tries - job.failures
    if left <= 0 or last.exit_code in _FINAL_CODES:
        return replace(cause, stalled=False)  # the Job controller has not said so yet
    return Finding(
        reason=cause.reason,
        message=f"{again} {verb} ({left} of {at.tries} left); the one before failed: {cause.message}",
        stalled=False,
    )


def lost_outcome(job: JobView, *, at: Surroundings) -> Finding:
    """A pod that ended well without telling a readable outcome: other versions of operator and trainer."""
    told = job.pods[-1].termination_message if job.pods else ""
    return Finding(
        reason="OutcomeUnreadable",
        message=f"{at.stage} ended without an outcome that this operator can read ({told[:200]!r}): the trainer image "
        f'of profile "{at.profile}" must be of the operator\'s version; {at.again}',
    )


def _ended(pod: PodView | None, *, code: int | None, tries: int | None, at: Surroundings) -> Finding:
    outcome = pod.outcome if pod else None
    error = outcome.error if outcome else None
    blames_data = code == ExitCode.INVALID_DATA
    if error is not None and code in (ExitCode.INVALID_CONFIG, ExitCode.INVALID_DATA):
        return Finding(reason=error.reason, message=error.message, final=True, blames_data=blames_data)
    end = "" if tries is None else f" (given up after {tries} {'try' if tries == 1 else 'tries'}; {at.again})"
    if code == ExitCode.OUT_OF_MEMORY:
        told = error.message if error else f"{at.stage} ran out of GPU memory"
        return Finding(
            reason="OutOfMemory",
            message=f"{told}: lower spec.training.maxSequenceLength or spec.lora.rank, take a smaller base model, or "
            f'choose a profile with more memory than "{at.profile}" in spec.accelerator.profile',
        )
    if error is not None:
        return Finding(reason=error.reason, message=f"{error.message}{end}")
    if pod is not None and pod.exit_reason == "OOMKilled":
        return Finding(
            reason="MemoryLimitExceeded",
            message=f"{at.stage} needed more memory than its limit and was killed: raise the memory limit of its "
            f'stages in profile "{at.profile}", or lower spec.training.maxSequenceLength{end}',
        )
    if code == ExitCode.INVALID_CONFIG or code == ExitCode.INVALID_DATA:
        what = "its configuration" if code == ExitCode.INVALID_CONFIG else "the data"
        return Finding(
            reason="InvalidConfig" if code == ExitCode.INVALID_CONFIG else "InvalidData",
            message=f"{at.stage} found {what} invalid, but its pod is gone with the explanation; {at.again}",
            final=True,
            blames_data=blames_data,
        )
    if code == _KILLED:
        return Finding(reason="Killed", message=f"{at.stage} was killed by a signal before it could tell why{end}")
    if pod is not None and pod.disruption is not None:
        return Finding(reason="Disrupted", message=f"the pod of {at.stage} was ended: {pod.disruption}{end}")
    if code is None:
        return Finding(reason="PodFailed", message=f"the pod of {at.stage} failed before the stage ran{end}")
    return Finding(reason="StageCrashed", message=f"{at.stage} ended with exit code {code} and told no cause{end}")


def _told(job: JobView) -> PodView | None:
    """The failed pod that explains the most: the one that ended the Job, else the last one."""
    ended = [pod for pod in job.pods if pod.phase == "Failed" or pod.exit_code not in (None, 0)]
    code = _policy_exit_code(job)
    decisive = [pod for pod in ended if code is not None and pod.exit_code == code]
    return next(reversed(decisive or ended), None)


def _policy_exit_code(job: JobView) -> int | None:
    found = _POLICY_EXIT_CODE.search(job.end_message) if job.end_reason == "PodFailurePolicy" else None
    return int(found.group(1)) if found else None


def _waiting(pod: PodView, *, at: Surroundings) -> Finding | None:
    if pod.deleting:
        return Finding(
            reason="Stopping",
            message=f"{at.stage} waits until its pod {pod.name} has stopped",
            stalled=False,
            awaits_removal=True,
        )
    if pod.unschedulable is not None:
        return Finding(
            reason="Unschedulable",
            message=f"{at.stage} waits for a node: {pod.unschedulable.rstrip('. ')}. {_hint(pod.unschedulable, at=at)}",
            stalled=False,
        )
    if pod.waiting is None:
        return None
    reason, message = pod.waiting
    if reason in _IMAGE_REASONS:
        return Finding(
            reason="ImagePullFailed",
            message=f"the image of {at.stage} cannot be pulled: {message or reason}. Make it available to node "
            f'{pod.node}, or let the platform team name another one in profile "{at.profile}"',
        )
    if reason in _CONFIG_REASONS:
        return Finding(reason=reason, message=f"the container of {at.stage} cannot start: {message or reason}")
    return None


def _starting(pod: PodView, *, at: Surroundings, warning: str | None) -> Finding | None:
    if warning is None or not pod.is_starting:
        return None
    return Finding(
        reason="PodNotStarting",
        message=f"{at.stage} does not start on node {pod.node}: {warning.rstrip('. ')}. It starts by itself as soon as "
        "that is put right",
        stalled="not found" in warning,
    )


#: What a sentence of the scheduler means for the user; the first that matches.
_HINTS: Mapping[str, str] = {
    "persistentvolumeclaim": "Create the claim, or correct its name in the spec",
    "unbound immediate": "The claim needs a volume: look at its events, and at its storage class",
    "didn't find available persistent volumes": "The claim's storage class makes no volume on these nodes",
    "volume node affinity": "A claim lies on a node that cannot take the pod: free that node, or use storage that "
    "more nodes can mount",
    "Insufficient": 'It starts as soon as enough is free; profile "{profile}" says what a stage asks for',
    "untolerated taint": 'Nodes that would fit are tainted: add the toleration to profile "{profile}"',
    "node affinity": 'No node has the labels that profile "{profile}" selects: choose another profile in '
    "spec.accelerator.profile, or label the nodes",
}


def _hint(sentence: str, *, at: Surroundings) -> str:
    for words, hint in _HINTS.items():
        if words in sentence:
            return hint.format(profile=at.profile)
    return "It starts as soon as a node fits"
