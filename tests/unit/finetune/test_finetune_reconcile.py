"""What a user reads when something happens, and what the operator does about it."""

from typing import Any

import pytest

from support.specs import claim, config, finetune, spec
from support.world import Object, World, claims, run_of
from tuneserve.config import OperatorConfig
from tuneserve.finetune.graph import EVALUATE_BASE, MERGE, PREPARE, TRAIN
from tuneserve.finetune.reconcile import SOON
from tuneserve.kube import CLAIM, CONFIG_MAP, JOB, POD, KubeError
from tuneserve_pipeline.contract import Outcome, StageError


def new_world(*, settings: OperatorConfig | None = None, **fields: Any) -> World:
    world = World(config=settings or config())
    world.add(claim("base"))
    world.add(claim("data"))
    world.add(finetune(**fields))
    return world


def status(world: World) -> Object:
    body = world.finetune()
    assert body is not None
    return body["status"]


def condition(world: World, type: str) -> Object:
    return next(item for item in status(world)["conditions"] if item["type"] == type)


def summary(world: World) -> str:
    """The one of the three that holds, with its reason; Ready False alone reads as `-`."""
    holding = [type for type in ("Ready", "Reconciling", "Stalled") if condition(world, type)["status"] == "True"]
    assert len(holding) <= 1
    return f"{holding[0]}: {condition(world, holding[0])['reason']}" if holding else "-"


def message(world: World) -> str:
    return condition(world, "Ready")["message"]


def stage(world: World, name: str) -> Object:
    return next(item for item in status(world)["stages"] if item["name"] == name)


def jobs(world: World, name: str) -> list[Object]:
    return [job for job in world.all(JOB) if run_of(job)[0] == name]


def pod_of(world: World, name: str, *, phase: str = "Pending") -> Object:
    (pod,) = [pod for pod in world.pods(phase) if run_of(pod)[0] == name]
    return pod


async def until(world: World, name: str) -> Object:
    """Everything goes well until a pod of that stage runs; no other one does."""
    for _ in range(20):
        await world.reconcile()
        world.control_jobs()
        for pod in world.pods("Pending"):
            world.start(pod)
        if jobs(world, name):
            await world.reconcile()
            return pod_of(world, name, phase="Running")
        for pod in world.pods("Running"):
            world.finish(pod)
        world.control_jobs()
    raise AssertionError(f"{name} never runs")


async def end(world: World, pod: Object, *, code: int, error: StageError | None = None, **more: Any) -> None:
    """The pod ends, the Job controller sees it, and the operator looks."""
    name, hash = run_of(pod)
    world.stop(pod, code=code, message=Outcome(stage=name, hash=hash, error=error).to_message(), **more)
    world.control_jobs()
    await world.reconcile()


UNREADABLE = StageError(reason="InvalidRow", message='train.jsonl:17: the row is not valid JSON: "{"')
OFFLINE = StageError(reason="HubUnavailable", message="http://hub did not answer in 30 s")


#: Seconds until something that a user must provide is looked for again.
RECHECK = 30

# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "valid"), [(65, "False"), (64, "Unknown")])
async def test_an_error_of_the_user_is_told_as_the_stage_told_it(code: int, valid: str) -> None:
    world = new_world()
    await end(world, await until(world, PREPARE), code=code, error=UNREADABLE)
    assert summary(world) == "Stalled: InvalidRow"
    assert message(world) == UNREADABLE.message
    assert condition(world, "DataValid")["status"] == valid
    assert stage(world, PREPARE)["state"] == "Failed" and "terms" not in stage(world, PREPARE)
    assert not jobs(world, TRAIN)
    assert stage(world, TRAIN)["message"] == "waits for prepare, which failed"


async def test_what_is_odd_about_the_data_is_told_though_they_can_be_learned_from() -> None:
    world = new_world()
    pod = await until(world, PREPARE)
    name, hash = run_of(pod)
    facts = {"trainRows": "80", "testRows": "10", "warnings": "7 rows of test are in the training rows too"}
    told = Outcome(stage=name, hash=hash, digest="sha256:1", facts=facts)
    world.stop(pod, code=0, message=told.to_message())
    world.control_jobs()
    await world.reconcile()
    valid = condition(world, "DataValid")
    assert valid["status"] == "True"
    assert valid["message"] == (
        "rows: 80 for training, 10 for the test. Worth a look: 7 rows of test are in the training rows too"
    )


async def test_a_failed_stage_stays_failed_when_its_job_has_gone() -> None:
    world = new_world()
    await end(world, await until(world, PREPARE), code=65, error=UNREADABLE)
    before = status(world)
    for body in (*world.all(JOB), *world.all(POD)):
        world.remove(body)
    await world.settle()
    assert not world.all(JOB)
    assert status(world) == before


@pytest.mark.parametrize(
    "edit",
    [
        {"dataset": {"train": [{"claim": {"name": "data", "path": "train.jsonl"}}], "revision": "2"}},
        {"task": {"classification": {"labels": ["good", "bad", "fair"]}}},
    ],
)
async def test_other_inputs_are_another_try(edit: Object) -> None:
    world = new_world()
    await end(world, await until(world, PREPARE), code=65, error=UNREADABLE)
    world.edit(spec(**edit))
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_the_rebuild_annotation_is_another_try_and_makes_new_outputs() -> None:
    world = new_world()
    await world.settle()
    before = {name: stage(world, name)["hash"] for name in (PREPARE, TRAIN, MERGE)}
    body = world.finetune()
    assert body is not None
    body["metadata"]["annotations"]["tuneserve.dev/rebuild"] = "train.1"
    await world.settle()
    after = {name: stage(world, name)["hash"] for name in (PREPARE, TRAIN, MERGE)}
    assert after[PREPARE] == before[PREPARE]
    assert after[TRAIN] != before[TRAIN] and after[MERGE] != before[MERGE]
    assert world.work[TRAIN, after[TRAIN]] == 1
    body["metadata"]["annotations"].clear()
    await world.settle()
    assert stage(world, TRAIN)["hash"] == before[TRAIN], "the earlier output counts again"
    assert set(world.work.values()) == {1}


async def test_a_rebuild_annotation_that_names_no_stage_is_told() -> None:
    world = new_world(annotations={"tuneserve.dev/rebuild": "trian.1"})
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"
    assert "names trian, but the stages are prepare, train, merge" in message(world)


@pytest.mark.parametrize(("code", "retries"), [(65, 3), (69, 0)])
async def test_no_other_try_is_promised_while_the_job_controller_has_not_ended_the_job(code: int, retries: int) -> None:
    world = new_world(retries=retries)
    pod = await until(world, PREPARE)
    name, hash = run_of(pod)
    world.stop(pod, code=code, message=Outcome(stage=name, hash=hash, error=UNREADABLE).to_message())
    await world.reconcile()
    assert summary(world) == "Reconciling: InvalidRow" and "try" not in message(world)
    world.control_jobs()
    await world.reconcile()
    assert summary(world) == "Stalled: InvalidRow"


async def test_out_of_memory_says_what_to_change_and_another_profile_is_another_try() -> None:
    world = new_world(accelerator={"profile": "rtx-4090"})
    error = StageError(reason="OutOfGpuMemory", message="CUDA out of memory")
    await end(world, await until(world, TRAIN), code=85, error=error)
    for pod in world.pods("Running"):
        world.finish(pod)
    world.control_jobs()
    await world.reconcile()
    assert summary(world) == "Stalled: OutOfMemory"
    for part in ("CUDA out of memory", "maxSequenceLength", "rtx-4090", "spec.accelerator.profile"):
        assert part in message(world)
    world.edit(spec(accelerator={"profile": "rtx-4090"}, gates=[{"metric": "accuracy", "atLeast": "0.1"}]))
    await world.settle()
    assert summary(world) == "Stalled: OutOfMemory", "an edit that has nothing to do with it changes nothing"
    world.edit(spec(accelerator={"profile": "cpu"}))
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_a_source_that_does_not_answer_is_tried_again_and_named_meanwhile() -> None:
    world = new_world(retries=1)
    await end(world, await until(world, PREPARE), code=69, error=OFFLINE)
    assert summary(world) == "Reconciling: HubUnavailable"
    assert message(world).startswith("try 2 of prepare starts soon (1 of 2 left); the one before failed: http://hub")
    world.start(pod_of(world, PREPARE))
    await world.reconcile()
    assert stage(world, PREPARE)["state"] == "Running" and stage(world, PREPARE)["attempt"] == 2
    await end(world, pod_of(world, PREPARE, phase="Running"), code=69, error=OFFLINE)
    assert summary(world) == "Stalled: HubUnavailable"
    assert "given up after 2 tries" in message(world)
    assert "kubectl annotate finetune demo --namespace team --overwrite tuneserve.dev/rebuild=prepare.1" in message(
        world
    )
    assert condition(world, "DataValid")["status"] == "Unknown"


async def test_more_retries_are_another_try_of_the_same_inputs() -> None:
    world = new_world(retries=0)
    await end(world, await until(world, PREPARE), code=69, error=OFFLINE)
    hash = stage(world, PREPARE)["hash"]
    world.edit(spec(retries=2))
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"
    assert stage(world, PREPARE)["hash"] == hash


@pytest.mark.parametrize(
    ("code", "reason", "says"),
    [
        (1, "StageCrashed", "exit code 1"),
        (137, "Killed", "killed by a signal"),
    ],
)
async def test_a_stage_that_cannot_tell_why_it_ended(code: int, reason: str, says: str) -> None:
    world = new_world(retries=0)
    pod = await until(world, PREPARE)
    world.stop(pod, code=code)
    world.control_jobs()
    await world.reconcile()
    assert summary(world) == f"Stalled: {reason}"
    assert says in message(world)


async def test_a_container_over_its_memory_limit_says_so() -> None:
    world = new_world(retries=0)
    pod = await until(world, PREPARE)
    world.stop(pod, code=137)
    pod["status"]["containerStatuses"][0]["state"]["terminated"]["reason"] = "OOMKilled"
    world.control_jobs()
    await world.reconcile()
    assert summary(world) == "Stalled: MemoryLimitExceeded"
    assert 'raise the memory limit of its stages in profile "cpu"' in message(world)


async def test_a_deadline_that_is_over_says_so_and_a_longer_one_is_another_try() -> None:
    world = new_world(deadlineSeconds=60)
    pod = await until(world, PREPARE)
    world.remove(pod)
    world.stop(pod, code=75)
    world.end(jobs(world, PREPARE)[0], "Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
    await world.reconcile()
    assert summary(world) == "Stalled: DeadlineExceeded"
    assert "spec.deadlineSeconds (60 s)" in message(world)
    world.edit(spec(deadlineSeconds=600))
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_an_outcome_that_cannot_be_read_is_a_failure_and_no_loop() -> None:
    world = new_world()
    pod = await until(world, PREPARE)
    world.stop(pod, code=0, message="Segmentation fault")
    world.control_jobs()
    await world.reconcile()
    assert summary(world) == "Stalled: OutcomeUnreadable"
    assert "Segmentation fault" in message(world)
    await world.settle()
    assert len(jobs(world, PREPARE)) == 1


async def test_a_failed_branch_stops_what_depends_on_it_and_no_sibling() -> None:
    world = new_world()
    await until(world, TRAIN)
    await end(world, pod_of(world, EVALUATE_BASE, phase="Running"), code=64, error=UNREADABLE)
    assert summary(world).startswith("Reconciling")
    assert UNREADABLE.message in message(world)
    await world.settle()
    assert summary(world) == "Stalled: InvalidRow"
    assert stage(world, "evaluate-merged")["state"] == "Succeeded"
    assert status(world)["artifacts"][0]["verdict"] == "Passed"


# --- pods that do not get on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pod_status", "expected", "says"),
    [
        (
            {
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                    }
                ]
            },
            "Reconciling: Unschedulable",
            ["prepare waits for a node: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "as enough is free"],
        ),
        (
            {
                "containerStatuses": [
                    {"name": "stage", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found: x:1"}}}
                ]
            },
            "Stalled: ImagePullFailed",
            ["the image of prepare cannot be pulled: not found: x:1", 'profile "cpu"'],
        ),
        (
            {
                "containerStatuses": [
                    {
                        "name": "stage",
                        "state": {"waiting": {"reason": "CreateContainerConfigError", "message": "no user"}},
                    }
                ]
            },
            "Stalled: CreateContainerConfigError",
            ["the container of prepare cannot start: no user"],
        ),
    ],
)
async def test_a_pod_that_does_not_start_says_why(pod_status: Object, expected: str, says: list[str]) -> None:
    world = new_world()
    await world.reconcile()
    world.control_jobs()
    (pod,) = world.pods("Pending")
    pod["status"] |= pod_status
    result = await world.reconcile()
    assert summary(world) == expected
    for part in says:
        assert part in message(world)
    assert result.requeue_after == world.config.progress_interval_seconds
    pod["status"] = {"phase": "Pending"}
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


SECRET_MISSING = 'MountVolume.SetUp failed for volume "hub-token" : secret "hub" not found'


@pytest.mark.parametrize(
    ("warning", "expected"),
    [
        (SECRET_MISSING, "Stalled: PodNotStarting"),
        ("AttachVolume.Attach failed: the disk is busy", "Reconciling: PodNotStarting"),
    ],
)
async def test_a_pod_that_waits_for_a_volume_says_what_the_kubelet_says(warning: str, expected: str) -> None:
    world = new_world()
    await world.reconcile()
    world.control_jobs()
    (pod,) = world.pods("Pending")
    pod["spec"]["nodeName"] = "node-1"
    world.events.append((pod["metadata"]["uid"], warning))
    await world.reconcile()
    assert summary(world) == expected
    assert f"prepare does not start on node node-1: {warning}" in message(world)
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_a_job_that_gets_no_pod_says_why() -> None:
    world = new_world()
    await world.reconcile()
    refusal = 'Error creating: pods "demo-prepare" is forbidden: exceeded quota: team'
    world.events.append((jobs(world, PREPARE)[0]["metadata"]["uid"], refusal))
    await world.reconcile()
    assert summary(world) == "Stalled: PodRefused" and refusal in message(world)
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_an_eviction_is_no_failure_and_is_told() -> None:
    world = new_world(retries=0)
    evicted = {"type": "DisruptionTarget", "status": "True", "message": "the node was low on memory"}
    await end(world, await until(world, TRAIN), code=75, conditions=[evicted])
    assert "the node was low on memory" in message(world) and "does not count" in message(world)
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_an_interrupted_training_goes_on() -> None:
    world = new_world(retries=0)
    await end(world, await until(world, TRAIN), code=75)
    assert "goes on from the last checkpoint" in message(world)
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


# --- what a spec names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "data"])
async def test_a_missing_claim_is_named_and_found_as_soon_as_it_is_there(name: str) -> None:
    world = new_world()
    world.remove(world.objects[CLAIM, name])
    result = await world.reconcile()
    assert summary(world) == "Stalled: ClaimNotFound"
    assert f'PersistentVolumeClaim "{name}"' in message(world) and "namespace team" in message(world)
    assert not world.all(JOB) and result.requeue_after == RECHECK
    world.add(claim(name))
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_a_claim_that_is_no_longer_needed_is_not_missed() -> None:
    world = new_world()
    await world.settle()
    world.remove(world.objects[CLAIM, "data"])
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_a_claim_whose_volume_is_lost() -> None:
    world = new_world()
    world.objects[CLAIM, "data"]["status"]["phase"] = "Lost"
    await world.reconcile()
    assert summary(world) == "Stalled: ClaimLost"


async def test_an_adapter_that_no_server_takes_is_told_before_the_training() -> None:
    adapter, merged = {"name": "adapter", "format": "Adapter"}, {"name": "merged", "format": "Merged"}
    world = new_world(exports=[adapter])
    pod = await until(world, PREPARE)
    name, hash = run_of(pod)
    facts = {"architecture": "FalconForCausalLM"}
    world.stop(pod, code=0, message=Outcome(stage=name, hash=hash, digest="sha256:1", facts=facts).to_message())
    world.control_jobs()
    await world.reconcile()
    assert not jobs(world, TRAIN)
    await world.settle()  # the base model is measured meanwhile
    assert summary(world) == "Stalled: AdapterNotServable"
    assert "adapter has the format Adapter" in message(world) and "FalconForCausalLM" in message(world)
    world.edit(spec(exports=[merged]))
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


ROWS = {"dataset": {"train": [{"configMap": {"name": "rows", "key": "train.jsonl"}}]}}


def config_map(text: str, key: str = "train.jsonl") -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "rows"}, "data": {key: text}}


async def test_a_config_map_is_needed_and_its_content_is_an_input() -> None:
    world = new_world(**ROWS)
    result = await world.reconcile()
    assert summary(world) == "Stalled: ConfigMapNotFound" and result.requeue_after == RECHECK
    assert 'ConfigMap "rows" (spec.dataset.train[0].configMap.name)' in message(world)
    live = world.add(config_map("{}", key="other.jsonl"))
    await world.reconcile()
    assert summary(world) == "Stalled: ConfigMapKeyNotFound"
    assert 'has no key "train.jsonl"' in message(world) and "it has: other.jsonl" in message(world)
    live["data"] = {"train.jsonl": "{}"}
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"
    before = stage(world, PREPARE)["hash"]
    live["data"] = {"train.jsonl": '{"text": "x"}'}
    await world.settle()
    assert stage(world, PREPARE)["hash"] != before


async def test_a_wave_stops_at_an_output_that_is_what_it_was() -> None:
    world = new_world()
    world.digests[PREPARE] = "sha256:same"
    train = await until(world, TRAIN)
    data = {"train": [{"claim": {"name": "data", "path": "train.jsonl"}}], "revision": "2"}
    world.edit(spec(dataset=data))
    await world.reconcile()
    assert [job["metadata"]["uid"] for job in jobs(world, TRAIN)] == [
        next(owner["uid"] for owner in train["metadata"]["ownerReferences"])
    ], "as long as prepare may put out the same, the training goes on"
    await world.settle()
    assert [name for name, _ in world.work].count(TRAIN) == 1 and [name for name, _ in world.work].count(PREPARE) == 2
    assert summary(world) == "Ready: ArtifactsReady"


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("h100", ["profile h100", "cpu, rtx-4090"]),
        ("reserved", ["profile reserved is not offered to namespace team", "cpu, rtx-4090"]),
    ],
)
async def test_an_unknown_profile_names_those_there_are(profile: str, says: list[str]) -> None:
    world = new_world(accelerator={"profile": profile})
    await world.reconcile()
    assert summary(world) == "Stalled: ProfileNotFound"
    for part in says:
        assert part in message(world)
    assert not world.all(JOB)
    world.edit(spec())
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_a_job_that_has_not_started_follows_the_profile_and_one_that_runs_does_not() -> None:
    world = new_world()
    await world.reconcile()
    world.control_jobs()
    world.edit(spec(accelerator={"profile": "rtx-4090"}))
    result = await world.reconcile()
    assert not jobs(world, PREPARE) and result.requeue_after == SOON
    world.collect()
    train = await until(world, TRAIN)
    world.edit(spec(accelerator={"profile": "cpu"}))
    await world.reconcile()
    assert train in world.pods("Running") and len(jobs(world, TRAIN)) == 1


# --- the artifacts claim ---------------------------------------------------------------------------------------------


async def test_a_foreign_claim_of_that_name_is_left_alone() -> None:
    world = new_world()
    foreign = world.add(claim("demo-artifacts"))
    before = foreign["metadata"]["resourceVersion"]
    result = await world.reconcile()
    assert summary(world) == "Stalled: ClaimConflict" and result.requeue_after == RECHECK
    assert "demo-artifacts" in message(world) and "not made by TuneServe" in message(world)
    assert foreign["metadata"]["resourceVersion"] == before and not world.all(JOB)
    world.remove(foreign)
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_the_ledger_of_a_foreign_claim_is_not_believed() -> None:
    world = new_world()
    await world.settle()
    ledger = claims(world)[0]["metadata"]["annotations"]
    other = new_world()
    other.add({**claim("demo-artifacts"), "metadata": {"name": "demo-artifacts", "annotations": ledger}})
    await other.reconcile()
    assert summary(other) == "Stalled: ClaimConflict"
    assert {item["state"] for item in status(other)["stages"]} == {"Pending"}


async def test_a_claim_only_grows() -> None:
    world = new_world(output={"claim": {"size": "10Gi"}})
    await world.settle()

    def size() -> str:
        return claims(world)[0]["spec"]["resources"]["requests"]["storage"]

    world.edit(spec(output={"claim": {"size": "20Gi"}}))
    await world.settle()
    assert size() == "20Gi"
    world.edit(spec(output={"claim": {"size": "5Gi"}}))
    await world.settle()
    assert size() == "20Gi"


async def test_the_deletion_policy_makes_the_claim_owned_or_free() -> None:
    world = new_world(output={"deletionPolicy": "Delete"})
    await world.settle()
    assert claims(world)[0]["metadata"]["ownerReferences"][0]["kind"] == "FineTune"
    body = world.finetune()
    assert body is not None
    world.remove(body)
    for _ in range(3):
        world.collect()
    assert not claims(world)


async def test_a_lost_claim_is_made_anew_and_so_is_what_was_on_it() -> None:
    world = new_world()
    await world.settle()
    world.remove(claims(world)[0])
    world.volume.clear()
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"
    assert set(world.work.values()) == {2}


# --- edits, suspension, deletion -------------------------------------------------------------------------------------


async def test_an_edit_cancels_the_old_job_and_keeps_the_old_artifact_until_the_new_one_is_measured() -> None:
    world = new_world()
    await world.settle()
    (before,) = status(world)["artifacts"]
    world.edit(spec(training={"learningRate": "1e-3"}))
    train = await until(world, TRAIN)
    assert status(world)["artifacts"] == [before] and summary(world) == "Reconciling: Training"
    world.edit(spec(training={"learningRate": "2e-3"}))
    await world.reconcile()
    assert len([job for job in jobs(world, TRAIN) if job["metadata"]["uid"] == _owner(train)]) == 0
    await world.settle()
    (after,) = status(world)["artifacts"]
    assert after["version"] != before["version"] and summary(world) == "Ready: ArtifactsReady"
    assert [name for name, _ in world.work].count(PREPARE) == 1


def _owner(pod: Object) -> str:
    return str(pod["metadata"]["ownerReferences"][0]["uid"])


async def test_an_added_export_runs_only_its_stages() -> None:
    world = new_world()
    await world.settle()
    before = set(world.work)
    world.edit(spec(exports=[{"name": "merged", "format": "Merged"}, {"name": "adapter", "format": "Adapter"}]))
    await world.settle()
    assert [name for name, _ in set(world.work) - before] == ["evaluate-adapter"]
    assert [item["path"].split("/")[0] for item in status(world)["artifacts"]] == ["merge", "train"]


async def test_a_suspended_finetune_stops_and_goes_on() -> None:
    world = new_world()
    train = await until(world, TRAIN)
    world.edit(spec(suspend=True))
    await world.reconcile()
    assert summary(world) == "-" and condition(world, "Ready")["reason"] == "Suspended"
    assert stage(world, TRAIN)["state"] == "Suspended"
    assert all(job["spec"]["suspend"] for job in jobs(world, TRAIN))
    world.control_jobs()
    assert train["metadata"]["deletionTimestamp"]
    world.edit(spec())
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"
    assert len(jobs(world, TRAIN)) == 1


async def test_a_suspended_finetune_starts_nothing() -> None:
    world = new_world(suspend=True)
    await world.settle()
    assert not world.all(JOB) and condition(world, "Ready")["reason"] == "Suspended"


async def test_deleted_and_applied_again_it_is_ready_at_once() -> None:
    world = new_world()
    await world.settle()
    artifacts = status(world)["artifacts"]
    body = world.finetune()
    assert body is not None
    world.remove(body)
    for _ in range(3):
        world.collect()
    assert not world.all(JOB) and not world.all(CONFIG_MAP) and claims(world)
    world.add(finetune())
    await world.reconcile()
    assert summary(world) == "Ready: ArtifactsReady" and status(world)["artifacts"] == artifacts
    assert not world.all(JOB)


async def test_a_pod_of_the_deleted_finetune_is_waited_for() -> None:
    world = new_world()
    train = await until(world, TRAIN)
    body = world.finetune()
    assert body is not None
    world.remove(body)
    for _ in range(3):
        world.collect()
    assert train["metadata"]["deletionTimestamp"]
    world.add(finetune())
    for _ in range(3):
        result = await world.reconcile()
        world.control_jobs()
    assert not jobs(world, TRAIN) and result.requeue_after == SOON
    assert f"waits until pod {train['metadata']['name']} of an earlier Job has stopped" in message(world)
    world.stop(train, code=75)
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_a_job_of_the_deleted_finetune_is_not_taken_over() -> None:
    world = new_world()
    await until(world, TRAIN)
    body = world.finetune()
    assert body is not None
    world.remove(body)
    world.add(finetune())
    await world.reconcile()
    assert "of the FineTune that was deleted before is gone" in message(world)
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_a_finetune_that_is_being_deleted_is_left_alone() -> None:
    world = new_world()
    body = world.finetune()
    assert body is not None
    body["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert (await world.reconcile()).requeue_after is None
    assert world.writes == []


async def test_a_job_whose_outcome_was_lost_with_its_pod_is_asked_again() -> None:
    world = new_world()
    world.finish(await until(world, TRAIN))
    world.control_jobs()
    for pod in world.pods("Succeeded"):
        world.remove(pod)
    await world.reconcile()
    assert not jobs(world, TRAIN)
    assert "it is asked again" in message(world)
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"
    assert set(world.work.values()) == {1}


# --- what the API server says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "reason"), [(JOB, "JobRefused"), (CONFIG_MAP, "JobRefused"), (CLAIM, "ClaimRefused")])
async def test_a_refusal_of_the_api_server_reaches_the_user(kind: Any, reason: str) -> None:
    world = new_world()
    world.refusals[kind] = KubeError(403, "Forbidden", "exceeded quota: team, requested: 1, limited: 0")
    result = await world.reconcile()
    assert summary(world) == f"Stalled: {reason}" and result.requeue_after == RECHECK
    assert "exceeded quota: team" in message(world)
    world.refusals.clear()
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_a_refusal_that_passes_by_itself_is_tried_again_and_stalls_nothing() -> None:
    world = new_world()
    world.refusals[CONFIG_MAP] = KubeError(
        403,
        "Forbidden",
        'configmaps "a" is forbidden: cannot set blockOwnerDeletion in this case because cannot find RESTMapping for '
        'APIVersion tuneserve.dev/v1alpha1 Kind FineTune: no matches for kind "FineTune"',
    )
    with pytest.raises(KubeError):  # the queue tries again, ever more slowly
        await world.reconcile()
    body = world.finetune()
    assert body is not None and "status" not in body
    world.refusals.clear()
    await world.settle()
    assert summary(world) == "Ready: ArtifactsReady"


async def test_a_stored_object_that_cannot_be_read_is_stalled_and_no_crash() -> None:
    world = new_world()
    body = world.finetune()
    assert body is not None
    body["spec"]["task"] = {"poetry": {}}
    await world.reconcile()
    assert summary(world) == "Stalled: InvalidSpec"
    assert "spec.task" in message(world)
    await world.reconcile()
    assert len([write for write in world.writes if write.startswith("status")]) == 1


async def test_a_status_that_cannot_be_read_is_written_anew() -> None:
    world = new_world()
    await world.settle()
    before = status(world)
    body = world.finetune()
    assert body is not None
    body["status"] = {"stages": [{"name": "train", "state": "OfAnotherVersion"}]}
    await world.settle()
    assert status(world)["artifacts"] == before["artifacts"] and summary(world) == "Ready: ArtifactsReady"


# --- gates -----------------------------------------------------------------------------------------------------------


async def test_gates_judge_and_an_edit_judges_again_without_a_job() -> None:
    world = new_world(gates=[{"metric": "accuracy", "atLeast": "0.90"}])
    await world.settle()
    assert summary(world) == "Stalled: GatesFailed"
    assert "merged: accuracy is 0.8000, must be at least 0.90" in message(world)
    (artifact,) = status(world)["artifacts"]
    assert artifact["verdict"] == "Failed" and artifact["reason"].startswith("accuracy is 0.8000")
    made = sum(world.work.values())
    world.edit(spec(gates=[{"metric": "accuracy", "atLeast": "0.75"}]))
    await world.reconcile()
    assert summary(world) == "Ready: ArtifactsReady"
    assert message(world) == "merged: accuracy 0.8000 (base model 0.5000)"
    assert sum(world.work.values()) == made


async def test_one_export_that_passes_is_enough_and_the_other_is_named() -> None:
    exports = [{"name": "merged", "format": "Merged"}, {"name": "adapter", "format": "Adapter"}]
    world = new_world(exports=exports, gates=[{"metric": "accuracy", "export": "adapter", "atLeast": "0.9"}])
    await world.settle()
    assert summary(world) == "Ready: SomeGatesFailed"
    assert "merged: accuracy 0.8000" in message(world)
    assert "Gates failed: adapter: accuracy is 0.8000" in message(world)


async def test_every_stage_and_the_end_are_announced_once() -> None:
    world = new_world()
    await until(world, TRAIN)
    await world.settle()
    events = [write for write in world.writes if write == "create Event"]
    again = len(world.writes)
    await world.settle()
    assert len(world.writes) == again
    assert 6 <= len(events) <= 11
