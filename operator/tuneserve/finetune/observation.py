"""Looks at everything in the cluster that a FineTune depends on, by requests to the API server, never from a cache."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from tuneserve import names
from tuneserve.api import FineTune
from tuneserve.finetune import claims, ledger, references
from tuneserve.finetune.children import JobView, views
from tuneserve.finetune.decisions import Observed
from tuneserve.finetune.ledger import StageRun
from tuneserve.finetune.references import References
from tuneserve.kube import CLAIM, CONFIG_MAP, EVENT, JOB, POD, Kind, Kube, KubeError

logger = logging.getLogger(__name__)


#: Seconds after which a pod that does not start, or a Job without a pod, is asked for its reasons.
PATIENCE = 10.0


async def observe(fine_tune: FineTune, *, kube: Kube, now: datetime) -> Observed:
    """What there is of the FineTune's children, and of what its spec names."""
    namespace = fine_tune.metadata.namespace
    selector = names.finetune_selector(fine_tune.metadata.name)
    # Jobs before pods: a Job that is seen complete had its pod by then, so a pod that is missing is really gone.
    job_bodies = await kube.list(JOB, namespace, selector)
    pod_bodies, config_maps, claim, found = await asyncio.gather(
        kube.list(POD, namespace, selector),
        kube.list(CONFIG_MAP, namespace, selector),
        kube.get(CLAIM, namespace, names.artifacts_claim(fine_tune.metadata.name)),
        _references(fine_tune, kube=kube),
    )
    jobs, pods = views(job_bodies, pod_bodies)
    ours = claim is not None and claims.is_ours(claim, fine_tune)
    return Observed(
        claim=claim,
        claim_is_ours=ours,
        ledger=ledger.read(claim if ours else None),
        jobs=jobs,
        pods=pods,
        config_maps={body["metadata"]["name"]: run for body in config_maps if (run := _run(body)) is not None},
        references=found,
        warnings=await _warnings(jobs, namespace=namespace, kube=kube, before=now - timedelta(seconds=PATIENCE)),
    )


async def _warnings(jobs: Iterable[JobView], *, namespace: str, kube: Kube, before: datetime) -> Mapping[str, str]:
    """What the cluster says of Jobs that get no pod, and of pods that do not start, by UID."""
    stuck = [uid for job in jobs if (uid := job.stuck_since(before)) is not None]
    notes = await asyncio.gather(*(_last_warning(uid, namespace=namespace, kube=kube) for uid in stuck))
    return {uid: note for uid, note in zip(stuck, notes, strict=True) if note}


async def _last_warning(uid: str, *, namespace: str, kube: Kube) -> str | None:
    try:
        events = await kube.list(EVENT, namespace, fields={"regarding.uid": uid})
    except KubeError as error:
        # Only the explanation is missing then.
        logger.info("events about %s cannot be listed: %s", uid, error)
        return None
    warnings = [event for event in events if event.get("type") == "Warning" and event.get("note")]
    return str(max(warnings, key=_event_time)["note"]) if warnings else None


def _event_time(event: Mapping[str, Any]) -> str:
    seen = (event.get("series") or {}).get("lastObservedTime")
    return str(seen or event.get("deprecatedLastTimestamp") or event.get("eventTime") or "")


async def _references(fine_tune: FineTune, *, kube: Kube) -> References:
    spec, namespace = fine_tune.spec, fine_tune.metadata.namespace
    base = references.base_claim(spec)
    claim_names = {claim.name for claim in references.data_claims(spec)} | ({base.name} if base else set())
    map_names = {reference.name for reference in references.config_maps(spec)}
    found_claims, found_maps = await asyncio.gather(
        _get_all(CLAIM, namespace, claim_names, kube=kube), _get_all(CONFIG_MAP, namespace, map_names, kube=kube)
    )
    return References(claims=found_claims, config_maps=found_maps)


async def _get_all(
    kind: Kind, namespace: str, wanted: set[str], *, kube: Kube
) -> Mapping[str, Mapping[str, Any] | None]:
    ordered = sorted(wanted)
    bodies = await asyncio.gather(*(kube.get(kind, namespace, name) for name in ordered))
    return dict(zip(ordered, bodies, strict=True))


def _run(body: Mapping[str, Any]) -> StageRun | None:
    labels = body["metadata"].get("labels") or {}
    if names.STAGE not in labels or names.HASH not in labels:
        return None
    return StageRun(labels[names.STAGE], labels[names.HASH])
