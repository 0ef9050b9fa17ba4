"""The operator's configuration file: what it means, and what a platform team reads when it is wrong."""

from typing import Any

import pytest
import yaml

from tuneserve.config import ConfigError, OperatorConfig, ProfileError, parse_config

IMAGES = {"trainer": "trainer:1", "server": "server:1"}
GPU: dict[str, Any] = {"name": "gpu", "default": True, "images": IMAGES}
CPU: dict[str, Any] = {"name": "cpu", "device": "cpu", "images": IMAGES}


def parse(*profiles: dict[str, Any], **settings: Any) -> OperatorConfig:
    return parse_config(yaml.safe_dump({"profiles": list(profiles), **settings}))


def test_little_must_be_written() -> None:
    config = parse(GPU)
    profile = config.profile(name=None, namespace="any")
    assert (profile.device, profile.resource) == ("cuda", "nvidia.com/gpu")
    assert config.leader_election.enabled
    assert (config.progress_interval_seconds, config.watch_namespaces) == (15, ())
    assert config.hub.endpoint is None


def test_numbers_are_quantities_too() -> None:
    profile = parse({**GPU, "resources": {"train": {"requests": {"cpu": 2, "memory": "8Gi"}}}}).profiles[0]
    assert profile.resources.train.requests == {"cpu": "2", "memory": "8Gi"}


def test_the_endpoint_of_the_hub_is_a_base() -> None:
    assert parse(GPU, hub={"endpoint": "https://hub.example/"}).hub.endpoint == "https://hub.example"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("profiles: [", "the configuration is not valid YAML"),
        ("- 1", "configuration: Input should be a valid dictionary"),
        ("", "profiles: Field required"),
        ("profiles: []", "exactly one profile must have default: true, but found none"),
    ],
)
def test_a_wrong_document_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config(text)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("profiles", "settings", "sentence"),
    [
        ([{**GPU, "devise": "cuda"}], {}, "profiles[0].devise: Extra inputs are not permitted"),
        ([{**GPU, "device": "tpu"}], {}, "profiles[0].device: Input should be 'cuda' or 'cpu'"),
        ([{"name": "gpu", "default": True}], {}, "profiles[0].images: Field required"),
        ([GPU, {**CPU, "default": True}], {}, "exactly one profile must have default: true, but found gpu, cpu"),
        ([GPU, {**CPU, "name": "gpu"}], {}, "profiles must have different names, but gpu occurs more than once"),
        (
            [GPU, {**CPU, "memory": "8Gi"}],
            {},
            "profiles[1]: memory must be left out for device cpu: it describes a GPU",
        ),
        ([{**GPU, "computeCapability": 8.9}], {}, "profiles[0].computeCapability: Input should be a valid string"),
        (
            [{**GPU, "resources": {"train": {"requests": {"cpu": "lots"}}}}],
            {},
            "profiles[0].resources.train.requests.cpu: String should match pattern",
        ),
        ([GPU], {"worker": 2}, "worker: Extra inputs are not permitted"),
        ([GPU], {"workers": 0}, "workers: Input should be greater than or equal to 1"),
        (
            [GPU],
            {"hub": {"endpoint": "hub.example"}},
            "hub.endpoint: must be a URL that starts with http:// or https://",
        ),
        (
            [GPU],
            {"leaderElection": {"renewSeconds": 20}},
            "leaderElection: must have leaseSeconds > renewSeconds > retrySeconds, such as 15, 10 and 2",
        ),
    ],
)
def test_a_wrong_field_is_named(profiles: list[dict[str, Any]], settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(*profiles, **settings)
    assert sentence in str(refusal.value).splitlines()[1]


def test_a_profile_is_found_by_name_or_by_default() -> None:
    config = parse(GPU, CPU)
    assert config.profile(name="cpu", namespace="any").name == "cpu"
    assert config.profile(name=None, namespace="any").name == "gpu"


def test_a_profile_of_other_namespaces_is_not_offered() -> None:
    config = parse({**GPU, "namespaces": ["research"]}, CPU)
    assert config.profile(name="gpu", namespace="research").name == "gpu"
    for wanted, words in (("gpu", "profile gpu"), (None, "a default profile")):
        with pytest.raises(ProfileError) as refusal:
            config.profile(name=wanted, namespace="sales")
        assert str(refusal.value) == (
            f"{words} is not offered to namespace sales; set accelerator.profile to one of: cpu"
        )
