"""The train stage as a process on the tiny model: it learns, stops, resumes and fails as it says."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.stages import Finished, Workspace
from tuneserve_pipeline.contract import Checkpoints, LoraSpec, Runtime, StageConfig, TrainSpec

STEPS = 30
# Two epochs and a half with dropout: order of rows and random numbers must be found again across epochs.
SPEC = TrainSpec(
    lora=LoraSpec(dropout=0.05),
    max_steps=STEPS,
    learning_rate=5e-3,
    global_batch_size=8,
    max_sequence_length=256,
)
CPU = Runtime(device="cpu", checkpoints=Checkpoints(steps=4, keep=3))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other on a busy machine take ten times as long on a model this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def trained(prepared: tuple[Workspace, Finished], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run that nothing disturbed."""
    workspace, parent = prepared
    mine = Workspace(root=tmp_path_factory.mktemp("trained"), base_model=workspace.base_model)
    finished = mine.run(mine.config(SPEC, parents={"prepare": parent}, runtime=CPU))
    assert finished.code == 0, finished.log
    return finished


def checkpoints(config: StageConfig) -> list[int]:
    """Steps of the checkpoints that carry a final name."""
    found = Path(config.output + ".partial").glob("checkpoints/step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in found)


def wait_for_checkpoint(config: StageConfig, process: subprocess.Popen[str], *, count: int = 1) -> None:
    deadline = time.monotonic() + 200
    while len(checkpoints(config)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint within 200 s"
        time.sleep(0.005)


def losses(finished: Finished) -> list[float]:
    return [row["loss"] for row in finished.rows("trainer_log.jsonl") if "loss" in row]


def test_it_learns(trained: Finished) -> None:
    curve = losses(trained)
    assert len(curve) == STEPS
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    metrics = trained.outcome.metrics
    assert metrics["loss"] == pytest.approx(sum(curve[-3:]) / 3)
    assert metrics["evalLoss"] < curve[0]
    assert metrics["tokensPerSecond"] > 0
    facts = trained.outcome.facts
    assert (facts["steps"], facts["resumedFromStep"]) == ("30", "0")
    assert int(facts["tokens"]) > STEPS * 8 * 20  # rows of 20 tokens and more


def test_adapter_is_complete_and_nothing_else_stays(trained: Finished) -> None:
    files = sorted(path.relative_to(trained.directory).as_posix() for path in trained.directory.rglob("*.*"))
    assert files == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/chat_template.jinja",
        "adapter/tokenizer.json",
        "adapter/tokenizer_config.json",
        "manifest.json",
        "trainer_log.jsonl",
    ]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in trained.directory.rglob("*.*"))
    config = trained.json("adapter/adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert config["base_model_name_or_path"] == "models"
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == linear
    weights = load_file(trained.directory / "adapter/adapter_model.safetensors")
    assert len(weights) == 2 * 2 * len(linear)
    assert all(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_sigterm_saves_and_the_next_run_goes_on_exactly(
    trained: Finished, prepared: tuple[Workspace, Finished], tmp_path: Path
) -> None:
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    config = mine.config(SPEC, parents={"prepare": prepared[1]}, runtime=CPU)
    process = mine.start(config)
    wait_for_checkpoint(config, process)
    process.send_signal(signal.SIGTERM)
    stopped = mine.finish(config, process)
    assert (stopped.code, stopped.reason) == (75, "Interrupted"), stopped.log
    assert not stopped.directory.exists()
    saved = checkpoints(config)[-1]
    assert 4 <= saved < STEPS

    resumed = mine.run(config)
    assert resumed.code == 0, resumed.log
    assert resumed.outcome.facts["resumedFromStep"] == str(saved)
    assert f"resuming from the checkpoint of step {saved} of {STEPS}" in resumed.log
    assert losses(resumed) == pytest.approx(losses(trained), abs=1e-3)
    assert resumed.outcome.facts["tokens"] == trained.outcome.facts["tokens"]
    assert not (resumed.directory / "checkpoints").exists()
    # Not only close: the same bytes, so the stages behind it need not run again.
    assert resumed.outcome.digest == trained.outcome.digest


def test_sigterm_before_the_first_step_trains_nothing(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    config = mine.config(SPEC, parents={"prepare": prepared[1]}, runtime=CPU)
    process = mine.start(config)
    while not Path(config.output + ".partial").is_dir():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    stopped = mine.finish(config, process)
    assert (stopped.code, stopped.reason) == (75, "Interrupted"), stopped.log
    assert checkpoints(config) == []
    assert "step 1 of" not in stopped.log


def test_kill_while_a_checkpoint_is_written_costs_only_that_one(
    trained: Finished, prepared: tuple[Workspace, Finished], tmp_path: Path
) -> None:
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    config = mine.config(SPEC, parents={"prepare": prepared[1]}, runtime=CPU)
    process = mine.start(config)
    wait_for_checkpoint(config, process, count=2)
    aside = Path(config.output + ".partial") / "checkpoints" / "writing"
    while not any(aside.glob("checkpoint-*/*")):
        assert process.poll() is None, process.communicate()[1]
    process.kill()
    process.communicate(timeout=60)
    # Whichever of the two was quicker, the newest that has its final name is now cut short as well.
    *_, before, newest = checkpoints(config)
    optimizer = Path(config.output + ".partial") / "checkpoints" / f"step-{newest}" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])

    resumed = mine.run(config)
    assert resumed.code == 0, resumed.log
    assert resumed.outcome.facts["resumedFromStep"] == str(before)
    assert f"the checkpoint of step {newest} is left out and removed: optimizer.pt has 100 bytes" in resumed.log
    assert losses(resumed) == pytest.approx(losses(trained), abs=1e-3)


def test_all_steps_done_but_not_exported_is_not_trained_again(
    trained: Finished, prepared: tuple[Workspace, Finished], tmp_path: Path
) -> None:
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    config = mine.config(SPEC, parents={"prepare": prepared[1]}, runtime=CPU)
    # The export fails: a file lies where the adapter's directory shall be.
    blocker = Path(config.output + ".partial") / "adapter"
    blocker.parent.mkdir(parents=True)
    blocker.write_text("")
    failed = mine.run(config)
    assert failed.code == 1, failed.log
    assert checkpoints(config)[-1] == STEPS
    blocker.unlink()

    resumed = mine.run(config)
    assert resumed.code == 0, resumed.log
    assert resumed.outcome.facts["resumedFromStep"] == str(STEPS)
    assert resumed.outcome.digest == trained.outcome.digest


def test_micro_batches_change_the_memory_and_not_the_steps(
    trained: Finished, prepared: tuple[Workspace, Finished], tmp_path: Path
) -> None:
    spec = SPEC.model_copy(update={"max_steps": 4, "lora": LoraSpec()})
    curves = []
    for micro in (8, 3):
        mine = Workspace(root=tmp_path / str(micro), base_model=prepared[0].base_model)
        mine.root.mkdir()
        runtime = Runtime(device="cpu", micro_batch_size=micro)
        finished = mine.run(mine.config(spec, parents={"prepare": prepared[1]}, runtime=runtime))
        assert finished.code == 0, finished.log
        assert "4 steps of 8 rows" in finished.log
        curves.append(losses(finished))
    assert curves[0] == pytest.approx(curves[1], abs=2e-2)


def test_loss_that_is_no_number_names_the_step(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    spec = SPEC.model_copy(update={"learning_rate": 1e30})
    failed = mine.run(mine.config(spec, parents={"prepare": prepared[1]}))
    assert (failed.code, failed.reason) == (64, "LossNotFinite"), failed.log
    assert re.search(r"at step \d+ of 30 \(learning rate 1e\+30\): lower spec\.training\.learningRate", failed.message)
    assert not failed.directory.exists()


@pytest.mark.parametrize(("module", "others"), [("query_key_value", ()), ("lm_head", ()), ("v_porj", ("q_proj",))])
def test_layers_that_cannot_be_trained_are_named_with_those_that_can(
    prepared: tuple[Workspace, Finished], tmp_path: Path, module: str, others: tuple[str, ...]
) -> None:
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    spec = SPEC.model_copy(update={"lora": LoraSpec(target_modules=(*others, module))})
    failed = mine.run(mine.config(spec, parents={"prepare": prepared[1]}))
    assert (failed.code, failed.reason) == (64, "TargetModulesInvalid"), failed.log
    assert failed.message.startswith(f"spec.lora.targetModules {module}: ")
    assert "linear layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in failed.message


def test_base_model_that_went_away_is_named(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    workspace, parent = prepared
    copied = tmp_path / "prepare"
    shutil.copytree(parent.directory, copied)
    base = json.loads((copied / "base.json").read_text())
    # As long as before: the runner looks at sizes.
    gone = "/" + "x" * (len(base["path"]) - 1)
    (copied / "base.json").write_text((copied / "base.json").read_text().replace(base["path"], gone))
    mine = Workspace(root=tmp_path, base_model=workspace.base_model)
    moved = Finished(code=0, outcome=parent.outcome, directory=copied, log="")
    failed = mine.run(mine.config(SPEC, parents={"prepare": moved}))
    assert (failed.code, failed.reason) == (64, "BaseModelNotFound"), failed.log


def test_missing_input_says_what_to_rebuild(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    workspace, parent = prepared
    mine = Workspace(root=tmp_path, base_model=workspace.base_model)
    gone = Finished(code=0, outcome=parent.outcome, directory=tmp_path / "gone", log="")
    failed = mine.run(mine.config(SPEC, parents={"prepare": gone}))
    assert (failed.code, failed.reason) == (64, "InputMissing"), failed.log
    assert "tuneserve.dev/rebuild: prepare" in failed.message


@pytest.mark.parametrize("size", ["100k", "450k"])
def test_full_volume_is_told(prepared: tuple[Workspace, Finished], tmp_path: Path, size: str) -> None:
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    config = mine.config(SPEC.model_copy(update={"max_steps": 6}), parents={"prepare": prepared[1]})
    command = mine.command(config)
    # A volume of its own in a mount namespace of its own: nothing is left behind.
    mount = 'mount -t tmpfs -o size="$0" tmpfs "$1"; shift; exec "$@"'
    limited = ["unshare", "--mount", "sh", "-ec", mount, size, str(mine.artifacts), *command]
    process = subprocess.Popen(
        limited, env=mine.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    failed = mine.finish(config, process)
    assert (failed.code, failed.reason) == (1, "DiskFull"), failed.log
    assert "make the artifacts claim larger" in failed.message
