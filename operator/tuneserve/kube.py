"""The only door to the API server: plain dicts in and out, server-side apply, retries, metrics.

No other module imports the Kubernetes client. Typed models of that client are not used: they drop fields that they
do not know, and refuse nulls, so what is read through them must not be written back.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config as kube_config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from tuneserve import metrics, names
from tuneserve.difference import differs, with_hash
from tuneserve.kinds import CLAIM, CONFIG_MAP, EVENT, FINETUNE, JOB, POD, Kind, kind_of
from tuneserve.ownership import stranger

# fmt: off
__all__ = [
    "CLAIM", "CONFIG_MAP", "EVENT", "FINETUNE", "JOB", "POD", "Body", "ConflictError", "Kind", "Kube", "KubeError",
    "kind_of",
]
# fmt: on

Body = dict[str, Any]

#: Tries of one request in all, and the delay before the second (seconds; doubled each time, with jitter).
ATTEMPTS = 5
FIRST_DELAY = 0.2
#: An answer that takes longer (seconds) is given up and tried again.
REQUEST_TIMEOUT = 30.0
#: Answers that another try may turn to the better. A 409 is not: its sender must look again first.
_RETRIED = frozenset({429, 500, 502, 503, 504})
#: Admission learns of a new kind some seconds after the API server has it, and until then lets its objects own nothing.
_KIND_NOT_KNOWN_YET = "cannot find RESTMapping"
_PAGE = 500
_APPLY_ATTEMPTS = 4


class KubeError(Exception):
    """The API server refused, or could not be reached (status 0); `message` is its own sentence."""

    expected = True
    """Explains itself: logged without a traceback."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{message} ({reason}, {status})" if status else message)
        self.status = status
        self.reason = reason
        self.message = message
        self.passing = status == 403 and _KIND_NOT_KNOWN_YET in message
        """Whether time alone turns the refusal into consent: try again, and say nothing to the user."""


class ConflictError(KubeError):
    """An object of that name exists and is not ours to change."""

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(409, "NotOurs", message)
        self.passing = passing
        """It belonged to a deleted object of the same name and will be collected: try again."""


class Kube:
    """Requests to one API server."""

    def __init__(self, client: ApiClient, *, relogin: Callable[[Configuration], Any] | None = None) -> None:
        self._client = client
        self._relogin = relogin
        self._login_lock = asyncio.Lock()

    @classmethod
    async def login(cls) -> Self:
        """By `KUBECONFIG` if it is set, else by the pod's service account, else by `~/.kube/config`."""
        configuration = Configuration()
        await _load(configuration)
        return cls(ApiClient(configuration=configuration), relogin=_load)

    async def close(self) -> None:
        await self._client.close()  # type: ignore[no-untyped-call]

    # --- reading ---------------------------------------------------------------------------------------------------

    async def get(self, kind: Kind, namespace: str, name: str) -> Body | None:
        """The object, or none when there is none of that name."""
        try:
            return await self._request("get", kind, kind.path(namespace=namespace, name=name))
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    async def list(
        self,
        kind: Kind,
        namespace: str | None = None,
        labels: Mapping[str, str] | None = None,
        *,
        fields: Mapping[str, str] | None = None,
    ) -> list[Body]:
        """All objects of a namespace (none: of all namespaces) that carry the labels and have the field values."""
        query = {"limit": str(_PAGE)}
        if labels:
            query["labelSelector"] = names.selector_text(labels)
        if fields:
            query["fieldSelector"] = names.selector_text(fields)
        items: list[Body] = []
        while True:
            page = await self._request("list", kind, kind.path(namespace=namespace), query=query)
            # Items of a list come without their type, which owner references need.
            items += ({"apiVersion": kind.api_version, "kind": kind.kind, **item} for item in page.get("items") or ())
            token = page.get("metadata", {}).get("continue")
            if not token:
                return items
            query["continue"] = token

    # --- writing ---------------------------------------------------------------------------------------------------

    async def apply(self, body: Mapping[str, Any], *, force: bool = True) -> Body:
        """Make the object as wanted by server-side apply, and only if it is not: gives the live object.

        Raises `ConflictError` for an object of that name which another owner controls or a user made.
        """
        kind = kind_of(body)
        metadata = body["metadata"]
        namespace, name = metadata.get("namespace", ""), metadata["name"]
        wanted = with_hash(body)
        for attempt in range(1, _APPLY_ATTEMPTS + 1):
            live = await self.get(kind, namespace, name)
            patch = wanted
            if live is not None:
                if (refusal := stranger(desired=body, live=live)) is not None:
                    raise ConflictError(refusal.message, passing=refusal.passing)
                if live["metadata"].get("deletionTimestamp"):
                    raise KubeError(409, "BeingDeleted", f'{kind.kind} "{name}" is being deleted; it is made anew then')
                if not differs(wanted, live):
                    return live
                # What was looked at is what is changed: nobody can put another object in between.
                version = live["metadata"]["resourceVersion"]
                patch = {**wanted, "metadata": {**wanted["metadata"], "resourceVersion": version}}
            try:
                return await self._apply(kind, namespace, name, patch, force=force)
            except KubeError as error:
                if error.status != 409 or attempt == _APPLY_ATTEMPTS:
                    raise
                await asyncio.sleep(FIRST_DELAY * attempt * random.random())
        raise AssertionError("unreachable")

    async def create(self, body: Mapping[str, Any]) -> Body:
        """Make a new object; raises `KubeError` 409 when there is one of that name."""
        kind = kind_of(body)
        path = kind.path(namespace=body["metadata"].get("namespace", ""))
        query = {"fieldManager": names.FIELD_MANAGER}
        return await self._request("create", kind, path, method="POST", query=query, body=body)

    async def patch_status(
        self, kind: Kind, namespace: str, name: str, status: Mapping[str, Any], *, resource_version: str
    ) -> Body:
        """Make the status exactly this, as far as it is ours; compare first, this always writes.

        An object that has changed since `resource_version`, or was made anew, gives `KubeError` 409: look again. (The
        API server ignores a UID here.)
        """
        body = {
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "metadata": {"name": name, "namespace": namespace, "resourceVersion": resource_version},
            "status": dict(status),
        }
        return await self._apply(kind, namespace, name, body, force=True, subresource="status")

    async def merge_patch(self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any]) -> Body:
        """JSON merge patch: a null removes; `metadata.resourceVersion` in it is a precondition."""
        return await self._request(
            "patch",
            kind,
            kind.path(namespace=namespace, name=name),
            method="PATCH",
            query={"fieldManager": names.FIELD_MANAGER},
            body=patch,
            content_type="application/merge-patch+json",
        )

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str | None = None) -> None:
        """Delete in the background; an object that is gone, or has another UID by now, is fine."""
        options: Body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        try:
            await self._request(
                "delete", kind, kind.path(namespace=namespace, name=name), method="DELETE", body=options
            )
        except KubeError as error:
            if error.status != 404 and not (uid is not None and error.status == 409):
                raise

    async def _apply(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        body: Mapping[str, Any],
        *,
        force: bool,
        subresource: str | None = None,
    ) -> Body:
        return await self._request(
            "apply" if subresource is None else f"apply_{subresource}",
            kind,
            kind.path(namespace=namespace, name=name, subresource=subresource),
            method="PATCH",
            query={"fieldManager": names.FIELD_MANAGER, "force": str(force).lower()},
            body=body,
            content_type="application/apply-patch+yaml",  # YAML by name; JSON is YAML
        )

    # --- one request -------------------------------------------------------------------------------------------------

    async def _request(
        self,
        verb: str,
        kind: Kind,
        path: str,
        *,
        method: str = "GET",
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Body:
        url = path if not query else f"{path}?{urlencode(query)}"
        renewed = False
        attempt = 0
        while True:
            attempt += 1
            error, wait = await self._try(verb, kind, url, method=method, body=body, content_type=content_type)
            if not isinstance(error, KubeError):
                return error
            if error.status == 401 and self._relogin is not None and not renewed:
                renewed = True
                async with self._login_lock:
                    await self._relogin(self._client.configuration)
                continue
            if attempt >= ATTEMPTS or not (error.status in _RETRIED or error.status == 0):
                raise error
            delay = FIRST_DELAY * 2 ** (attempt - 1) * (0.5 + random.random())
            await asyncio.sleep(max(delay, min(wait, REQUEST_TIMEOUT)))

    async def _try(
        self, verb: str, kind: Kind, url: str, *, method: str, body: Mapping[str, Any] | None, content_type: str
    ) -> tuple[Body | KubeError, float]:
        """One try: the answer or why there is none, and the seconds that the server asks to wait."""
        started = time.monotonic()
        code = "error"
        wait = 0.0
        try:
            headers = {"Accept": "application/json", "Content-Type": content_type}
            serialized = await self._client.param_serialize(
                method, url, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            response = await self._client.call_api(
                *serialized, _request_timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT)
            )
            content = await response.read()  # type: ignore[no-untyped-call]
            code = str(response.status)
            if response.status < 300:
                return json.loads(content), wait
            retry_after = response.headers.get("Retry-After", "")
            wait = float(retry_after) if retry_after.isdigit() else 0.0
            return _refusal(response.status, content, what=f"{method} {url}"), wait
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            sentence = str(error) or type(error).__name__
            return KubeError(0, "Unreachable", f"{method} {url}: the API server did not answer: {sentence}"), wait
        finally:
            metrics.KUBE_REQUESTS.labels(verb=verb, kind=kind.kind, code=code).inc()
            metrics.KUBE_SECONDS.labels(verb=verb).observe(time.monotonic() - started)


def _refusal(status: int, content: bytes, *, what: str) -> KubeError:
    try:
        answer = json.loads(content)
    except ValueError:
        answer = {}
    if not isinstance(answer, dict):
        answer = {}
    text = content.decode(errors="replace")[:500]
    return KubeError(status, answer.get("reason") or "Unknown", answer.get("message") or f"{what}: {text}")


async def _load(configuration: Configuration) -> None:
    path = os.environ.get("KUBECONFIG")
    if path is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        kube_config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        return
    # The path must be given: the library has looked at the environment once, when it was imported.
    await kube_config.load_kube_config(  # type: ignore[no-untyped-call]
        config_file=path or "~/.kube/config", client_configuration=configuration, persist_config=False
    )
