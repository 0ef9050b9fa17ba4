"""The door to the API server, against a real one."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from support.kubectl import Kubectl
from tuneserve import names
from tuneserve.config import LeaderElection
from tuneserve.events import Events
from tuneserve.kinds import CONFIG_MAP, EVENT, FINETUNE, MODELSERVE, NODE, POD
from tuneserve.kube import ConflictError, Kube, KubeError
from tuneserve.leader import Leader, LeaseLostError

pytestmark = pytest.mark.controlplane


@pytest_asyncio.fixture
async def kube(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kube]:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    kube = await Kube.login()
    yield kube
    await kube.close()


def config_map(kubectl: Kubectl, name: str = "settings", **data: str) -> dict[str, Any]:
    labels = names.finetune_labels(finetune="x", component="train")
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": kubectl.namespace, "labels": labels},
        "data": data,
    }


async def test_apply_makes_changes_and_leaves_alone(kube: Kube, kubectl: Kubectl) -> None:
    made = await kube.apply(config_map(kubectl, a="1", b="2"))
    again = await kube.apply(config_map(kubectl, a="1", b="2"))
    assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    [field] = made["metadata"]["managedFields"]
    assert (field["manager"], field["operation"]) == ("tuneserve", "Apply")

    changed = await kube.apply(config_map(kubectl, a="3"))
    assert changed["data"] == {"a": "3"}, "what is no longer wanted goes"
    assert changed["metadata"]["uid"] == made["metadata"]["uid"]


async def test_apply_repairs_an_edit_and_keeps_what_others_added(kube: Kube, kubectl: Kubectl) -> None:
    await kube.apply(config_map(kubectl, a="1"))
    kubectl.patch("configmap", "settings", {"data": {"a": "edited", "theirs": "kept"}})
    repaired = await kube.apply(config_map(kubectl, a="1"))
    assert repaired["data"] == {"a": "1", "theirs": "kept"}


async def test_apply_refuses_the_object_of_a_user(kube: Kube, kubectl: Kubectl) -> None:
    kubectl.run("create", "configmap", "settings", "--from-literal=a=mine")
    with pytest.raises(ConflictError, match="not made by TuneServe"):
        await kube.apply(config_map(kubectl, a="1"))
    found = await kube.get(CONFIG_MAP, kubectl.namespace, "settings")
    assert found is not None and found["data"] == {"a": "mine"}


async def test_many_writers_of_one_object_all_succeed(kube: Kube, kubectl: Kubectl) -> None:
    await kube.apply(config_map(kubectl, a="0"))
    await asyncio.gather(*(kube.apply(config_map(kubectl, a=str(number))) for number in range(4)))
    found = await kube.get(CONFIG_MAP, kubectl.namespace, "settings")
    assert found is not None and found["data"]["a"] in {"0", "1", "2", "3"}


async def test_what_is_not_there_is_none_and_its_deletion_fine(kube: Kube, kubectl: Kubectl) -> None:
    assert await kube.get(POD, kubectl.namespace, "nobody") is None
    await kube.delete(POD, kubectl.namespace, "nobody")


async def test_a_deletion_with_a_uid_spares_a_successor(kube: Kube, kubectl: Kubectl) -> None:
    old = await kube.apply(config_map(kubectl, a="1"))
    await kube.delete(CONFIG_MAP, kubectl.namespace, "settings", uid=old["metadata"]["uid"])
    assert await kube.get(CONFIG_MAP, kubectl.namespace, "settings") is None
    await kube.apply(config_map(kubectl, a="2"))
    await kube.delete(CONFIG_MAP, kubectl.namespace, "settings", uid=old["metadata"]["uid"])
    assert await kube.get(CONFIG_MAP, kubectl.namespace, "settings") is not None


async def test_a_list_is_complete_typed_and_selected(
    kube: Kube, kubectl: Kubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneserve.kube._PAGE", 2)
    for number in range(5):
        await kube.apply(config_map(kubectl, f"c{number}"))
    kubectl.run("create", "configmap", "other")
    found = await kube.list(CONFIG_MAP, kubectl.namespace, names.finetune_selector("x"))
    assert [body["metadata"]["name"] for body in found] == [f"c{number}" for number in range(5)]
    assert {(body["apiVersion"], body["kind"]) for body in found} == {("v1", "ConfigMap")}
    assert len(await kube.list(NODE)) == 3
    assert await kube.list(FINETUNE, kubectl.namespace) == []


@pytest.mark.usefixtures("no_operator")
async def test_a_status_is_written_whole_and_only_to_the_object_that_was_seen(kube: Kube, kubectl: Kubectl) -> None:
    spec = {"model": {"claim": {"name": "none"}}, "accelerator": {"profile": "unknown"}}
    body = {"apiVersion": "tuneserve.dev/v1alpha1", "kind": "ModelServe", "metadata": {"name": "y"}, "spec": spec}
    kubectl.apply(body)
    seen = await kube.get(MODELSERVE, kubectl.namespace, "y")
    assert seen is not None

    async def write(status: dict[str, Any], *, seen: dict[str, Any]) -> dict[str, Any]:
        version = seen["metadata"]["resourceVersion"]
        return await kube.patch_status(MODELSERVE, kubectl.namespace, "y", status, resource_version=version)

    first = await write({"url": "http://a", "replicas": 1}, seen=seen)
    second = await write({"url": "http://b"}, seen=first)
    assert second["status"] == {"url": "http://b"}
    with pytest.raises(KubeError) as stale:
        await write({"url": "http://c"}, seen=first)
    assert stale.value.status == 409
    kubectl.delete("mserve", "y")
    kubectl.apply(body)
    with pytest.raises(KubeError) as other:
        await write({"url": "http://c"}, seen=second)
    assert other.value.status == 409


async def test_a_refusal_has_the_servers_own_sentence(kube: Kube, kubectl: Kubectl) -> None:
    body = {"apiVersion": "tuneserve.dev/v1alpha1", "kind": "ModelServe", "spec": {"model": {}}}
    with pytest.raises(KubeError, match="must set exactly one of fineTune and claim") as refusal:
        await kube.create({**body, "metadata": {"name": "y", "namespace": kubectl.namespace}})
    assert (refusal.value.status, refusal.value.reason) == (422, "Invalid")


def _config(kubeconfig: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(kubeconfig.read_text()))


async def test_an_api_server_that_is_away_is_an_error_after_some_tries(
    kubeconfig: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(kubeconfig)
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr("tuneserve.kube.FIRST_DELAY", 0.01)
    kube = await Kube.login()
    try:
        with pytest.raises(KubeError, match="did not answer") as away:
            await kube.get(POD, "default", "x")
        assert away.value.status == 0
    finally:
        await kube.close()


async def test_a_token_that_was_replaced_is_read_again(
    kubeconfig: Path, kubectl: Kubectl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expired token gives 401; the one that is in the file by then works."""
    kubectl.run("create", "serviceaccount", "reader")
    kubectl.run("create", "rolebinding", "reader", "--clusterrole=view", f"--serviceaccount={kubectl.namespace}:reader")
    config = _config(kubeconfig)
    path = tmp_path / "kubeconfig"

    def write(token: str) -> None:
        user = {"name": config["users"][0]["name"], "user": {"token": token}}
        path.write_text(yaml.safe_dump({**config, "users": [user]}))

    def encoded(part: dict[str, str]) -> str:
        return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")

    write(f"{encoded({'alg': 'RS256'})}.{encoded({'sub': 'nobody'})}.c2ln")
    monkeypatch.setenv("KUBECONFIG", str(path))
    kube = await Kube.login()
    try:
        with pytest.raises(KubeError) as refused:
            await kube.list(POD, kubectl.namespace)
        assert refused.value.status == 401
        write(kubectl.run("create", "token", "reader").strip())
        assert await kube.list(POD, kubectl.namespace) == []
    finally:
        await kube.close()


async def test_an_event_that_happens_again_is_counted(kube: Kube, kubectl: Kubectl) -> None:
    subject = await kube.apply(config_map(kubectl, a="1"))
    events = Events(kube, instance="test")
    for _ in range(3):
        await events.emit(subject, type="Warning", reason="TestHappened", message="m", action="Test")
    await events.emit(subject, type="Warning", reason="TestHappened", message="other" * 500, action="Test")
    found = [event for event in await kube.list(EVENT, kubectl.namespace) if event["reason"] == "TestHappened"]
    assert sorted((event.get("series") or {}).get("count", 1) for event in found) == [1, 3]
    assert {event["regarding"]["uid"] for event in found} == {subject["metadata"]["uid"]}


async def test_an_event_that_cannot_be_written_disturbs_nobody(kube: Kube, kubectl: Kubectl) -> None:
    subject = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "no-such-namespace"}}
    await Events(kube, instance="test").emit(subject, type="Normal", reason="R", message="m", action="Test")


# --- the lease --------------------------------------------------------------------------------------------------------


def _leader(kube: Kube, kubectl: Kubectl, identity: str) -> Leader:
    settings = LeaderElection(lease_name="test", lease_seconds=3, renew_seconds=2, retry_seconds=1)
    return Leader(kube, settings=settings, namespace=kubectl.namespace, identity=identity)


def _holder(kubectl: Kubectl) -> str:
    lease = kubectl.get("lease", "test")
    assert lease is not None
    return str(lease["spec"].get("holderIdentity", ""))


async def test_a_lease_has_one_holder_until_it_is_released(kube: Kube, kubectl: Kubectl) -> None:
    one, two = _leader(kube, kubectl, "one"), _leader(kube, kubectl, "two")
    await one.acquire()
    holding, waiting = asyncio.create_task(one.hold()), asyncio.create_task(two.acquire())
    await asyncio.sleep(5)  # longer than the lease: it is renewed
    assert not waiting.done() and not holding.done()
    assert _holder(kubectl) == "one"
    holding.cancel()
    await one.release()
    async with asyncio.timeout(30):
        await waiting
    assert _holder(kubectl) == "two"


async def test_a_lease_that_is_not_renewed_is_taken_over_and_its_holder_gives_up(kube: Kube, kubectl: Kubectl) -> None:
    one, two = _leader(kube, kubectl, "one"), _leader(kube, kubectl, "two")
    await one.acquire()
    async with asyncio.timeout(30):
        await two.acquire()
    assert _holder(kubectl) == "two"
    with pytest.raises(LeaseLostError):
        async with asyncio.timeout(30):
            await one.hold()
    await one.release()
    assert _holder(kubectl) == "two", "what is not ours is not released"
    lease = kubectl.get("lease", "test")
    assert lease is not None and lease["spec"]["leaseTransitions"] == 1


async def test_candidates_that_start_together_get_one_leader(kube: Kube, kubectl: Kubectl) -> None:
    candidates = [asyncio.create_task(_leader(kube, kubectl, f"c{number}").acquire()) for number in range(5)]
    done, pending = await asyncio.wait(candidates, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    for task in pending:
        task.cancel()
