"""Leader election by a Lease: of several operators one acts, the others stand by.

It keeps two operators from working against each other for long; it is no lock. After a pause of the whole process
two may act for a moment: writes are deterministic and carry preconditions, so that does no harm.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from tuneserve import metrics
from tuneserve.config import LeaderElection
from tuneserve.kinds import LEASE
from tuneserve.kube import Kube, KubeError

logger = logging.getLogger(__name__)


class LeaseLostError(Exception):
    """Another operator leads, or the lease could not be renewed in time: stop acting at once."""


class Leader:
    """One candidate for one Lease."""

    def __init__(
        self,
        kube: Kube,
        *,
        settings: LeaderElection,
        namespace: str,
        identity: str,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._kube = kube
        self._settings = settings
        self._namespace = namespace
        self._identity = identity
        self._clock = clock or asyncio.get_running_loop().time
        self._seen: tuple[str | None, str | None] = (None, None)
        self._seen_at = self._clock()
        self._holds = False

    async def acquire(self) -> None:
        """Wait until the lease is ours."""
        logger.info("waiting for lease %s/%s as %s", self._namespace, self._settings.lease_name, self._identity)
        while True:
            if await self._try():
                break
            # Jitter: standbys must not ask in step.
            await asyncio.sleep(self._settings.retry_seconds * (1 + 0.2 * random.random()))
        logger.info("leading")
        metrics.LEADER.set(1)

    async def hold(self) -> None:
        """Renew the lease for ever; raises LeaseLostError."""
        renewed = self._clock()
        while True:
            await asyncio.sleep(self._settings.retry_seconds)
            left = self._settings.renew_seconds - (self._clock() - renewed)
            try:
                # Not one instant more: from then on another may lead.
                async with asyncio.timeout(max(0.0, left)):
                    held = await self._try()
            except TimeoutError:
                held = False
            if held:
                renewed = self._clock()
            elif not self._holds or self._clock() - renewed >= self._settings.renew_seconds:
                metrics.LEADER.set(0)
                raise LeaseLostError(f"lease {self._namespace}/{self._settings.lease_name} is lost")

    async def release(self) -> None:
        """Let another take over without waiting for the lease to run out."""
        metrics.LEADER.set(0)
        if not self._holds:
            return
        self._holds = False
        try:
            lease = await self._get()
            if lease is not None and _holder(lease) == self._identity:
                spec = {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _micro_time()}
                await self._patch(lease, spec)
        except KubeError as error:
            logger.warning("the lease was not released, it runs out by itself: %s", error)

    async def _try(self) -> bool:
        """Take or renew the lease if that is possible now; remembers who holds it."""
        try:
            lease = await self._get()
            if lease is None:
                await self._create()
            else:
                holder = _holder(lease)
                version = lease["metadata"]["resourceVersion"]
                if (holder, version) != self._seen:
                    self._seen, self._seen_at = (holder, version), self._clock()
                if holder not in (None, "", self._identity) and not self._has_run_out(lease):
                    self._holds = False
                    return False
                await self._patch(lease, self._record(lease, taken_over=holder != self._identity))
        except KubeError as error:
            # 409: somebody else was faster; look again. Else: the lease may still be ours.
            if error.status != 409:
                logger.warning("lease: %s", error)
            return False
        self._holds = True
        return True

    def _has_run_out(self, lease: Mapping[str, Any]) -> bool:
        # By our own clock, from when we saw it change last: clocks of machines differ.
        seconds = (lease.get("spec") or {}).get("leaseDurationSeconds") or self._settings.lease_seconds
        return self._clock() - self._seen_at > seconds

    def _record(self, lease: Mapping[str, Any] | None, *, taken_over: bool) -> dict[str, Any]:
        spec: dict[str, Any] = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._settings.lease_seconds,
            "renewTime": _micro_time(),
        }
        if taken_over:
            spec["acquireTime"] = spec["renewTime"]
            changes = ((lease or {}).get("spec") or {}).get("leaseTransitions") or 0
            spec["leaseTransitions"] = changes + (1 if lease is not None else 0)
        return spec

    async def _get(self) -> dict[str, Any] | None:
        return await self._kube.get(LEASE, self._namespace, self._settings.lease_name)

    async def _create(self) -> None:
        await self._kube.create(
            {
                "apiVersion": LEASE.api_version,
                "kind": LEASE.kind,
                "metadata": {"name": self._settings.lease_name, "namespace": self._namespace},
                "spec": self._record(None, taken_over=True),
            }
        )

    async def _patch(self, lease: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
        version = lease["metadata"]["resourceVersion"]
        patch = {"metadata": {"resourceVersion": version}, "spec": dict(spec)}
        await self._kube.merge_patch(LEASE, self._namespace, self._settings.lease_name, patch)


def _holder(lease: Mapping[str, Any]) -> str | None:
    holder = (lease.get("spec") or {}).get("holderIdentity")
    return str(holder) if holder else None


def _micro_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
