"""Brings one FineTune nearer to what it declares: observe, decide, apply, report.

Level-triggered: it may be called at any time, be killed between any two of its requests, and be called again.
"""

from collections.abc import Awaitable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from tuneserve import names
from tuneserve.api import FineTune, FineTuneStatus, Progress, StageState
from tuneserve.context import Context
from tuneserve.finetune import ledger, status
from tuneserve.finetune.announcements import announcements
from tuneserve.finetune.decisions import Observed, Plan, foremost
from tuneserve.finetune.failures import Finding
from tuneserve.finetune.ledger import Entry
from tuneserve.finetune.observation import observe
from tuneserve.finetune.plan import resolve
from tuneserve.finetune.progress import scrape
from tuneserve.kube import CLAIM, CONFIG_MAP, FINETUNE, JOB, ConflictError, KubeError
from tuneserve.workqueue import Key, Result

Body = Mapping[str, Any]

#: Seconds until something that is about to go away is looked at again.
SOON = 2.0
#: Progress intervals until something that a user must provide is looked for again.
RECHECK_INTERVALS = 2
#: Seconds until another try after the object changed under our hands.
AGAIN = 0.2
#: Answers that another try will not change: the request itself is not acceptable.
_REFUSALS = frozenset({400, 403, 422})


async def reconcile(key: Key, context: Context) -> Result:
    """One pass over the FineTune of that key; raises `KubeError` when the API server cannot be used."""
    body = await context.kube.get(FINETUNE, key.namespace, key.name)
    if body is None or body["metadata"].get("deletionTimestamp"):
        # Jobs, pods and ConfigMaps go by garbage collection; so does the claim if it is owned, else it stays.
        return Result()
    try:
        fine_tune = _parse(body)
    except ValidationError as error:
        return await _report_invalid(body, error=error, context=context)
    observed = await observe(fine_tune, kube=context.kube, now=context.now())
    observed = await _recorded(fine_tune, observed, context=context)
    plan = resolve(fine_tune, config=context.config, observed=observed)
    plan = plan.refused(await _apply(fine_tune, plan=plan, context=context))
    told = await _progress(fine_tune, body=body, plan=plan, context=context)
    after = status.status(fine_tune, plan=plan, progress=told, has_claim=observed.claim is not None, now=context.now())
    if not await _report(body, before=fine_tune.status, after=after, context=context):
        return Result(requeue_after=AGAIN)
    return Result(requeue_after=_requeue_after(plan, context=context))


def _parse(body: Body) -> FineTune:
    """The object as types; a status that this version cannot read is written anew, and is no fault of the user."""
    try:
        return FineTune.model_validate(body)
    except ValidationError:
        return FineTune.model_validate({**body, "status": {}})


async def _recorded(fine_tune: FineTune, observed: Observed, *, context: Context) -> Observed:
    """Keeps what finished Jobs told on the claim, before anything is built on it."""
    news = {
        job.run: Entry(outcome=job.told, finished=job.finished)
        for job in observed.jobs
        if job.told is not None
        and job.owner_uid == fine_tune.metadata.uid
        and observed.ledger.outcome(job.run) is None
        and observed.has_output(job)
    }
    if not news or observed.claim is None or not observed.claim_is_ours:
        return observed
    changes = ledger.recording(observed.claim, news)
    claim = await context.kube.merge_patch(
        CLAIM,
        fine_tune.metadata.namespace,
        names.artifacts_claim(fine_tune.metadata.name),
        # A claim that was made anew meanwhile holds no such output.
        {"metadata": {"uid": observed.claim["metadata"]["uid"], "annotations": changes}},
    )
    return replace(observed, claim=claim, ledger=observed.ledger.with_entries(news))


async def _apply(fine_tune: FineTune, *, plan: Plan, context: Context) -> dict[str, Finding]:
    """Makes, changes and removes what the plan says; gives what the API server refused, by stage ("" for the claim)."""
    kube, namespace = context.kube, fine_tune.metadata.namespace
    if plan.claim is not None:
        refusal = await _refusal(kube.apply(plan.claim), what="the artifacts claim", reason="ClaimRefused")
        if refusal is not None:
            return {"": refusal}
    for job in plan.remove_jobs:
        await kube.delete(JOB, namespace, job.name, uid=job.uid)
    for job, patch in plan.adjust:
        await kube.merge_patch(JOB, namespace, job.name, patch)
    refusals: dict[str, Finding] = {}
    for stage in plan.stages:
        if stage.launch is None:
            continue
        name = stage.stage.name
        # The ConfigMap first: a pod that waits for its configuration waits for minutes.
        for child in (stage.launch.config_map, stage.launch.job):
            refusal = await _refusal(kube.apply(child), what=f"the {child['kind']} of {name}", reason="JobRefused")
            if refusal is not None:
                refusals[name] = refusal
                break
    for config_map in plan.remove_config_maps:
        await kube.delete(CONFIG_MAP, namespace, config_map)
    return refusals


async def _refusal(request: Awaitable[Any], *, what: str, reason: str) -> Finding | None:
    """What the user must know of a request that no other try will make succeed; any other failure is raised."""
    try:
        await request
    except ConflictError as error:
        return Finding(reason="NameConflict", message=error.message, stalled=not error.passing)
    except KubeError as error:
        if error.status not in _REFUSALS or error.passing:
            raise
        return Finding(reason=reason, message=f"the API server refuses {what}: {error.message}")
    return None


async def _progress(fine_tune: FineTune, *, body: Body, plan: Plan, context: Context) -> Progress | None:
    """What the stage that runs tells; asked, and so written, only once in the progress interval."""
    main = foremost(stage for stage in plan.stages if stage.state is StageState.RUNNING)
    if main is None or main.run is None or main.job is None or main.job.pod is None or main.job.pod.ip is None:
        return None
    known = {(stage.name, stage.hash) for stage in fine_tune.status.stages if stage.state is StageState.RUNNING}
    if main.run not in known:
        # It has just begun and has nothing to tell; the news of its start must not wait for its answer.
        return None
    before = fine_tune.status.progress
    if before is not None and before.stage != main.stage.name:
        before = None
    written = _status_written(body)
    interval = timedelta(seconds=context.config.progress_interval_seconds)
    if before is not None and written is not None and context.now() - written < interval:
        return before
    return await scrape(main.run, ip=main.job.pod.ip, http=context.http) or before


def _status_written(body: Body) -> datetime | None:
    """When the status was last written; the API server keeps that, so that the operator need not."""
    times = [
        entry["time"]
        for entry in body["metadata"].get("managedFields") or ()
        if entry.get("manager") == names.FIELD_MANAGER and entry.get("subresource") == "status" and entry.get("time")
    ]
    return datetime.fromisoformat(max(times)) if times else None


async def _report_invalid(body: Body, *, error: ValidationError, context: Context) -> Result:
    """A stored object that this version cannot read: said in its status, never a crash."""
    try:
        before = FineTuneStatus.model_validate(body.get("status") or {})
    except ValidationError:
        before = FineTuneStatus()
    faults = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    after = status.invalid(
        before=before,
        message=f"this version of the operator cannot read the object: {faults}",
        generation=body["metadata"].get("generation", 0),
        now=context.now(),
    )
    await _report(body, before=before, after=after, context=context)
    return Result(requeue_after=context.config.resync_seconds)


async def _report(body: Body, *, before: FineTuneStatus, after: FineTuneStatus, context: Context) -> bool:
    """Writes the status if it differs, and then tells what changed; False when the object has changed meanwhile."""
    if after == before:
        return True
    metadata = body["metadata"]
    try:
        await context.kube.patch_status(
            FINETUNE,
            metadata["namespace"],
            metadata["name"],
            after.to_body(),
            resource_version=metadata["resourceVersion"],
        )
    except KubeError as error:
        if error.status not in (404, 409):
            raise
        return False
    for told in announcements(before=before, after=after):
        await context.events.emit(body, type=told.type, reason=told.reason, message=told.message, action=told.action)
    return True


def _requeue_after(plan: Plan, *, context: Context) -> float:
    """Seconds until the next look without an event."""
    config = context.config
    if plan.remove_jobs or plan.awaits_removal:
        return SOON
    if any(stage.job is not None and stage.job.active for stage in plan.stages):
        return config.progress_interval_seconds
    if any(stage.held and stage.state is not StageState.FAILED for stage in plan.stages) or plan.claim_fault:
        return RECHECK_INTERVALS * config.progress_interval_seconds
    return config.resync_seconds
