"""Whatever happens in whatever order, a FineTune comes to the same end, and nothing is made twice."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.specs import claim, config, finetune, spec
from support.world import Crash, Object, World, claims, finished
from tuneserve.kube import JOB, POD

MERGED = {"name": "merged", "format": "Merged"}
ADAPTER = {"name": "adapter", "format": "Adapter"}
SPECS = [
    spec(),
    spec(training={"learningRate": "1e-3"}),
    spec(exports=[MERGED, ADAPTER]),
    spec(exports=[ADAPTER]),
    spec(evaluation={"maxSamples": 10}),
    spec(dataset={"train": [{"claim": {"name": "data", "path": "train.jsonl"}}], "revision": "2"}),
    spec(accelerator={"profile": "rtx-4090"}, retries=5),
]


def new_world() -> World:
    world = World(config=config())
    world.add(claim("base"))
    world.add(claim("data"))
    return world


def summary(world: World) -> Any:
    """The end state without what depends on how it was reached: times, attempts, Jobs and nodes."""
    body = world.finetune()
    assert body is not None
    status = body["status"]
    return {
        "conditions": {(c["type"], c["status"], c["reason"], c["message"]) for c in status["conditions"]},
        "stages": [(s["name"], s["hash"], s["state"], s.get("message")) for s in status["stages"]],
        "artifacts": status["artifacts"],
        "progress": status.get("progress"),
    }


class Story:
    """What may happen to a FineTune; `number` chooses among the objects that it may happen to."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.spec = SPECS[0]

    async def all_goes_well(self, number: int) -> None:
        await self.world.step()

    async def pods_start(self, number: int) -> None:
        self.world.control_jobs()
        for pod in self.world.pods("Pending"):
            self.world.start(pod)

    async def stages_end_unseen(self, number: int) -> None:
        await self.pods_start(number)
        for pod in self.world.pods("Running"):
            self.world.finish(pod)
        self.world.control_jobs()
        if number % 2:
            for pod in self.world.pods("Succeeded"):
                self.world.remove(pod)

    async def the_jobs_are_deleted_under_their_pods(self, number: int) -> None:
        await self.pods_start(number)
        for job in self.world.all(JOB):
            if not finished(job):
                self.world.remove(job)
        self.world.collect()

    async def reconcile(self, number: int) -> None:
        await self.world.reconcile()

    async def reconcile_until_killed(self, number: int) -> None:
        self.world.crash_after = number % 7
        with contextlib.suppress(Crash):
            await self.world.reconcile()
        self.world.crash_after = None

    async def jobs_are_controlled(self, number: int) -> None:
        self.world.control_jobs()

    async def garbage_is_collected(self, number: int) -> None:
        self.world.collect()

    async def a_pod_starts(self, number: int) -> None:
        self._each(self.world.pods("Pending"), number, self.world.start)

    async def a_pod_finishes(self, number: int) -> None:
        self._each(self.world.pods("Running"), number, self.world.finish)

    async def a_pod_is_interrupted(self, number: int) -> None:
        self._each(self.world.pods("Running"), number, lambda pod: self.world.stop(pod, code=75))

    async def a_pod_is_evicted(self, number: int) -> None:
        disrupted = {"type": "DisruptionTarget", "status": "True", "message": "preempted"}
        self._each(
            self.world.pods("Running"), number, lambda pod: self.world.stop(pod, code=75, conditions=[disrupted])
        )

    async def a_pod_is_deleted(self, number: int) -> None:
        self._each(self.world.all(POD), number, self.world.remove)

    async def a_job_is_deleted(self, number: int) -> None:
        self._each(self.world.all(JOB), number, self.world.remove)

    async def a_finished_job_reaches_its_time_to_live(self, number: int) -> None:
        self._each([job for job in self.world.all(JOB) if finished(job)], number, self.world.remove)

    async def the_spec_is_edited(self, number: int) -> None:
        self.spec = SPECS[number % len(SPECS)]
        if self.world.finetune() is not None:
            self.world.edit(self.spec)

    async def it_is_suspended(self, number: int) -> None:
        if self.world.finetune() is not None:
            self.world.edit({**self.spec, "suspend": True})

    async def the_finetune_is_deleted(self, number: int) -> None:
        body = self.world.finetune()
        if body is not None:
            self.world.remove(body)

    async def the_finetune_is_applied(self, number: int) -> None:
        if self.world.finetune() is None:
            self.world.add(finetune(**self.spec))
        else:
            self.world.edit(self.spec)

    async def the_ledger_is_lost(self, number: int) -> None:
        for body in claims(self.world):
            body["metadata"].pop("annotations", None)

    def _each(self, objects: list[Object], number: int, act: Callable[[Object], None]) -> None:
        if objects:
            act(objects[number % len(objects)])


#: What happens often is there more than once.
HAPPENINGS = [
    *[Story.all_goes_well] * 4,
    *[Story.reconcile] * 3,
    *[Story.reconcile_until_killed] * 3,
    *[Story.pods_start] * 3,
    *[Story.a_pod_finishes] * 2,
    Story.jobs_are_controlled,
    Story.a_pod_starts,
    Story.stages_end_unseen,
    Story.the_jobs_are_deleted_under_their_pods,
    *[Story.the_finetune_is_applied] * 2,
    *[Story.the_spec_is_edited] * 2,
    Story.garbage_is_collected,
    Story.a_pod_is_interrupted,
    Story.a_pod_is_evicted,
    Story.a_pod_is_deleted,
    Story.a_job_is_deleted,
    Story.a_finished_job_reaches_its_time_to_live,
    Story.it_is_suspended,
    Story.the_finetune_is_deleted,
    Story.the_ledger_is_lost,
]


async def end_of(world: World, wanted: Object) -> Any:
    """The end state once nothing goes wrong any more and the FineTune is as wanted."""
    if world.finetune() is None:
        world.add(finetune(**wanted))
    world.edit(wanted)
    await world.settle()
    return summary(world)


@given(st.lists(st.tuples(st.sampled_from(HAPPENINGS), st.integers(0, 9999)), min_size=5, max_size=30))
@settings(max_examples=120, deadline=None)
async def test_every_story_ends_the_same(story: list[tuple[Any, int]]) -> None:
    told = Story(new_world())
    told.world.add(finetune(**told.spec))
    for happening, number in story:
        await happening(told, number)

    assert await end_of(told.world, told.spec) == await end_of(new_world(), told.spec)
    assert all(count == 1 for count in told.world.work.values()), told.world.work
    writes = len(told.world.writes)
    await told.world.reconcile()
    assert len(told.world.writes) == writes, f"an idle object was written: {told.world.writes[writes:]}"


@pytest.mark.parametrize("writes", range(45))
async def test_the_operator_killed_after_any_write_changes_nothing(writes: int) -> None:
    world = new_world()
    world.add(finetune(**SPECS[2]))
    world.crash_after = writes
    with contextlib.suppress(Crash):
        await world.settle()
    world.crash_after = None

    assert await end_of(world, SPECS[2]) == await end_of(new_world(), SPECS[2])
    assert set(world.work.values()) == {1}
    jobs = [write for write in world.writes if write.startswith("apply Job")]
    assert len(jobs) == len(set(jobs)) == 6
