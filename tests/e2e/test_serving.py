"""A trained model behind the OpenAI API: the right answers, in a stream, through a rollout without a failed request."""

import threading
from dataclasses import dataclass, field

import httpx
import openai

from support.finetunes import artifact, finetune, modelserve, training
from support.installation import STARTED, TRAINED
from support.kubectl import Kubectl, condition, is_true


def client(kubectl: Kubectl, name: str) -> openai.OpenAI:
    """A client of the Service's cluster address, which this machine reaches."""
    service = kubectl.get("service", name)
    assert service is not None
    return openai.OpenAI(base_url=f"http://{service['spec']['clusterIP']}/v1", api_key="none", max_retries=0)


@dataclass
class Load:
    """One stream after another until told to stop; every failure is kept."""

    client: openai.OpenAI
    model: str
    stop: threading.Event = field(default_factory=threading.Event)
    finished: int = 0
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        # A pause, or the old server takes the two cores that the new one needs to start.
        while not self.stop.wait(0.3):
            try:
                stream = self.client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": "the film was lovely"}],
                    max_tokens=32,
                    stream=True,
                    timeout=60,
                    extra_body={"ignore_eos": True},
                )
                reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
                if reasons[-1:] != ["length"]:
                    self.failures.append(f"a stream ended with {reasons[-1:]}")
                self.finished += 1
            except (openai.OpenAIError, httpx.HTTPError) as error:
                self.failures.append(repr(error))


def test_the_served_model_streams_and_a_new_version_rolls_out_without_a_failed_request(kubectl: Kubectl) -> None:
    kubectl.apply(finetune("served"))
    trained = kubectl.wait("finetune", "served", is_true("Ready"), timeout=TRAINED)
    kubectl.apply(modelserve("served", finetune="served"))
    serving = kubectl.wait("modelserve", "served", is_true("Ready"), timeout=STARTED)
    first = serving["status"]["served"]["version"]
    assert first == artifact(trained, "merged")["version"]
    assert serving["status"]["readyReplicas"] == 1
    assert serving["status"]["url"] == f"http://served.{kubectl.namespace}.svc/v1"

    api = client(kubectl, "served")
    assert [model.id for model in api.models.list()] == ["served"]
    load = Load(client=api, model="served")
    thread = threading.Thread(target=load.run)
    thread.start()
    try:
        kubectl.apply(finetune("served", training=training(steps=4, learningRate="2e-3")))
        rolled = kubectl.wait(
            "modelserve",
            "served",
            lambda found: is_true("Ready")(found) and found["status"]["served"]["version"] != first,
            timeout=TRAINED + STARTED,
        )
        kubectl.wait_gone("pods", selector="pod-template-hash=" + old_hash(kubectl, first), timeout=180)
    finally:
        load.stop.set()
        thread.join(timeout=90)
    assert load.failures == []
    assert load.finished > 20
    assert condition(rolled, "Available")["status"] == "True"

    # It serves on without its FineTune.
    kubectl.delete("finetune", "served")
    answer = api.chat.completions.create(
        model="served", messages=[{"role": "user", "content": "the film was lovely"}], max_tokens=4
    )
    assert answer.choices[0].message.content is not None


def old_hash(kubectl: Kubectl, version: str) -> str:
    """The pod-template-hash of the ReplicaSet that served a version."""
    for item in kubectl.list("replicasets"):
        if version in str(item["spec"]["template"]):
            return str(item["metadata"]["labels"]["pod-template-hash"])
    raise AssertionError(f"no ReplicaSet of version {version}")
