"""Kubernetes Events about our objects, for `kubectl describe`; losing one must never disturb a reconcile."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from tuneserve import names
from tuneserve.kinds import EVENT
from tuneserve.kube import Kube, KubeError

logger = logging.getLogger(__name__)

#: In bytes; the API server refuses a longer one.
_NOTE_LIMIT = 1024
_REASON_LIMIT = 128
_CONTROLLER = "tuneserve.dev/operator"


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Events:
    """Writes events; the same one again raises its count instead of making another object."""

    def __init__(self, kube: Kube, *, instance: str, now: Callable[[], datetime] = _utc_now) -> None:
        self._kube = kube
        self._instance = instance
        self._now = now

    async def emit(
        self,
        object_body: Mapping[str, Any],
        *,
        type: Literal["Normal", "Warning"],
        reason: str,
        message: str,
        action: str,
    ) -> None:
        """Tell that something happened to the object; to be called for a change only, not at every reconcile."""
        metadata = object_body["metadata"]
        namespace, name = metadata["namespace"], _name(metadata, type, reason, message)
        time = _micro_time(self._now())
        body = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"name": name, "namespace": namespace},
            "eventTime": time,
            "reportingController": _CONTROLLER,
            "reportingInstance": self._instance[:_REASON_LIMIT],
            "action": action[:_REASON_LIMIT],
            "reason": reason[:_REASON_LIMIT],
            "note": _shortened(message),
            "type": type,
            "regarding": {
                "apiVersion": object_body["apiVersion"],
                "kind": object_body["kind"],
                "namespace": namespace,
                "name": metadata["name"],
                "uid": metadata.get("uid"),
            },
        }
        try:
            await self._create_or_count(namespace, name, body, time)
        except KubeError as error:
            # The namespace may be on its way out, or a quota reached: no reason to fail the reconcile.
            logger.info("event %s of %s/%s was not written: %s", reason, namespace, metadata["name"], error)

    async def _create_or_count(self, namespace: str, name: str, body: Mapping[str, Any], time: str) -> None:
        try:
            await self._kube.create(body)
        except KubeError as error:
            if error.status != 409:
                raise
            before = await self._kube.get(EVENT, namespace, name)
            count = ((before or {}).get("series") or {}).get("count", 1)
            # A series counts from two: the API server refuses a smaller one.
            series = {"count": count + 1, "lastObservedTime": time}
            await self._kube.merge_patch(EVENT, namespace, name, {"series": series})


def _name(metadata: Mapping[str, Any], type: str, reason: str, message: str) -> str:
    identity = "\n".join((metadata.get("uid") or "", type, reason, message))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return f"{names.limited(metadata['name'], limit=200)}.{digest}"


def _shortened(message: str) -> str:
    content = message.encode()
    if len(content) <= _NOTE_LIMIT:
        return message
    end = " …"
    return content[: _NOTE_LIMIT - len(end.encode())].decode(errors="ignore") + end


def _micro_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
