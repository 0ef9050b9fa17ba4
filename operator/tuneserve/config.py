"""What the platform team tells the operator: profiles of machines, the hub, and how it runs.

The chart renders it as YAML; `parse_config` turns its text into types. It reads no file and asks no server, and
unlike the API it refuses fields that it does not know: a mistyped setting must not go unnoticed.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

DEFAULT_GPU_RESOURCE = "nvidia.com/gpu"


class ConfigError(Exception):
    """The configuration cannot be used; the message has one line for each field that is wrong."""


class ProfileError(Exception):
    """No profile can be had as asked; the message says which ones there are."""


class Setting(BaseModel):
    """Base of all settings: camelCase in the file, immutable, and an unknown field is an error."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )


def _to_text(value: object) -> object:
    """YAML reads `cpu: 2` as a number; a quantity is text."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _http_url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must be a URL that starts with http:// or https://")
    return value.rstrip("/")


Text = Annotated[str, Field(min_length=1)]
DnsLabel = Annotated[str, Field(pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, BeforeValidator(_to_text), Field(pattern="^[0-9]+([.][0-9]+)?([KMGTPE]i|[mkMGTPE])?$")]
Url = Annotated[str, AfterValidator(_http_url)]
PullPolicy = Literal["Always", "IfNotPresent", "Never"]


class Resources(Setting):
    """Resources of one container, in Kubernetes quantities. The GPUs are added by the operator."""

    requests: Mapping[str, Quantity] = Field(default_factory=dict)
    limits: Mapping[str, Quantity] = Field(default_factory=dict)


class WorkloadResources(Setting):
    """Resources by what runs: the kinds of stages, and the server."""

    prepare: Resources = Resources(requests={"cpu": "500m", "memory": "1Gi"})
    train: Resources = Resources(requests={"cpu": "1", "memory": "4Gi"})
    merge: Resources = Resources(requests={"cpu": "500m", "memory": "2Gi"})
    evaluate: Resources = Resources(requests={"cpu": "1", "memory": "4Gi"})
    server: Resources = Resources(requests={"cpu": "1", "memory": "4Gi"})


class Images(Setting):
    """Container images of a profile, as full references."""

    trainer: Text
    server: Text


class Toleration(Setting):
    """A toleration of the pods of a profile, as in a pod."""

    key: str | None = None
    operator: Literal["Exists", "Equal", "Lt", "Gt"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None


class EnvironmentVariable(Setting):
    name: Text
    value: Annotated[str, BeforeValidator(_to_text)] = ""


class Profile(Setting):
    """A kind of machine that users choose by name."""

    name: DnsLabel
    default: bool = False
    """Whether objects that name no profile get this one."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where a model is trained and evaluated; in a cpu profile nothing asks for a GPU."""
    resource: Text | None = None
    """Extended resource that stands for one GPU; for cuda `nvidia.com/gpu` unless given."""
    memory: Quantity | None = None
    """Memory of one GPU."""
    compute_capability: Annotated[str, Field(pattern="^[0-9]+[.][0-9]+$")] | None = None
    """CUDA compute capability, in quotes, such as "8.9"."""
    node_selector: Mapping[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    runtime_class_name: Text | None = None
    images: Images
    image_pull_policy: PullPolicy = "IfNotPresent"
    namespaces: tuple[DnsLabel, ...] = ()
    """Namespaces that may use the profile; none: all."""
    resources: WorkloadResources = WorkloadResources()
    server_args: tuple[str, ...] = ()
    """Arguments of the inference engine on these machines, before those of the ModelServe."""
    server_env: tuple[EnvironmentVariable, ...] = ()
    """Environment of the inference engine on these machines."""

    @model_validator(mode="before")
    @classmethod
    def _gpu_has_a_resource(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("device", "cuda") == "cuda" and not data.get("resource"):
            return {**data, "resource": DEFAULT_GPU_RESOURCE}
        return data

    @model_validator(mode="after")
    def _cpu_has_no_gpu(self) -> Self:
        if self.device == "cpu":
            for field in ("resource", "memory", "compute_capability"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{to_camel(field)} must be left out for device cpu: it describes a GPU")
        return self


class Hub(Setting):
    """A Hugging Face-compatible hub."""

    endpoint: Url | None = None
    """Base URL; none: the public hub."""


class ArtifactsClaim(Setting):
    """The claim of a FineTune that does not say otherwise."""

    size: Quantity = "40Gi"
    storage_class: Text | None = None
    """None: the default class of the cluster."""
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany"] = "ReadWriteOnce"


class LeaderElection(Setting):
    """A Lease lets one of several operators act; seconds as in other controllers."""

    enabled: bool = True
    lease_name: DnsLabel = "tuneserve-operator"
    lease_seconds: Annotated[int, Field(ge=3, le=600)] = 15
    """A lease that is not renewed for so long is free to be taken."""
    renew_seconds: Annotated[int, Field(ge=2, le=599)] = 10
    """A leader that could not renew for so long gives up."""
    retry_seconds: Annotated[int, Field(ge=1, le=300)] = 2
    """Time between two tries."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.lease_seconds > self.renew_seconds > self.retry_seconds:
            raise ValueError("must have leaseSeconds > renewSeconds > retrySeconds, such as 15, 10 and 2")
        return self


class OperatorConfig(Setting):
    """Everything that the operator is told."""

    profiles: tuple[Profile, ...]
    hub: Hub = Hub()
    artifacts: ArtifactsClaim = ArtifactsClaim()
    leader_election: LeaderElection = LeaderElection()
    watch_namespaces: tuple[DnsLabel, ...] = ()
    """Namespaces whose objects the operator looks after; none: all."""
    workers: Annotated[int, Field(ge=1, le=64)] = 8
    """Objects reconciled at the same time."""
    progress_interval_seconds: Annotated[int, Field(ge=1, le=3600)] = 15
    """Time between two looks at the progress of a running stage, and so between two writes of it."""
    resync_seconds: Annotated[int, Field(ge=10, le=86_400)] = 600
    """Every object is looked at again after so long, even if nothing seems to have happened."""

    @model_validator(mode="after")
    def _profiles_can_be_told_apart(self) -> Self:
        names = [profile.name for profile in self.profiles]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"profiles must have different names, but {', '.join(twice)} occurs more than once")
        defaults = [profile.name for profile in self.profiles if profile.default]
        if len(defaults) != 1:
            found = ", ".join(defaults) or "none"
            raise ValueError(f"exactly one profile must have default: true, but found {found}")
        return self

    def profile(self, *, name: str | None, namespace: str) -> Profile:
        """The profile that an object of `namespace` gets when it names `name`, or none.

        Raises:
            ProfileError: It does not exist, or not for that namespace; the message is meant for the user.
        """
        offered = [profile for profile in self.profiles if not profile.namespaces or namespace in profile.namespaces]
        for profile in offered:
            if profile.name == name or (name is None and profile.default):
                return profile
        names = ", ".join(profile.name for profile in offered) or "none"
        wanted = f"profile {name}" if name else "a default profile"
        raise ProfileError(
            f"{wanted} is not offered to namespace {namespace}; set accelerator.profile to one of: {names}"
        )


def parse_config(text: str) -> OperatorConfig:
    """The configuration in YAML (or JSON) `text`.

    Raises:
        ConfigError: It is no YAML, or a field is wrong; the message names the field and what is expected.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration is not valid YAML: {error}") from error
    try:
        return OperatorConfig.model_validate(document if document is not None else {})
    except ValidationError as error:
        lines = [f"{_place(item['loc'])}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()]
        raise ConfigError("the configuration is wrong:\n" + "\n".join(lines)) from error


def _place(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".") or "configuration"
