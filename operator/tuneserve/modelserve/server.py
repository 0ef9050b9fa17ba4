"""The inference server as a container: arguments, environment, probes and drain of vLLM. Pure.

One start-up budget feeds the startup probe, the engine's own limit and the deadline of the rollout, or the shortest
of them would kill a model that is only slow to load.
"""

from collections.abc import Mapping
from typing import Any

from tuneserve.api import DataType, ModelServe, ServedVersion
from tuneserve.config import Profile
from tuneserve.podsecurity import container_security_context, scratch_volume

CONTAINER = "server"
PORT = 8000
PORT_NAME = "http"
MODEL_PATH = "/model"
CHAT_TEMPLATE = "chat_template.jinja"
HEALTH_PATH = "/health"
"""Open while a key guards `/v1`, and answers only when the model is loaded."""

#: Longest time from the start of the container to the first answer (seconds): a large model from a slow disk.
STARTUP_SECONDS = 1800
_STARTUP_PERIOD = 5
#: Longest time for a rollout to make a step (seconds): start-up, scheduling and the pull of an image before it.
PROGRESS_SECONDS = STARTUP_SECONDS + 600

#: A pod that ends leaves the endpoints first: while vLLM drains it refuses new requests with an error 500.
PRE_STOP_SECONDS = 10
#: Then the requests that it took may finish (seconds).
DRAIN_SECONDS = 120
_MARGIN_SECONDS = 15
GRACE_SECONDS = PRE_STOP_SECONDS + DRAIN_SECONDS + _MARGIN_SECONDS

_CACHE_PATH = "/cache"
_DTYPES = {DataType.BFLOAT16: "bfloat16", DataType.FLOAT16: "float16", DataType.FLOAT32: "float32"}


def container(*, modelserve: ModelServe, version: ServedVersion, profile: Profile) -> dict[str, Any]:
    return {
        "name": CONTAINER,
        "image": profile.images.server,
        "imagePullPolicy": profile.image_pull_policy,
        "args": arguments(modelserve=modelserve, version=version, profile=profile),
        "env": _environment(profile),
        "ports": [{"name": PORT_NAME, "containerPort": PORT}],
        "resources": _resources(modelserve=modelserve, profile=profile),
        "securityContext": container_security_context(),
        # The last lines of the log are the only place where the engine says why it ended.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "startupProbe": _probe(period=_STARTUP_PERIOD, failures=STARTUP_SECONDS // _STARTUP_PERIOD),
        # A busy machine answers late; one late answer must not take the only replica out. There is no liveness
        # probe: an engine that dies ends its process by itself, and one that is busy must not be killed.
        "readinessProbe": _probe(period=5, failures=3),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        "volumeMounts": [
            _model_mount(version),
            {"name": "cache", "mountPath": _CACHE_PATH},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def volumes(version: ServedVersion) -> list[dict[str, Any]]:
    return [
        {"name": "model", "persistentVolumeClaim": {"claimName": version.claim, "readOnly": True}},
        scratch_volume("cache"),
        scratch_volume("tmp"),
        scratch_volume("shm", size="2Gi", memory=True),
    ]


def arguments(*, modelserve: ModelServe, version: ServedVersion, profile: Profile) -> list[str]:
    """Arguments after `vllm serve`; those of the profile come before the user's, and the last one counts."""
    engine = modelserve.spec.engine
    model = _model_directory(version)
    args = [
        model,
        *("--served-model-name", modelserve.spec.served_name or modelserve.metadata.name),
        *("--host", "0.0.0.0"),
        *("--port", str(PORT)),
        *("--shutdown-timeout", str(DRAIN_SECONDS)),
        *("--disable-access-log-for-endpoints", f"{HEALTH_PATH},/metrics"),
    ]
    if _is_artifact(version):
        # The template that the model was trained and evaluated with, whatever the tokenizer's own files say.
        args += ["--chat-template", f"{model}/{CHAT_TEMPLATE}"]
    args += profile.server_args
    args += ["--max-model-len", "auto" if engine.max_model_length is None else str(engine.max_model_length)]
    if profile.device == "cuda":
        args += ["--gpu-memory-utilization", engine.gpu_memory_utilization]
        if modelserve.spec.accelerator.count > 1:
            args += ["--tensor-parallel-size", str(modelserve.spec.accelerator.count)]
    if engine.dtype != DataType.AUTO:
        args += ["--dtype", _DTYPES[engine.dtype]]
    if engine.max_sequences is not None:
        args += ["--max-num-seqs", str(engine.max_sequences)]
    return args


def _is_artifact(version: ServedVersion) -> bool:
    return version.version is not None


def _model_directory(version: ServedVersion) -> str:
    if _is_artifact(version) or not version.path:
        return MODEL_PATH
    return f"{MODEL_PATH}/{version.path}"


def _model_mount(version: ServedVersion) -> dict[str, Any]:
    mount: dict[str, Any] = {"name": "model", "mountPath": MODEL_PATH, "readOnly": True}
    if _is_artifact(version):
        # Only this version, and nothing else of the claim. A path that a user mistyped must not be a subPath:
        # the kubelet would make that directory.
        mount["subPath"] = version.path
    return mount


def _environment(profile: Profile) -> list[dict[str, str]]:
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(STARTUP_SECONDS),
        # The root file system is read-only: everything that is compiled or cached goes here.
        "HOME": _CACHE_PATH,
        "XDG_CACHE_HOME": _CACHE_PATH,
        "XDG_CONFIG_HOME": f"{_CACHE_PATH}/config",
        "VLLM_CACHE_ROOT": f"{_CACHE_PATH}/vllm",
        "TORCHINDUCTOR_CACHE_DIR": f"{_CACHE_PATH}/inductor",
        "TRITON_CACHE_DIR": f"{_CACHE_PATH}/triton",
    }
    env |= {variable.name: variable.value for variable in profile.server_env}
    return [{"name": name, "value": value} for name, value in env.items()]


def _resources(*, modelserve: ModelServe, profile: Profile) -> dict[str, dict[str, str]]:
    gpus = {profile.resource: str(modelserve.spec.accelerator.count)} if profile.resource is not None else {}
    wanted: Mapping[str, dict[str, str]] = {
        "requests": {**profile.resources.server.requests, **gpus},
        "limits": {**profile.resources.server.limits, **gpus},
    }
    return {name: amounts for name, amounts in wanted.items() if amounts}


def _probe(*, period: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": HEALTH_PATH, "port": PORT_NAME},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": 10,
    }
