"""The tiny model (made once) and a workspace of volumes for each test."""

from pathlib import Path

import pytest

from support.stages import Finished, Workspace
from support.tiny import LABELS, reviews, write_jsonl, write_tiny_model
from tuneserve_pipeline.contract import ClaimFile, ClassificationTask, LocalModel, PrepareSpec


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama, as it lies on a claim. Read-only: copy it to change it."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Workspace:
    """Empty volumes, the tiny model at the root of the base model's claim."""
    return Workspace(root=tmp_path, base_model=tiny_model)


@pytest.fixture
def classification() -> PrepareSpec:
    """`prepare` for a classification of `reviews/train.jsonl` on the tiny model."""
    return PrepareSpec(
        base_model=LocalModel(claim="models"),
        train=(ClaimFile(claim="reviews", path="train.jsonl"),),
        task=ClassificationTask(labels=LABELS),
        max_sequence_length=256,
    )


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Workspace, Finished]:
    """A workspace where `prepare` has run on 120 reviews, and its end. Only add to it, under names of your own."""
    workspace = Workspace(root=tmp_path_factory.mktemp("prepared"), base_model=tiny_model)
    write_jsonl(workspace.datasets / "reviews" / "train.jsonl", reviews(120))
    spec = PrepareSpec(
        base_model=LocalModel(claim="models"),
        train=(ClaimFile(claim="reviews", path="train.jsonl"),),
        task=ClassificationTask(labels=LABELS),
        max_sequence_length=256,
    )
    finished = workspace.run(workspace.config(spec))
    assert finished.code == 0, finished.log
    return workspace, finished
