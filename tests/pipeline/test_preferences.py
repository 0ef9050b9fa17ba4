"""Learning from pairs of answers: the better one becomes likelier than the worse one, and a run can be resumed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import pytest
import torch

from support.stages import Finished, Workspace
from support.tiny import tiny_tokenizer, write_jsonl
from tuneserve_pipeline import methods
from tuneserve_pipeline.callbacks import CheckpointKeeper, ProgressReporter
from tuneserve_pipeline.checkpoints import CheckpointStore
from tuneserve_pipeline.contract import (
    ClaimFile,
    DpoSpec,
    LocalModel,
    Method,
    Objective,
    PreferenceTask,
    PrepareSpec,
    TrainSpec,
)
from tuneserve_pipeline.metrics import Progress
from tuneserve_pipeline.preferences import PreferenceTrainer, make_preference_trainer, pair_lengths
from tuneserve_pipeline.recipe import make_recipe
from tuneserve_pipeline.trainer import Setting

SPEC = TrainSpec(
    objective=Objective.DPO,
    dpo=DpoSpec(beta=0.5),
    max_steps=8,
    learning_rate=5e-3,
    warmup_ratio=0.0,
    global_batch_size=4,
)
RATES = {Method.QLORA: 5e-3, Method.LORA: 5e-3, Method.IA3: 0.3, Method.FULL: 5e-4}


@dataclass(frozen=True)
class Answers:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


#: The better answer is one word, the worse one another, of another length; 2 ends both.
PAIRS = [
    Answers(prompt=[1, *range(at, at + 5 + at % 7), 1], chosen=[300 + at % 3, 310, 2], rejected=[400 + at % 2, 2])
    for at in range(20, 52)
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(spec: TrainSpec, *, base: Path, root: Path, checkpoint_steps: int = 50) -> PreferenceTrainer:
    store = CheckpointStore(directory=root / "checkpoints", keep=3)
    setting = Setting(
        spec=spec,
        recipe=make_recipe(spec, lengths=pair_lengths(PAIRS), device="cpu"),
        device="cpu",
        aside=store.aside,
        checkpoint_steps=checkpoint_steps,
        callbacks=[ProgressReporter(Progress(), store=store), CheckpointKeeper(store=store, interrupted=Event())],
    )
    model = methods.load_base(base, spec=spec, device="cpu")
    return make_preference_trainer(
        setting, model=model, tokenizer=tiny_tokenizer(), pairs=PAIRS[:24], validation=PAIRS[24:]
    )


def losses(trained: PreferenceTrainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", RATES)
def test_better_answers_become_likelier(method: Method, tiny_model: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"method": method, "learning_rate": RATES[method]})
    learning = trainer(spec, base=tiny_model, root=tmp_path)
    learning.train()
    curve = losses(learning)
    # Before the first step the model is its own reference: no answer is preferred.
    assert curve[0] == pytest.approx(math.log(2), abs=2e-2)
    assert curve[-1] < 0.5 * curve[0]
    found = learning.evaluate()
    assert found["eval_rewards/accuracies"] > 0.9
    assert found["eval_loss"] < 0.5 * curve[0]


@pytest.mark.parametrize("method", [Method.QLORA, Method.FULL])
def test_a_resumed_run_goes_on_exactly(method: Method, tiny_model: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"method": method, "learning_rate": RATES[method]})
    undisturbed = trainer(spec, base=tiny_model, root=tmp_path, checkpoint_steps=3)
    undisturbed.train()
    checkpoint = tmp_path / "checkpoints/step-3"
    # Another process: the reference is what the base says, not what has been learned by now.
    again = trainer(spec, base=tiny_model, root=tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == pytest.approx(losses(undisturbed), abs=1e-3)


def test_beta_holds_the_model_near_its_base(tiny_model: Path, tmp_path: Path) -> None:
    margins = []
    for beta in (0.05, 5.0):
        spec = SPEC.model_copy(update={"dpo": DpoSpec(beta=beta)})
        learning = trainer(spec, base=tiny_model, root=tmp_path / str(beta))
        learning.train()
        margins.append(learning.evaluate()["eval_rewards/margins"] / beta)
    assert margins[0] > margins[1] > 0


def test_rows_with_one_answer_are_no_pairs(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    mine = Workspace(root=tmp_path, base_model=prepared[0].base_model)
    refused = mine.run_here(mine.config(SPEC, parents={"prepare": prepared[1]}))
    assert (refused.code, refused.reason) == (65, "RowsUnsuitable")
    assert "set spec.task.preference, or another objective" in refused.message


def test_pairs_of_a_file_are_prepared_and_learned(tiny_model: Path, tmp_path: Path) -> None:
    mine = Workspace(root=tmp_path, base_model=tiny_model)
    things = ("battery", "book", "camera", "dinner", "film")
    pairs = [
        {"prompt": f"How was the {things[row % 5]} number {row}?", "chosen": "great", "rejected": "awful and slow"}
        for row in range(60)
    ]
    write_jsonl(mine.datasets / "pairs" / "train.jsonl", pairs)
    source = ClaimFile(claim="pairs", path="train.jsonl")
    prepare = PrepareSpec(base_model=LocalModel(claim="models"), train=(source,), task=PreferenceTask())
    prepared = mine.run(mine.config(prepare))
    assert prepared.code == 0, prepared.log
    trained = mine.run(mine.config(SPEC, parents={"prepare": prepared}))
    assert trained.code == 0, trained.log
    losses = [row["loss"] for row in trained.rows("trainer_log.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)  # both answers are as likely as with the base
    assert losses[-1] < 0.6 * losses[0]
    assert trained.outcome.metrics["evalLoss"] < 0.6 * losses[0]


def test_a_pair_is_as_long_as_both_of_its_rows() -> None:
    assert pair_lengths([Answers(prompt=[1, 2, 3], chosen=[4], rejected=[5, 6])]) == [10]
