"""What is known about every stage, and what is to be done next: the decisions of the FineTune controller. Pure.

The graph is resolved as far as digests are known: a stage's inputs have an identity as soon as its parents have
put out something. Nothing is remembered but what the objects say: claim, Jobs, pods, and the failures in the status.
"""

from collections.abc import Iterator
from typing import Any

from tuneserve import names
from tuneserve.api import FineTune, StageState, StageStatus
from tuneserve.config import OperatorConfig, Profile, ProfileError
from tuneserve.finetune import claims, failures, jobs, references, servability
from tuneserve.finetune.children import JobView
from tuneserve.finetune.decisions import Observed, Plan, StagePlan
from tuneserve.finetune.failures import Finding, Surroundings
from tuneserve.finetune.graph import PREPARE, TRAIN, Stage, graph
from tuneserve.finetune.jobs import Launch
from tuneserve.finetune.ledger import StageRun
from tuneserve.finetune.specs import stage_spec
from tuneserve_pipeline.contract import StageSpec, input_hash


def resolve(fine_tune: FineTune, *, config: OperatorConfig, observed: Observed) -> Plan:
    """How every stage stands, and what is to be made, changed and removed."""
    return _Resolution(fine_tune=fine_tune, config=config, observed=observed).plan()


def rebuild_salt(annotation: str, *, stage: str) -> str:
    """The wish in the rebuild annotation that concerns the stage; empty when there is none."""
    entries = (entry.strip() for entry in annotation.split(","))
    return next((entry for entry in entries if entry.partition(".")[0] == stage), "")


class _Resolution:
    """One pass over the graph; keeps what has been found out about the stages before."""

    def __init__(self, *, fine_tune: FineTune, config: OperatorConfig, observed: Observed) -> None:
        self._fine_tune = fine_tune
        self._spec = fine_tune.spec
        self._config = config
        self._observed = observed
        self._rebuild = fine_tune.metadata.annotations.get(names.REBUILD, "")
        uid = fine_tune.metadata.uid
        self._mine = tuple(job for job in observed.jobs if job.owner_uid == uid)
        self._jobs = {job.run: job for job in self._mine}
        self._failed = {
            StageRun(stage.name, stage.hash): stage
            for stage in fine_tune.status.stages
            if stage.state is StageState.FAILED and stage.hash is not None
        }
        self._digests = references.digests(self._spec, found=observed.references)
        self._profile, self._profile_fault = self._choose_profile()
        self._terms = jobs.terms(fine_tune, profile=self._profile.name) if self._profile else None
        self._claim_fault = claims.fault(fine_tune, defaults=config.artifacts, live=observed.claim)
        self._plans: dict[str, StagePlan] = {}
        self._replaced: list[JobView] = []

    def plan(self) -> Plan:
        for stage in graph((export.format for export in self._spec.exports), method=self._spec.method):
            self._plans[stage.name] = self._resolve(stage)
        removed = (*self._replaced, *self._unwanted())
        gone = {job.uid for job in removed}
        changes = ((job, jobs.adjustment(job, self._fine_tune)) for job in self._mine if job.active)
        wanted_maps = {job.run for job in self._observed.jobs} | {
            plan.run for plan in self._plans.values() if plan.launch is not None
        }
        live = self._observed.claim
        claim = claims.desired(self._fine_tune, defaults=self._config.artifacts, live=live)
        return Plan(
            stages=tuple(self._plans.values()),
            claim=claim if self._claim_fault is None and claims.needs_change(claim, live=live) else None,
            claim_fault=self._claim_fault,
            remove_jobs=removed,
            remove_config_maps=tuple(
                name for name, run in self._observed.config_maps.items() if run not in wanted_maps
            ),
            adjust=tuple((job, patch) for job, patch in changes if patch is not None and job.uid not in gone),
        )

    def _choose_profile(self) -> tuple[Profile | None, Finding | None]:
        try:
            profile = self._config.profile(
                name=self._spec.accelerator.profile, namespace=self._fine_tune.metadata.namespace
            )
        except ProfileError as error:
            return None, Finding(reason="ProfileNotFound", message=str(error))
        return profile, None

    def _unwanted(self) -> Iterator[JobView]:
        """Jobs that still run for inputs that nobody asks for any more."""
        wanted = {plan.run for plan in self._plans.values()}
        for job in self._mine:
            plan = self._plans.get(job.run.stage)
            if job.active and job.run not in wanted and not (plan is not None and plan.undecided):
                yield job

    # --- one stage ---------------------------------------------------------------------------------------------------

    def _resolve(self, stage: Stage) -> StagePlan:
        parents = [self._plans[name] for name in stage.parents]
        waits_for = next((parent for parent in parents if parent.outcome is None), None)
        if waits_for is not None:
            return self._waiting(stage, parent=waits_for)
        if stage.name == PREPARE:
            namespace = self._fine_tune.metadata.namespace
            fault = references.missing_config_map(self._spec, found=self._observed.references, namespace=namespace)
            if fault is not None:
                return StagePlan(stage=stage, state=StageState.PENDING, finding=fault, undecided=True)
        spec = stage_spec(stage, self._spec, digests=self._digests)
        digests = {parent.stage.name: _digest(parent) for parent in parents}
        salt = rebuild_salt(self._rebuild, stage=stage.name)
        run = StageRun(stage.name, input_hash(spec=spec, parents=digests, rebuild=salt))
        job = self._jobs.get(run)
        outcome = self._observed.ledger.outcome(run)
        if outcome is not None:
            finished = self._observed.ledger.finished(run)
            return StagePlan(
                stage=stage, state=StageState.SUCCEEDED, run=run, spec=spec, outcome=outcome, finished=finished, job=job
            )
        if job is not None:
            return self._with_job(stage, run=run, spec=spec, job=job)
        return self._without_job(stage, run=run, spec=spec)

    def _waiting(self, stage: Stage, *, parent: StagePlan) -> StagePlan:
        """A stage whose inputs are not known, because a parent has put out nothing yet."""
        hopeless = parent.state is StageState.FAILED or (parent.run is None and not parent.undecided)
        if parent.state is StageState.SUSPENDED or self._spec.suspend:
            return StagePlan(stage=stage, state=StageState.SUSPENDED, undecided=not hopeless)
        verb = "failed" if parent.state is StageState.FAILED else "is not done"
        finding = Finding(
            reason="WaitsForStage",
            message=f"waits for {parent.stage.name}, which {verb}",
            stalled=hopeless,
            inherited=True,
        )
        return StagePlan(stage=stage, state=StageState.PENDING, finding=finding, undecided=not hopeless)

    def _with_job(self, stage: Stage, *, run: StageRun, spec: StageSpec, job: JobView) -> StagePlan:
        def plan(state: StageState, finding: Finding | None, **more: Any) -> StagePlan:
            return StagePlan(stage=stage, state=state, run=run, spec=spec, job=job, finding=finding, **more)

        def again(reason: str, message: str) -> StagePlan:
            self._replaced.append(job)
            return plan(StageState.PENDING, Finding(reason=reason, message=message, stalled=False))

        if job.deleting:
            message = f"waits until Job {job.name}, which is being deleted, is gone"
            return plan(StageState.PENDING, _stopping(message))
        at = self._surroundings(stage)
        if job.ended == "Complete":
            on_claim = self._observed.has_output(job)
            if job.told is not None and on_claim:
                return plan(StageState.PENDING, self._claim_fault)  # it could not be recorded on that claim
            if job.told is None and on_claim and any(pod.exit_code == 0 for pod in job.pods):
                return plan(StageState.FAILED, failures.lost_outcome(job, at=at), terms=self._terms)
            lost = "its pod is gone with the outcome" if on_claim else "the claim with its output is gone"
            return again("OutcomeLost", f"{stage.name} is done, but {lost}: it is asked again")
        if job.ended == "Failed":
            remembered = self._failed.get(run)
            finding = failures.failed(job, at=at)
            terms = None if finding.final else job.annotations.get(jobs.TERMS)
            if terms is not None and self._terms not in (None, terms):
                return again("TriesAgain", f"{stage.name} is tried again, because the spec has changed since it failed")
            if remembered is not None:
                return plan(StageState.FAILED, _finding(remembered), remembered=remembered, terms=terms)
            return plan(StageState.FAILED, finding, terms=terms)
        if self._spec.suspend:
            return plan(StageState.SUSPENDED, None)
        if not job.has_started and self._profile is not None:
            wanted = self._launch(stage, run=run, spec=spec, profile=self._profile)
            if wanted.template != job.annotations.get(jobs.TEMPLATE):
                return again("Replaced", f"{stage.name} has not started and is made anew with its new settings")
        running = job.pod is not None and job.pod.running
        return plan(
            StageState.RUNNING if running else StageState.PENDING,
            failures.hindrance(job, at=at, warnings=self._observed.warnings),
            terms=self._terms,
        )

    def _without_job(self, stage: Stage, *, run: StageRun, spec: StageSpec) -> StagePlan:
        def plan(state: StageState, finding: Finding | None, **more: Any) -> StagePlan:
            return StagePlan(stage=stage, state=state, run=run, spec=spec, finding=finding, **more)

        remembered = self._failed.get(run)
        if remembered is not None and (remembered.terms is None or self._terms in (None, remembered.terms)):
            return plan(StageState.FAILED, _finding(remembered), remembered=remembered, terms=remembered.terms)
        if self._spec.suspend:
            return plan(StageState.SUSPENDED, None)
        fault = (
            self._claim_fault
            or references.missing_claim(
                stage, self._spec, found=self._observed.references, namespace=self._fine_tune.metadata.namespace
            )
            or self._profile_fault
            or self._unservable(stage)
            or self._stopping(run)
        )
        if fault is not None or self._profile is None:
            return plan(StageState.PENDING, fault)
        launch = self._launch(stage, run=run, spec=spec, profile=self._profile)
        return plan(StageState.PENDING, None, launch=launch)

    def _unservable(self, stage: Stage) -> Finding | None:
        """What is known, once the base model is, of adapters that no server would take: before a GPU is."""
        if stage.name != TRAIN:
            return None
        prepared = self._plans[PREPARE].outcome
        return servability.fault(self._spec, architecture=prepared.facts.get("architecture", "") if prepared else "")

    def _stopping(self, run: StageRun) -> Finding | None:
        """What still runs for the very same output: two pods must never write one directory."""
        job = next((job for job in self._observed.jobs if job.run == run), None)
        if job is not None:
            message = f"waits until Job {job.name} of the FineTune that was deleted before is gone"
            return _stopping(message)
        pod = next((pod for pod in self._observed.pods if pod.run == run and pod.live), None)
        if pod is not None:
            message = f"waits until pod {pod.name} of an earlier Job has stopped"
            return _stopping(message)
        return None

    def _launch(self, stage: Stage, *, run: StageRun, spec: StageSpec, profile: Profile) -> Launch:
        parents = [self._plans[name] for name in stage.parents]
        inputs = jobs.stage_inputs(
            {parent.stage.name: (parent.run.hash, _digest(parent)) for parent in parents if parent.run is not None}
        )
        return jobs.launch(
            self._fine_tune,
            stage=stage,
            run=run,
            spec=spec,
            inputs=inputs,
            profile=profile,
            hub_endpoint=self._config.hub.endpoint,
        )

    def _surroundings(self, stage: Stage) -> Surroundings:
        return Surroundings(
            finetune=self._fine_tune.metadata.name,
            namespace=self._fine_tune.metadata.namespace,
            stage=stage.name,
            profile=self._profile.name if self._profile else self._spec.accelerator.profile or "default",
            retries=self._spec.retries,
            deadline_seconds=self._spec.deadline_seconds,
            rebuild=self._rebuild,
        )


def _digest(plan: StagePlan) -> str:
    if plan.outcome is None or plan.outcome.digest is None:
        raise ValueError(f"{plan.stage.name} has put out nothing yet")
    return plan.outcome.digest


def _finding(remembered: StageStatus) -> Finding:
    return Finding(
        reason=remembered.reason or "StageFailed", message=remembered.message or "", final=remembered.terms is None
    )


def _stopping(message: str) -> Finding:
    return Finding(reason="Stopping", message=message, stalled=False, awaits_removal=True)
