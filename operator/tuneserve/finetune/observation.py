"""Looks at everything in the cluster that a FineTune depends on, by requests to the API server, never from a cache."""

import asyncio
from collections.abc import Mapping
from typing import Any

from tuneserve import names
from tuneserve.api import FineTune
from tuneserve.finetune import claims, ledger, references
from tuneserve.finetune.children import views
from tuneserve.finetune.decisions import Observed
from tuneserve.finetune.ledger import StageRun
from tuneserve.finetune.references import References
from tuneserve.kube import CLAIM, CONFIG_MAP, JOB, POD, Kind, Kube


async def observe(fine_tune: FineTune, *, kube: Kube) -> Observed:
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
    )


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
