"""What the decisions of the FineTune controller are made of: what there is, and what is to be done. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from tuneserve.api import StageState, StageStatus
from tuneserve.finetune.children import JobView, PodView
from tuneserve.finetune.failures import Finding
from tuneserve.finetune.graph import EVALUATE_BASE, Stage
from tuneserve.finetune.jobs import Launch
from tuneserve.finetune.ledger import Ledger, StageRun
from tuneserve.finetune.references import References
from tuneserve_pipeline.contract import Outcome, StageSpec

Body = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What there is in the cluster."""

    claim: Body | None
    claim_is_ours: bool = True
    ledger: Ledger
    jobs: tuple[JobView, ...] = ()
    pods: tuple[PodView, ...] = ()
    config_maps: Mapping[str, StageRun] = field(default_factory=dict)
    """ConfigMaps of stages, by name."""
    references: References = field(default_factory=References)
    warnings: Mapping[str, str] = field(default_factory=dict)
    """What the cluster says of Jobs and pods that do not get on, by UID."""

    def has_output(self, job: JobView) -> bool:
        """Whether what the Job put out can be on the claim: not if the claim was made after the Job."""
        if self.claim is None:
            return False
        made = self.claim["metadata"].get("creationTimestamp")
        return made is None or job.created is None or datetime.fromisoformat(made) <= job.created


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage: how it stands, and why."""

    stage: Stage
    state: StageState
    run: StageRun | None = None
    """None as long as its inputs are not known."""
    spec: StageSpec | None = None
    finding: Finding | None = None
    """What holds it up, or why it failed."""
    outcome: Outcome | None = None
    finished: datetime | None = None
    job: JobView | None = None
    launch: Launch | None = None
    """To be made now."""
    remembered: StageStatus | None = None
    """The failure as the status has it; the Job may be gone."""
    terms: str | None = None
    """Under which it failed; None when other terms would not help."""
    undecided: bool = False
    """Whether its inputs may yet turn out to be what they were, so that an old Job may be the right one."""

    @property
    def passing(self) -> bool:
        """Whether it is on its way without anybody's help."""
        if self.launch is not None or self.state is StageState.RUNNING:
            return True
        waits = self.state is StageState.PENDING and self.run is not None
        return waits and (self.finding is None or not self.finding.stalled)

    @property
    def held(self) -> bool:
        """Whether somebody must act for this very stage, and not for one before it."""
        return self.finding is not None and self.finding.stalled and not self.finding.inherited


def foremost(stages: Iterable[StagePlan]) -> StagePlan | None:
    """Of stages at work at the same time the one that a user waits for: the last one, but not the base's evaluation."""
    return max(enumerate(stages), key=lambda item: (item[1].stage.name != EVALUATE_BASE, item[0]), default=(0, None))[1]


@dataclass(frozen=True, kw_only=True)
class Plan:
    stages: tuple[StagePlan, ...]
    claim: Body | None
    """The artifacts claim as it shall be; None if it is, or while the one that is there must not be touched."""
    claim_fault: Finding | None
    remove_jobs: tuple[JobView, ...]
    remove_config_maps: tuple[str, ...]
    adjust: tuple[tuple[JobView, Mapping[str, Any]], ...]
    """Merge patches of Jobs that run."""

    @property
    def awaits_removal(self) -> bool:
        """Whether something must go before something else can be made."""
        findings = [self.claim_fault, *(stage.finding for stage in self.stages)]
        return any(finding is not None and finding.awaits_removal for finding in findings)

    def refused(self, refusals: Mapping[str, Finding]) -> "Plan":
        """The plan after the API server refused some of it; by stage, "" stands for the claim."""
        claim = refusals.get("")
        stages = tuple(
            replace(stage, launch=None, finding=refusals.get(stage.stage.name, claim))
            if stage.launch is not None and (claim is not None or stage.stage.name in refusals)
            else stage
            for stage in self.stages
        )
        return replace(self, stages=stages, claim_fault=claim or self.claim_fault)

    def stage(self, name: str) -> StagePlan | None:
        return next((plan for plan in self.stages if plan.stage.name == name), None)
