"""The story of a ModelServe: look, decide what shall run, make it so, report once."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from tuneserve import names
from tuneserve.api import FineTune, ModelServe, ModelServeStatus, ServedVersion
from tuneserve.config import Profile, ProfileError
from tuneserve.context import Context
from tuneserve.kinds import CLAIM, DEPLOYMENT, FINETUNE, MODELSERVE, POD
from tuneserve.kube import ConflictError, KubeError
from tuneserve.modelserve.deployment import build_deployment, rollout_of, selector, version_of
from tuneserve.modelserve.plan import Choice, Problem, choose
from tuneserve.modelserve.service import build_service
from tuneserve.modelserve.status import Observation, announcements, report, report_problem
from tuneserve.modelserve.trouble import diagnose
from tuneserve.workqueue import Key, Result

#: Until the next look at things that no watch tells of: claims, and objects of others under our names (seconds).
_UNWATCHED_SECONDS = 10.0
#: Refusals that say something about the object; all others are the weather, and the queue tries again.
_TELLING = frozenset({400, 403, 404, 422})


async def reconcile(key: Key, context: Context) -> Result:
    """One pass; any number of them, in any order and broken off anywhere, leads to the same end."""
    body = await context.kube.get(MODELSERVE, key.namespace, key.name)
    if body is None or body["metadata"].get("deletionTimestamp"):
        return Result()  # the Deployment and the Service are collected by the cluster
    try:
        modelserve = ModelServe.model_validate(body)
    except ValidationError as error:
        message = f"must be corrected: {_sentence(error)}"
        await _write_problem(context, body, Problem(reason="InvalidSpec", message=message, stalled=True))
        return Result()
    try:
        return await _serve(context, body, modelserve)
    except ConflictError as error:
        await _write_problem(
            context, body, Problem(reason="NameTaken", message=error.message, stalled=not error.passing)
        )
        return Result(requeue_after=1.0 if error.passing else _UNWATCHED_SECONDS)
    except KubeError as error:
        if error.status == 409:
            return Result(requeue_after=1.0)  # changed since it was read, or on its way out: look again
        if error.status in _TELLING and not error.passing:
            invalid = error.status in (400, 422)
            reason = "Invalid" if invalid else "Refused"
            await _write_problem(context, body, Problem(reason=reason, message=error.message, stalled=invalid))
        raise


async def _serve(context: Context, body: Mapping[str, Any], modelserve: ModelServe) -> Result:
    namespace, name = modelserve.metadata.namespace, modelserve.metadata.name
    live = await context.kube.get(DEPLOYMENT, namespace, name)
    if live is not None and not _is_ours(live, modelserve):
        live = None
    choice = await _choose(context, modelserve, live)
    profile = _profile(context, modelserve)
    owner = names.owner_reference(body)
    result = Result()
    if isinstance(profile, Problem):
        choice = replace(choice, problem=profile)
    elif (version := choice.version) is not None:
        if (missing := await _missing_claim(context, namespace, version)) is None:
            live = await context.kube.apply(
                build_deployment(modelserve=modelserve, owner=owner, version=version, profile=profile)
            )
        else:
            choice = replace(choice, problem=missing)
            result = Result(requeue_after=_UNWATCHED_SECONDS)
    seen = Observation(choice=choice, rollout=None)
    if live is not None:
        await context.kube.apply(build_service(modelserve=modelserve, owner=owner))
        rollout = rollout_of(live)
        pods = [] if rollout.complete else await context.kube.list(POD, namespace, selector(name))
        seen = Observation(choice=choice, rollout=rollout, trouble=diagnose(pods, template=rollout.template))
    await _write(context, body, modelserve.status, report(modelserve, seen, now=context.now()))
    return result


async def _choose(context: Context, modelserve: ModelServe, live: Mapping[str, Any] | None) -> Choice:
    status = modelserve.status
    current = (version_of(live) if live is not None else None) or status.candidate or status.served
    reference = modelserve.spec.model.fine_tune
    finetune: FineTune | None = None
    if reference is not None:
        found = await context.kube.get(FINETUNE, modelserve.metadata.namespace, reference.name)
        try:
            finetune = FineTune.model_validate(found) if found is not None else None
        except ValidationError as error:
            message = f'FineTune "{reference.name}" must be corrected: {_sentence(error)}'
            return Choice(version=current, problem=Problem(reason="FineTuneInvalid", message=message, stalled=True))
    return choose(modelserve.spec.model, finetune=finetune, current=current)


def _profile(context: Context, modelserve: ModelServe) -> Profile | Problem:
    accelerator = modelserve.spec.accelerator
    try:
        profile = context.config.profile(name=accelerator.profile, namespace=modelserve.metadata.namespace)
    except ProfileError as error:
        return Problem(reason="ProfileNotFound", message=str(error), stalled=True)
    if profile.resource is None and accelerator.count > 1:
        message = f"profile {profile.name} has no GPUs: spec.accelerator.count must be 1"
        return Problem(reason="InvalidSpec", message=message, stalled=True)
    return profile


async def _missing_claim(context: Context, namespace: str, version: ServedVersion) -> Problem | None:
    claim = await context.kube.get(CLAIM, namespace, version.claim)
    if claim is None:
        message = f'PersistentVolumeClaim "{version.claim}" does not exist in this namespace'
        return Problem(reason="ClaimNotFound", message=message, stalled=False)
    return None


def _is_ours(live: Mapping[str, Any], modelserve: ModelServe) -> bool:
    owner = names.controller_of(live)
    return owner is not None and owner.get("uid") == modelserve.metadata.uid


async def _write_problem(context: Context, body: Mapping[str, Any], problem: Problem) -> None:
    before = _stored_status(body)
    await _write(context, body, before, report_problem(body, before, problem, now=context.now()))


def _stored_status(body: Mapping[str, Any]) -> ModelServeStatus:
    try:
        return ModelServeStatus.model_validate(body.get("status") or {})
    except ValidationError:
        return ModelServeStatus()


async def _write(context: Context, body: Mapping[str, Any], before: ModelServeStatus, after: ModelServeStatus) -> None:
    if after == before:
        return
    metadata = body["metadata"]
    try:
        await context.kube.patch_status(
            MODELSERVE,
            metadata["namespace"],
            metadata["name"],
            after.to_body(),
            resource_version=metadata["resourceVersion"],
        )
    except KubeError as error:
        if error.status == 404:
            return  # deleted meanwhile
        raise
    for item in announcements(before, after):
        await context.events.emit(body, type=item.type, reason=item.reason, message=item.message, action=item.action)


def _sentence(error: ValidationError) -> str:
    """All complaints, each with the field it is about."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc'])}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors()
    )
