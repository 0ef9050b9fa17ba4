"""A cluster in memory, in which a test decides what happens next: only to inject faults and orders.

It keeps objects, collects garbage, and plays the Job controller and a kubelet one step at a time. What a real API
server does is tested on a real one; here every interleaving is tried.
"""

import copy
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import aiohttp

from tuneserve import names
from tuneserve.config import OperatorConfig
from tuneserve.context import Context
from tuneserve.difference import differs, with_hash
from tuneserve.events import Events
from tuneserve.finetune.reconcile import reconcile
from tuneserve.kube import CLAIM, CONFIG_MAP, EVENT, FINETUNE, JOB, POD, ConflictError, Kind, Kube, KubeError, kind_of
from tuneserve.ownership import stranger
from tuneserve.workqueue import Key, Result
from tuneserve_pipeline.contract import Outcome, StageConfig

NAMESPACE = "team"
Object = dict[str, Any]
Objects = list[Object]  # the class below has a method of the name `list`
Run = tuple[str, str]


class Crash(BaseException):
    """The operator is killed: no code of it may catch this."""


class World:
    """The cluster, and the operator in it."""

    def __init__(self, *, config: OperatorConfig) -> None:
        self.objects: dict[tuple[Kind, str], Object] = {}
        self.config = config
        self.time = datetime(2026, 1, 1, tzinfo=UTC)
        self.writes: list[str] = []
        self.crash_after: int | None = None
        """Writes that the operator still gets to make."""
        self.refusals: dict[Kind, KubeError] = {}
        """Kinds that the API server refuses to make."""
        self.events: list[tuple[str, str]] = []
        """Warnings of the controllers and the kubelet: UID and text."""
        self.volume: dict[Run, Outcome] = {}
        """Finished outputs on the artifacts claim."""
        self.work: Counter[Run] = Counter()
        """How often an output was made, and not found."""
        self.digests: dict[str, str] = {}
        """Digest of a stage's output whatever its inputs; else each input gives another."""
        self._numbers = itertools.count(1)
        self._kube = cast(Kube, self)
        self.context = Context(
            kube=self._kube,
            config=config,
            events=Events(self._kube, instance="test", now=lambda: self.time),
            now=lambda: self.time,
            http=cast(aiohttp.ClientSession, None),  # no pod has an address, so none is asked
        )

    # --- as the operator sees it -------------------------------------------------------------------------------------

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        return copy.deepcopy(self.objects.get((kind, name)))

    async def list(
        self,
        kind: Kind,
        namespace: str | None = None,
        labels: Mapping[str, str] | None = None,
        *,
        fields: Mapping[str, str] | None = None,
    ) -> Objects:
        if kind == EVENT:
            return [{"type": "Warning", "note": note} for uid, note in self.events if fields == {"regarding.uid": uid}]
        wanted = dict(labels or {})
        return [copy.deepcopy(body) for body in self.all(kind) if wanted.items() <= _labels(body).items()]

    async def apply(self, body: Mapping[str, Any], *, force: bool = True) -> Object:
        kind, wanted = kind_of(body), with_hash(body)
        live = self.objects.get((kind, body["metadata"]["name"]))
        if live is not None:
            refusal = stranger(desired=body, live=live)
            if refusal is not None:
                raise ConflictError(refusal.message, passing=refusal.passing)
            if live["metadata"].get("deletionTimestamp"):
                raise KubeError(409, "BeingDeleted", "it is being deleted")
            if not differs(wanted, live):
                return copy.deepcopy(live)
            if kind == JOB and differs(body["spec"]["template"], live["spec"]["template"]):
                raise KubeError(422, "Invalid", "spec.template: field is immutable")
        if kind in self.refusals:
            raise self.refusals[kind]
        self._write(f"apply {kind.kind} {body['metadata']['name']}")
        if live is None:
            return copy.deepcopy(self.add(wanted))
        _merge(live, wanted)
        return copy.deepcopy(live)

    async def create(self, body: Mapping[str, Any]) -> Object:
        self._write(f"create {body['kind']}")
        return dict(body)

    async def patch_status(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        status: Mapping[str, Any],
        *,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> Object:
        live = self._live(kind, name)
        if resource_version not in (None, live["metadata"]["resourceVersion"]):
            raise KubeError(409, "Conflict", "the object has been modified")
        self._write(f"status {name}")
        live["status"] = copy.deepcopy(dict(status))
        self._touch(live)
        return copy.deepcopy(live)

    async def merge_patch(self, kind: Kind, namespace: str, name: str, patch: Mapping[str, Any]) -> Object:
        live = self._live(kind, name)
        if patch.get("metadata", {}).get("uid", live["metadata"]["uid"]) != live["metadata"]["uid"]:
            raise KubeError(409, "Conflict", "another object has that name now")
        self._write(f"patch {kind.kind} {name}")
        _merge(live, patch)
        self._touch(live)
        return copy.deepcopy(live)

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str | None = None) -> None:
        live = self.objects.get((kind, name))
        if live is None or uid not in (None, live["metadata"]["uid"]):
            return
        self._write(f"delete {kind.kind} {name}")
        self.remove(live)

    def _live(self, kind: Kind, name: str) -> Object:
        live = self.objects.get((kind, name))
        if live is None:
            raise KubeError(404, "NotFound", f"{kind.plural} {name} not found")
        return live

    def _write(self, what: str) -> None:
        if self.crash_after is not None:
            if self.crash_after == 0:
                raise Crash
            self.crash_after -= 1
        self.writes.append(what)

    # --- as the test sees it -----------------------------------------------------------------------------------------

    def all(self, kind: Kind) -> Objects:
        return [body for (other, _), body in self.objects.items() if other == kind]

    def add(self, body: Mapping[str, Any]) -> Object:
        """Puts an object into the cluster."""
        kind, made = kind_of(body), copy.deepcopy(dict(body))
        made["metadata"] |= {"uid": f"uid-{next(self._numbers)}", "namespace": NAMESPACE}
        made["metadata"].setdefault("creationTimestamp", _text(self.time))
        if kind == FINETUNE:
            made["metadata"]["generation"] = 1
        if kind == JOB:
            self._check_alone(made)
        self._touch(made)
        self.objects[kind, made["metadata"]["name"]] = made
        return made

    def remove(self, body: Object) -> None:
        """Deletes an object; what it owns goes with `collect`. A pod that runs gets its time to stop."""
        if kind_of(body) == POD and _phase(body) == "Running":
            body["metadata"].setdefault("deletionTimestamp", _text(self.time))
        else:
            self._forget(body)

    def _forget(self, body: Object) -> None:
        self.objects.pop((kind_of(body), body["metadata"]["name"]), None)

    def finetune(self) -> Object | None:
        return next(iter(self.all(FINETUNE)), None)

    def edit(self, spec: Mapping[str, Any]) -> None:
        """The user applies another spec."""
        live = self.finetune()
        assert live is not None
        if live["spec"] != spec:
            live["spec"] = copy.deepcopy(dict(spec))
            live["metadata"]["generation"] += 1
            self._touch(live)

    async def reconcile(self, name: str = "demo") -> Result:
        """One pass of the operator; `Crash` when it was killed on the way."""
        self.time += timedelta(seconds=20)
        result = await reconcile(Key("FineTune", NAMESPACE, name), self.context)
        self._check_wanted()
        return result

    def _touch(self, body: Object) -> None:
        body["metadata"]["resourceVersion"] = str(next(self._numbers))

    def _check_alone(self, job: Object) -> None:
        for other in self.all(JOB):
            assert run_of(other) != run_of(job) or finished(other), f"a second Job for {run_of(job)}"

    def _check_wanted(self) -> None:
        """No Job runs for inputs that the spec has left behind."""
        body = self.finetune()
        if body is None or body["metadata"].get("deletionTimestamp"):
            return
        hashes = {stage["name"]: stage.get("hash") for stage in body.get("status", {}).get("stages", [])}
        for job in self.all(JOB):
            stage, hash = run_of(job)
            ours = (names.controller_of(job) or {}).get("uid") == body["metadata"]["uid"]
            if ours and not finished(job):
                assert stage in hashes and hashes[stage] in (None, hash), f"nobody wants {stage}.{hash} any more"

    # --- the controllers ---------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """One round of garbage collection."""
        uids = {body["metadata"]["uid"] for body in self.objects.values()}
        for body in [*self.objects.values()]:
            owner = names.controller_of(body)
            if owner is not None and owner["uid"] not in uids:
                self.remove(body)

    def control_jobs(self) -> None:
        """One round of the Job controller."""
        for job in self.all(JOB):
            pods = self.pods_of(job)
            alive = [pod for pod in pods if _phase(pod) in ("Pending", "Running")]
            failed = sum(_phase(pod) == "Failed" and _exit_code(pod) != 75 for pod in pods)
            if finished(job):
                continue
            job.setdefault("status", {})["failed"] = failed
            if job["spec"].get("suspend"):
                for pod in alive:
                    self.remove(pod)
            elif any(_phase(pod) == "Succeeded" for pod in pods):
                self.end(job, "Complete", "CompletionsReached", "")
            elif (final := next((pod for pod in pods if _exit_code(pod) in (64, 65, 85)), None)) is not None:
                code, name = _exit_code(final), final["metadata"]["name"]
                text = f"Container stage for pod {NAMESPACE}/{name} failed with exit code {code} matching FailJob rule"
                self.end(job, "Failed", "PodFailurePolicy", text)
            elif (
                sum(_phase(pod) == "Failed" and _exit_code(pod) not in (75, None) for pod in pods)
                > job["spec"]["backoffLimit"]
            ):
                self.end(job, "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
            elif not alive:
                self._add_pod(job)

    def end(self, job: Object, type: str, reason: str, message: str) -> None:
        """The Job controller ends a Job."""
        ended = {"type": type, "status": "True", "reason": reason, "message": message}
        job["status"]["conditions"] = [{**ended, "lastTransitionTime": _text(self.time)}]

    def _add_pod(self, job: Object) -> None:
        job.setdefault("status", {}).setdefault("startTime", _text(self.time))
        self.add(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"{job['metadata']['name']}-{next(self._numbers)}",
                    "labels": job["spec"]["template"]["metadata"]["labels"],
                    "ownerReferences": [names.owner_reference(job)],
                },
                "spec": copy.deepcopy(job["spec"]["template"]["spec"]),
                "status": {"phase": "Pending"},
            }
        )

    def pods_of(self, job: Object) -> Objects:
        uid = job["metadata"]["uid"]
        return [pod for pod in self.all(POD) if (names.controller_of(pod) or {}).get("uid") == uid]

    # --- the kubelet -------------------------------------------------------------------------------------------------

    def pods(self, phase: str) -> Objects:
        return [pod for pod in self.all(POD) if _phase(pod) == phase]

    def start(self, pod: Object) -> None:
        """The container of a pod starts."""
        others = [other for other in self.pods("Running") if run_of(other) == run_of(pod)]
        assert not others, f"two pods write the output of {run_of(pod)}"
        name = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == "config")["configMap"]["name"]
        config_map = self.objects.get((CONFIG_MAP, name))
        if config_map is None:
            return  # the kubelet waits for it
        StageConfig.model_validate_json(config_map["data"]["config.json"])
        pod["spec"]["nodeName"] = "node-1"
        running = {"name": "stage", "state": {"running": {"startedAt": _text(self.time)}}}
        pod["status"] = {"phase": "Running", "containerStatuses": [running]}

    def finish(self, pod: Object) -> None:
        """The stage of a running pod ends well: it finds its output, or makes it."""
        run = run_of(pod)
        if run not in self.volume:
            self.work[run] += 1
            self.volume[run] = self._make(run)
        self.stop(pod, code=0, message=self.volume[run].to_message())

    def stop(self, pod: Object, *, code: int, message: str = "", **status: Any) -> None:
        """The container of a pod ends. One that is being deleted is gone then."""
        ended = {
            "exitCode": code,
            "message": message,
            "startedAt": _text(self.time),
            "finishedAt": _text(self.time),
            "reason": "Completed" if code == 0 else "Error",
        }
        pod["status"] = {
            "phase": "Succeeded" if code == 0 else "Failed",
            "containerStatuses": [{"name": "stage", "state": {"terminated": ended}}],
            **status,
        }
        if pod["metadata"].get("deletionTimestamp"):
            self._forget(pod)

    def _make(self, run: Run) -> Outcome:
        stage, hash = run
        digest = self.digests.get(stage, "sha256:" + hashlib.sha256(f"{stage} {hash}".encode()).hexdigest())
        metrics: dict[str, float] = {}
        if stage.startswith("evaluate"):
            metrics = {"accuracy": 0.5 if stage == "evaluate-base" else 0.8, "samples": 40.0}
        if stage == "train":
            metrics = {"loss": 0.25}
        return Outcome(stage=stage, hash=hash, digest=digest, size_bytes=10, seconds=3.0, metrics=metrics)

    async def step(self) -> None:
        """Everything that can happen happens once, and goes well."""
        self.collect()
        for pod in self.all(POD):
            if pod["metadata"].get("deletionTimestamp"):
                self.stop(pod, code=75)
        self.control_jobs()
        for pod in self.pods("Pending"):
            self.start(pod)
        for pod in self.pods("Running"):
            self.finish(pod)
        self.control_jobs()
        await self.reconcile()

    async def settle(self, *, steps: int = 60) -> None:
        """Everything goes well from here on, until nothing changes any more."""
        for _ in range(steps):
            before = copy.deepcopy(self.objects)
            await self.step()
            if self.objects == before:
                return
        raise AssertionError("it does not come to rest")


def run_of(body: Object) -> Run:
    return body["metadata"]["labels"][names.STAGE], body["metadata"]["labels"][names.HASH]


def finished(job: Object) -> bool:
    return any(item["type"] in ("Complete", "Failed") for item in job.get("status", {}).get("conditions", []))


def claims(world: World) -> Objects:
    return [body for body in world.all(CLAIM) if names.FINETUNE in _labels(body)]


def _labels(body: Object) -> dict[str, str]:
    return body["metadata"].get("labels") or {}


def _phase(pod: Object) -> str:
    return pod.get("status", {}).get("phase", "Pending")


def _exit_code(pod: Object) -> int | None:
    for status in pod.get("status", {}).get("containerStatuses", []):
        code = status["state"].get("terminated", {}).get("exitCode")
        return None if code is None else int(code)
    return None


def _merge(live: Object, patch: Mapping[str, Any]) -> None:
    for key, value in patch.items():
        if value is None:
            live.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(live.get(key), dict):
            _merge(live[key], value)
        elif isinstance(value, Mapping):
            live[key] = {}
            _merge(live[key], value)
        else:
            live[key] = copy.deepcopy(value)


def _text(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
