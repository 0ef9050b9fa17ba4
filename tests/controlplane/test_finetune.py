"""FineTunes on a real API server with real controllers: what runs, what does not run again, and what a user reads."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from support.controlplane import claim
from support.finetunes import finetune, training
from support.kubectl import Kubectl, Object, condition, is_true, stage
from support.operators import OperatorProcess
from support.stage_player import Ending, StagePlayer, succeed
from tuneserve_pipeline.contract import ExitCode, Outcome, StageError
from tuneserve_pipeline.metrics import Progress, ProgressCollector, serve

pytestmark = pytest.mark.controlplane

OURS = "app.kubernetes.io/managed-by=tuneserve"
EXPORTS = [{"name": "merged", "format": "Merged"}, {"name": "adapter", "format": "Adapter"}]
ALL_STAGES = {"prepare", "train", "merge", "evaluate-base", "evaluate-adapter", "evaluate-merged"}


@pytest.fixture
def player(kubectl: Kubectl, operator: OperatorProcess) -> Iterator[StagePlayer]:
    """Stages succeed, unless the test changes the play; the claims that specs name are there."""
    kubectl.apply(claim("tiny"), claim("data"))
    with StagePlayer(kubectl) as playing:
        yield playing


def holding(*held: str) -> Any:
    """A play in which these stages go on running."""
    return lambda name, hash: None if name in held else succeed(name, hash)


def failing(name: str, code: int, error: StageError | None) -> Any:
    def play(stage: str, hash: str) -> Ending | None:
        if stage != name:
            return succeed(stage, hash)
        return code, Outcome(stage=stage, hash=hash, error=error) if error else None

    return play


def jobs(kubectl: Kubectl, name: str = "") -> dict[str, Object]:
    """Jobs of stages by their name."""
    selector = OURS + (f",tuneserve.dev/stage={name}" if name else "")
    return {job["metadata"]["name"]: job for job in kubectl.list("jobs", selector=selector)}


def stages_of(found: dict[str, Object]) -> list[str]:
    return sorted(job["metadata"]["labels"]["tuneserve.dev/stage"] for job in found.values())


def ready(kubectl: Kubectl, name: str = "life", *, timeout: float = 90) -> Object:
    return kubectl.wait("ftune", name, is_true("Ready"), timeout=timeout)


def stalled(kubectl: Kubectl, name: str = "life", *, reason: str, timeout: float = 60) -> str:
    """The message, once it is Stalled for that reason."""

    def check(found: Object) -> bool:
        seen = condition(found, "Stalled")
        return is_true("Stalled")(found) and seen["reason"] == reason

    return str(condition(kubectl.wait("ftune", name, check, timeout=timeout), "Stalled")["message"])


def running(name: str) -> Any:
    return lambda found: stage(found, name).get("state") == "Running"


def events(kubectl: Kubectl, name: str = "life") -> list[Object]:
    listed = json.loads(kubectl.run("get", "events.events.k8s.io", "-o", "json"))["items"]
    return [event for event in listed if event["regarding"]["name"] == name]


# --- the whole graph -------------------------------------------------------------------------------------------------


def test_the_whole_graph_runs_to_ready(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life", exports=EXPORTS, accelerator={"profile": "rtx-4090"}))
    found = ready(kubectl)
    status = found["status"]
    made = jobs(kubectl)
    assert set(stages_of(made)) == ALL_STAGES and len(made) == 6
    assert [seen["state"] for seen in status["stages"]] == ["Succeeded"] * 6
    assert status["observedGeneration"] == 1
    kinds = {"Ready": "True", "Reconciling": "False", "Stalled": "False"}
    milestones = dict.fromkeys(("DataValid", "Trained", "Exported", "Evaluated"), "True")
    assert {seen["type"]: seen["status"] for seen in status["conditions"]} == {**kinds, **milestones}
    assert condition(found, "DataValid")["message"] == "rows: 80 for training, 10 for validation, 10 for the test"
    assert condition(found, "Trained")["message"] == "40 steps, loss 0.4000, validation loss 0.5000"
    assert "merged: accuracy 0.9000 (base model 0.9000)" in condition(found, "Ready")["message"]

    merged, adapter = status["artifacts"]
    assert merged["path"] == f"merge/{merged['version']}/model" and merged["claim"] == "life-artifacts"
    assert adapter["path"] == f"train/{adapter['version']}/adapter"
    assert (merged["sizeBytes"], merged["verdict"]) == (1000, "Passed")
    assert merged["metrics"][0] == {"name": "accuracy", "value": "0.9000", "base": "0.9000"}
    assert status["resolved"] == {"datasetDigest": "sha256:data", "templateHash": "sha256:template"}
    assert {event["reason"] for event in events(kubectl)} >= {"StageStarted", "StageSucceeded", "Ready"}

    gpus = {
        job["metadata"]["labels"]["tuneserve.dev/stage"]
        for job in made.values()
        if "nvidia.com/gpu" in job["spec"]["template"]["spec"]["containers"][0]["resources"].get("limits", {})
    }
    assert gpus == {"train", "evaluate-base", "evaluate-adapter", "evaluate-merged"}
    artifacts = kubectl.get("pvc", "life-artifacts")
    assert artifacts is not None and "ownerReferences" not in artifacts["metadata"]
    assert artifacts["metadata"]["labels"]["tuneserve.dev/finetune"] == "life"


def test_its_columns_and_its_description_read_well(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life"))
    ready(kubectl)
    header, row = kubectl.run("get", "ftune", "life").splitlines()
    assert header.split()[:3] == ["NAME", "READY", "STAGE"]
    assert row.split()[:2] == ["life", "True"] and "0.9000" in row and "0.4000" in row
    described = kubectl.run("describe", "ftune", "life")
    assert "merged: accuracy 0.9000" in described and "StageSucceeded" in described


def test_parallel_branches_run_at_the_same_time(kubectl: Kubectl, player: StagePlayer) -> None:
    player.play = holding("train", "evaluate-base")
    kubectl.apply(finetune("life"))
    found = kubectl.wait("ftune", "life", lambda seen: running("train")(seen) and running("evaluate-base")(seen))
    assert condition(found, "Reconciling")["message"] == "train runs; evaluate-base runs"
    assert found["status"]["progress"]["stage"] == "train"
    player.play = succeed
    ready(kubectl)


def test_the_progress_of_a_running_stage_is_told(kubectl: Kubectl, player: StagePlayer) -> None:
    player.play = holding("train")
    kubectl.apply(finetune("life"))
    found = kubectl.wait("ftune", "life", running("train"))
    told = Progress()
    told.update(step=30, total=120, loss=1.5, tokens_per_second=512.0)
    collector = ProgressCollector(progress=told, stage="train", kind="train", hash=stage(found, "train")["hash"])
    server = serve(collector=collector, port=9400)
    assert server is not None, "port 9400 of this machine stands for that of the pod"
    (pod,) = kubectl.list("pods", selector="tuneserve.dev/stage=train")
    address = {"podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}
    kubectl.patch("pod", pod["metadata"]["name"], {"status": address}, subresource="status")
    try:
        found = kubectl.wait("ftune", "life", lambda seen: seen["status"].get("progress", {}).get("percent") == 25)
        assert found["status"]["progress"] == {
            "stage": "train",
            "percent": 25,
            "step": 30,
            "totalSteps": 120,
            "loss": "1.5000",
            "tokensPerSecond": "512.0",
        }
        assert kubectl.run("get", "ftune", "life").splitlines()[1].split()[1:5] == ["False", "train", "25", "1.5000"]
        told.update(step=60)
        kubectl.wait("ftune", "life", lambda seen: seen["status"]["progress"].get("percent") == 50)
    finally:
        server.shutdown()
        server.server_close()
    player.play = succeed
    assert ready(kubectl)["status"]["progress"] == {"loss": "0.4000"}


# --- nothing twice ---------------------------------------------------------------------------------------------------


def test_an_edit_of_the_learning_rate_trains_again_and_prepares_not(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life"))
    first = ready(kubectl)
    before = set(jobs(kubectl))
    player.play = holding("train")
    kubectl.apply(finetune("life", training=training(steps=4, learningRate="5e-4")))
    during = kubectl.wait("ftune", "life", running("train"))
    assert during["status"]["artifacts"] == first["status"]["artifacts"], "the old artifact stays meanwhile"
    assert condition(during, "Ready")["status"] == "False"
    player.play = succeed
    second = ready(kubectl)
    assert stages_of({name: job for name, job in jobs(kubectl).items() if name not in before}) == [
        "evaluate-merged",
        "merge",
        "train",
    ]
    assert stage(second, "prepare")["hash"] == stage(first, "prepare")["hash"]
    assert second["status"]["artifacts"][0]["version"] != first["status"]["artifacts"][0]["version"]
    kubectl.apply(finetune("life"))
    back = kubectl.wait("ftune", "life", lambda seen: seen["status"].get("artifacts") == first["status"]["artifacts"])
    assert condition(back, "Ready")["status"] == "True"
    assert len(player.ended) == len(set(player.ended)), "a stage ran twice"


def test_a_second_export_adds_only_its_stages(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life"))
    ready(kubectl)
    before = set(jobs(kubectl))
    kubectl.apply(finetune("life", exports=EXPORTS))
    found = ready(kubectl)
    assert stages_of({name: job for name, job in jobs(kubectl).items() if name not in before}) == ["evaluate-adapter"]
    assert [artifact["export"] for artifact in found["status"]["artifacts"]] == ["merged", "adapter"]
    kubectl.apply(finetune("life"))
    kubectl.wait("ftune", "life", lambda seen: len(seen["status"]["artifacts"]) == 1 and is_true("Ready")(seen))


def test_deleted_and_applied_again_it_is_ready_without_any_job(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life"))
    first = ready(kubectl)
    kubectl.delete("ftune", "life")
    kubectl.wait_gone("jobs,pods,configmaps", selector=OURS)
    assert [item["metadata"]["name"] for item in kubectl.list("pvc", selector=OURS)] == ["life-artifacts"]
    kubectl.apply(finetune("life"))
    again = ready(kubectl, timeout=10)
    assert again["status"]["artifacts"] == first["status"]["artifacts"]
    assert stage(again, "train")["completionTime"] == stage(first, "train")["completionTime"]
    assert jobs(kubectl) == {}


def test_deleted_in_the_middle_it_leaves_only_its_claim_and_then_goes_on(kubectl: Kubectl, player: StagePlayer) -> None:
    player.play = holding("train")
    kubectl.apply(finetune("life"))
    kubectl.wait("ftune", "life", running("train"))
    kubectl.delete("ftune", "life")
    kubectl.wait_gone("jobs,pods,configmaps", selector=OURS)
    assert [item["metadata"]["name"] for item in kubectl.list("pvc", selector=OURS)] == ["life-artifacts"]
    player.play = succeed
    kubectl.apply(finetune("life"))
    ready(kubectl)
    assert [name for name, _ in player.ended].count("prepare") == 1


def test_a_deletion_policy_of_delete_takes_the_claim_along(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life", output={"deletionPolicy": "Delete"}))
    ready(kubectl)
    kubectl.delete("ftune", "life")
    kubectl.wait_gone("jobs,pods,configmaps,pvc", selector=OURS)


def test_killed_between_all_stages_the_operator_makes_no_job_twice(
    kubectl: Kubectl, player: StagePlayer, operator: OperatorProcess
) -> None:
    player.play = holding(*ALL_STAGES)
    kubectl.apply(finetune("life", exports=EXPORTS))
    allowed: list[str] = []
    for name in ("prepare", "train", "merge", "evaluate-merged"):
        kubectl.wait("ftune", "life", running(name))
        operator.kill()
        allowed.append(name)
        player.play = holding(*(ALL_STAGES - set(allowed)))
        time.sleep(2)  # the stage ends while nobody looks
        operator.start()
    player.play = succeed
    ready(kubectl)
    assert sorted(name for name, _ in player.ended) == sorted(ALL_STAGES)
    assert len(jobs(kubectl)) == 6


def test_a_job_that_somebody_deletes_is_made_again(kubectl: Kubectl, player: StagePlayer) -> None:
    player.play = holding("train")
    kubectl.apply(finetune("life"))
    kubectl.wait("ftune", "life", running("train"))
    (name,) = jobs(kubectl, "train")
    before = jobs(kubectl)[name]["metadata"]["uid"]
    kubectl.delete("job", name)
    kubectl.wait("job", name, lambda job: job["metadata"]["uid"] != before)
    player.play = succeed
    ready(kubectl)


def test_an_outcome_that_was_lost_with_its_pod_is_asked_again(
    kubectl: Kubectl, player: StagePlayer, operator: OperatorProcess
) -> None:
    player.play = holding("train")
    kubectl.apply(finetune("life"))
    kubectl.wait("ftune", "life", running("train"))
    operator.kill()
    player.play = succeed
    (name,) = jobs(kubectl, "train")
    kubectl.wait("job", name, lambda job: job["status"].get("succeeded") == 1)
    kubectl.run("delete", "pods", "-l", "tuneserve.dev/stage=train")
    operator.start()
    ready(kubectl)
    assert len([stage for stage, _ in player.ended if stage == "train"]) == 2, "the stage finds its output at once"


def test_an_edit_during_the_training_cancels_the_old_job(kubectl: Kubectl, player: StagePlayer) -> None:
    player.play = holding("train")
    kubectl.apply(finetune("life"))
    kubectl.wait("ftune", "life", running("train"))
    (old,) = jobs(kubectl, "train")
    kubectl.apply(finetune("life", training=training(steps=4, learningRate="5e-4")))
    deadline = time.monotonic() + 30
    while set(jobs(kubectl, "train")) in ({old}, set()) or old in jobs(kubectl, "train"):
        assert time.monotonic() < deadline, "the old Job is still there"
        time.sleep(0.2)
    player.play = succeed
    ready(kubectl)
    assert old not in jobs(kubectl)


def test_the_rebuild_annotation_asks_for_a_new_run(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life"))
    first = ready(kubectl)
    kubectl.run("annotate", "ftune", "life", "tuneserve.dev/rebuild=merge.1")
    found = kubectl.wait(
        "ftune",
        "life",
        lambda seen: stage(seen, "merge")["hash"] != stage(first, "merge")["hash"] and is_true("Ready")(seen),
    )
    assert stage(found, "train")["hash"] == stage(first, "train")["hash"]
    assert [name for name, _ in player.ended].count("merge") == 2


def test_a_ready_finetune_causes_no_writes(kubectl: Kubectl, player: StagePlayer, operator: OperatorProcess) -> None:
    kubectl.apply(finetune("life", exports=EXPORTS))
    ready(kubectl)
    time.sleep(3)

    def versions() -> dict[str, str]:
        kinds = "ftune,jobs,configmaps,pvc,events.events.k8s.io"
        listed = json.loads(kubectl.run("get", kinds, "-o", "json"))["items"]
        return {
            f"{item['kind']}/{item['metadata']['name']}": item["metadata"]["resourceVersion"]
            for item in listed
            if item["metadata"]["name"] != "kube-root-ca.crt"
        }

    before = versions()
    looked = operator.metric("tuneserve_reconciles_total", kind="FineTune", result="success")
    for number in range(3):
        kubectl.run("label", "pods", "--all", "--overwrite", f"looked={number}")
        time.sleep(1)
    assert operator.metric("tuneserve_reconciles_total", kind="FineTune", result="success") > looked
    assert versions() == before


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "valid"), [(ExitCode.INVALID_DATA, "False"), (ExitCode.INVALID_CONFIG, "Unknown")])
def test_an_error_of_the_user_is_stalled_with_the_words_of_the_stage(
    kubectl: Kubectl, player: StagePlayer, code: ExitCode, valid: str
) -> None:
    error = StageError(reason="InvalidRow", message='data/reviews.jsonl:17: not valid JSON: "{"')
    player.play = failing("prepare", code, error)
    kubectl.apply(finetune("life"))
    assert stalled(kubectl, reason="InvalidRow") == error.message
    found = kubectl.get("ftune", "life")
    assert found is not None and condition(found, "DataValid")["status"] == valid
    assert stages_of(jobs(kubectl)) == ["prepare"] and len(kubectl.list("pods", selector=OURS)) == 1
    # The Job reaches its time to live: the failure stays what it is.
    (name,) = jobs(kubectl)
    kubectl.delete("job", name)
    time.sleep(4)
    assert jobs(kubectl) == {}
    assert stalled(kubectl, reason="InvalidRow") == error.message
    # Other data is another try.
    player.play = succeed
    dataset = {"train": [{"claim": {"name": "data", "path": "reviews.jsonl"}}], "revision": "2"}
    kubectl.apply(finetune("life", dataset=dataset))
    ready(kubectl)


def test_out_of_gpu_memory_says_what_to_change(kubectl: Kubectl, player: StagePlayer) -> None:
    error = StageError(reason="OutOfGpuMemory", message="CUDA out of memory: 30 GiB asked for")
    player.play = failing("train", ExitCode.OUT_OF_MEMORY, error)
    kubectl.apply(finetune("life"))
    message = stalled(kubectl, reason="OutOfMemory")
    assert message.startswith(error.message) and "maxSequenceLength" in message
    found = kubectl.get("ftune", "life")
    assert found is not None and stage(found, "evaluate-base")["state"] == "Succeeded", "a sibling is not stopped"
    assert condition(found, "Trained")["status"] == "False"


def test_a_source_that_does_not_answer_is_tried_again_and_then_given_up(kubectl: Kubectl, player: StagePlayer) -> None:
    error = StageError(reason="HubUnavailable", message="http://hub did not answer")
    player.play = failing("prepare", ExitCode.UNAVAILABLE, error)
    kubectl.apply(finetune("life", retries=1))
    found = kubectl.wait("ftune", "life", lambda seen: condition(seen, "Reconciling").get("reason") == "HubUnavailable")
    assert "(1 of 2 left)" in condition(found, "Reconciling")["message"]
    message = stalled(kubectl, reason="HubUnavailable", timeout=90)
    assert "given up after 2 tries" in message and "tuneserve.dev/rebuild=prepare.1" in message
    player.play = succeed
    kubectl.run("annotate", "ftune", "life", "tuneserve.dev/rebuild=prepare.1")
    ready(kubectl)


def test_a_missing_claim_is_named_and_found_when_it_appears(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life", dataset={"train": [{"claim": {"name": "later", "path": "a.jsonl"}}]}))
    message = stalled(kubectl, reason="ClaimNotFound")
    assert '"later" (spec.dataset.train[0].claim.name)' in message and kubectl.namespace in message
    assert jobs(kubectl) == {}
    kubectl.apply(claim("later"))
    ready(kubectl)


def test_a_config_map_is_an_input_that_may_come_later_and_change(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life", dataset={"train": [{"configMap": {"name": "rows", "key": "a.jsonl"}}]}))
    assert "ConfigMap" in stalled(kubectl, reason="ConfigMapNotFound")
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "rows"}, "data": {"b.jsonl": "{}"}}
    kubectl.apply(config_map)
    assert "it has: b.jsonl" in stalled(kubectl, reason="ConfigMapKeyNotFound")
    kubectl.apply({**config_map, "data": {"a.jsonl": '{"text": "a"}'}})
    first = ready(kubectl)
    kubectl.apply({**config_map, "data": {"a.jsonl": '{"text": "b"}'}})
    kubectl.run("annotate", "ftune", "life", "look=again")
    kubectl.wait("ftune", "life", lambda seen: stage(seen, "prepare")["hash"] != stage(first, "prepare")["hash"])


def test_an_unknown_profile_names_those_there_are(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life", accelerator={"profile": "h100"}))
    assert "cpu, rtx-4090" in stalled(kubectl, reason="ProfileNotFound")
    kubectl.apply(finetune("life"))
    ready(kubectl)


def test_a_foreign_claim_of_that_name_is_not_touched(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(claim("life-artifacts"))
    before = kubectl.wait("pvc", "life-artifacts", lambda seen: seen["status"].get("phase") == "Bound")
    kubectl.apply(finetune("life"))
    assert "life-artifacts" in stalled(kubectl, reason="ClaimConflict")
    after = kubectl.get("pvc", "life-artifacts")
    assert after is not None and after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    kubectl.delete("pvc", "life-artifacts")
    ready(kubectl)


def test_a_pod_that_fits_no_node_says_why(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life", accelerator={"profile": "elsewhere"}))
    found = kubectl.wait("ftune", "life", lambda seen: condition(seen, "Reconciling").get("reason") == "Unschedulable")
    assert "nodes are available" in condition(found, "Reconciling")["message"]
    kubectl.apply(finetune("life"))
    ready(kubectl)


def test_a_quota_that_refuses_jobs_is_told(kubectl: Kubectl, player: StagePlayer) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none"},
        "spec": {"hard": {"count/jobs.batch": "0"}},
    }
    kubectl.apply(quota)
    kubectl.wait("resourcequota", "none", lambda seen: "count/jobs.batch" in seen["status"].get("hard", {}))
    kubectl.apply(finetune("life"))
    assert "exceeded quota: none" in stalled(kubectl, reason="JobRefused")
    kubectl.delete("resourcequota", "none")
    ready(kubectl)


def test_a_quota_that_refuses_pods_is_told(kubectl: Kubectl, player: StagePlayer) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none"},
        "spec": {"hard": {"pods": "0"}},
    }
    kubectl.apply(quota)
    kubectl.wait("resourcequota", "none", lambda seen: "pods" in seen["status"].get("hard", {}))
    kubectl.apply(finetune("life"))
    message = stalled(kubectl, reason="PodRefused")
    assert "prepare gets no pod" in message and "exceeded quota: none" in message
    kubectl.delete("resourcequota", "none")
    ready(kubectl)


# --- gates, suspension -----------------------------------------------------------------------------------------------


def test_gates_are_judged_again_without_a_job(kubectl: Kubectl, player: StagePlayer) -> None:
    kubectl.apply(finetune("life", gates=[{"metric": "accuracy", "atLeast": "0.95"}]))
    message = stalled(kubectl, reason="GatesFailed", timeout=90)
    assert "merged: accuracy is 0.9000, must be at least 0.95" in message
    before = set(jobs(kubectl))
    kubectl.apply(finetune("life", gates=[{"metric": "accuracy", "atLeast": "0.85"}]))
    found = ready(kubectl)
    assert found["status"]["artifacts"][0]["verdict"] == "Passed" and set(jobs(kubectl)) == before


def test_suspended_it_stops_and_goes_on_with_the_same_job(kubectl: Kubectl, player: StagePlayer) -> None:
    player.play = holding("train")
    kubectl.apply(finetune("life"))
    kubectl.wait("ftune", "life", running("train"))
    kubectl.apply(finetune("life", suspend=True))
    found = kubectl.wait("ftune", "life", lambda seen: condition(seen, "Ready").get("reason") == "Suspended")
    assert stage(found, "train")["state"] == "Suspended"
    kubectl.wait_gone("pods", selector="tuneserve.dev/stage=train")
    (job,) = jobs(kubectl, "train").values()
    assert job["spec"]["suspend"] is True
    player.play = succeed
    kubectl.apply(finetune("life"))
    ready(kubectl)
    assert jobs(kubectl, "train")[job["metadata"]["name"]]["metadata"]["uid"] == job["metadata"]["uid"]
