"""Base models and data sets from a hub: the real client against a real, small server."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub import FakeHub, serve_hub
from support.stages import Finished, Workspace
from support.tiny import LABELS, reviews, write_jsonl
from tuneserve_pipeline.contract import (
    ClaimFile,
    ClassificationTask,
    DataSource,
    ExitCode,
    HubDataset,
    HubModel,
    PrepareSpec,
    Runtime,
)

REPO = "acme/tiny"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve_hub() as served:
        yield served


@pytest.fixture
def volumes(workspace: Workspace) -> Workspace:
    write_jsonl(workspace.datasets / "reviews" / "train.jsonl", reviews(30))
    return workspace


def prepare(
    workspace: Workspace, hub: FakeHub, *, revision: str = "main", repo: str = REPO, data: DataSource | None = None
) -> Finished:
    spec = PrepareSpec(
        base_model=HubModel(repo=repo, revision=revision),
        train=(data or ClaimFile(claim="reviews", path="train.jsonl"),),
        task=ClassificationTask(labels=LABELS),
        max_sequence_length=256,
    )
    return workspace.run(workspace.config(spec, runtime=Runtime(device="cpu", hub_endpoint=hub.endpoint)))


def test_a_branch_is_resolved_to_its_commit_and_only_data_is_fetched(
    volumes: Workspace, hub: FakeHub, tiny_model: Path
) -> None:
    repository = hub.add_directory(REPO, tiny_model)
    repository.files |= {
        "modeling_tiny.py": b"raise SystemExit('code of a repository was run')",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"the weights once more",
        "README.md": b"# tiny",
        "original/params.json": b"{}",
    }
    finished = prepare(volumes, hub)
    assert finished.code == 0, finished.log
    assert finished.outcome.facts["revision"] == repository.commit
    stored = volumes.artifacts / "base" / "acme--tiny" / repository.commit
    assert finished.json("base.json")["path"] == str(stored)
    assert sorted(path.name for path in stored.iterdir()) == sorted(path.name for path in tiny_model.iterdir())
    assert (stored / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert (stored / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_model_that_is_there_is_not_fetched_again(volumes: Workspace, hub: FakeHub, tiny_model: Path) -> None:
    commit = hub.add_directory(REPO, tiny_model).commit
    assert prepare(volumes, hub, revision=commit).code == 0
    shutil.rmtree(volumes.artifacts / "prepare")
    hub.requests.clear()
    again = prepare(volumes, hub, revision=commit)
    assert again.code == 0, again.log
    assert hub.requests == []


def test_a_token_opens_a_gated_model(volumes: Workspace, hub: FakeHub, tiny_model: Path) -> None:
    hub.add_directory(REPO, tiny_model, token="secret-word")
    (volumes.root / "hub-token").write_text("secret-word\n", encoding="utf-8")
    finished = prepare(volumes, hub)
    assert finished.code == 0, finished.log
    assert "secret-word" not in finished.log


@pytest.mark.parametrize(("token", "says"), [(None, "give a token"), ("wrong", "ask for access")])
def test_a_gated_model_without_the_right_token_is_refused(
    volumes: Workspace, hub: FakeHub, tiny_model: Path, token: str | None, says: str
) -> None:
    hub.add_directory(REPO, tiny_model, token="secret-word")
    if token:
        (volumes.root / "hub-token").write_text(token, encoding="utf-8")
    finished = prepare(volumes, hub)
    assert (finished.code, finished.reason) == (ExitCode.INVALID_CONFIG, "HubAccessDenied")
    assert REPO in finished.message and says in finished.message and "tokenSecret" in finished.message


def test_a_repository_or_a_revision_that_is_not_there_is_named(
    volumes: Workspace, hub: FakeHub, tiny_model: Path
) -> None:
    hub.add_directory(REPO, tiny_model)
    (volumes.root / "hub-token").write_text("anything", encoding="utf-8")
    absent = prepare(volumes, hub, repo="acme/absent")
    assert (absent.code, absent.reason) == (ExitCode.INVALID_CONFIG, "HubNotFound")
    assert "acme/absent@main" in absent.message and "no such repository" in absent.message
    revision = prepare(volumes, hub, revision="v9")
    assert (revision.code, revision.reason) == (ExitCode.INVALID_CONFIG, "HubNotFound")
    assert "acme/tiny@v9" in revision.message and "no such revision" in revision.message


def test_a_hub_that_fails_is_tried_again_later(volumes: Workspace, hub: FakeHub) -> None:
    hub.status = 503
    finished = prepare(volumes, hub)
    assert (finished.code, finished.reason) == (ExitCode.UNAVAILABLE, "HubUnavailable")
    assert "503" in finished.message


def test_a_hub_that_is_not_there_is_tried_again_later(volumes: Workspace) -> None:
    nobody = FakeHub(endpoint="http://127.0.0.1:9")
    finished = prepare(volumes, nobody)
    assert (finished.code, finished.reason) == (ExitCode.UNAVAILABLE, "HubUnreachable")
    assert "http://127.0.0.1:9" in finished.message


def test_weights_that_arrive_broken_are_not_kept(volumes: Workspace, hub: FakeHub, tiny_model: Path) -> None:
    repository = hub.add_directory(REPO, tiny_model, corrupt=frozenset({"model.safetensors"}))
    finished = prepare(volumes, hub)
    assert (finished.code, finished.reason) == (ExitCode.UNAVAILABLE, "DownloadCorrupt")
    repository.corrupt = frozenset()
    again = prepare(volumes, hub)
    assert again.code == 0, again.log


def test_a_model_with_pickles_only_is_refused_before_they_are_fetched(
    volumes: Workspace, hub: FakeHub, tiny_model: Path
) -> None:
    repository = hub.add_directory(REPO, tiny_model)
    repository.files["pytorch_model.bin"] = repository.files.pop("model.safetensors")
    finished = prepare(volumes, hub)
    assert (finished.code, finished.reason) == (ExitCode.INVALID_CONFIG, "NotSafetensors")
    assert "pytorch_model.bin" in finished.message
    assert "pytorch_model.bin" not in hub.downloaded()


def test_a_data_set_follows_the_configuration_in_its_card(volumes: Workspace, hub: FakeHub, tiny_model: Path) -> None:
    hub.add_directory(REPO, tiny_model)
    rows = "".join(json.dumps(row) + "\n" for row in reviews(30)).encode()
    card = "---\nconfigs:\n- config_name: short\n  data_files:\n  - split: train\n    path: some/rows-*.jsonl\n---\n"
    files = {
        "README.md": card.encode(),
        "some/rows-0.jsonl": rows,
        "other/train.jsonl": b"not for this subset",
        "load.py": b"raise SystemExit('code of a repository was run')",
    }
    commit = hub.add_dataset("acme/reviews", files).commit
    finished = prepare(volumes, hub, data=HubDataset(repo="acme/reviews", revision="main", subset="short"))
    assert finished.code == 0, finished.log
    sources = [row["source"] for row in finished.rows("train.parquet")]
    assert all(source.startswith(f"acme/reviews@{commit[:12]}: some/rows-0.jsonl:") for source in sources)
    assert not (finished.directory / "downloads").exists()


def test_a_data_set_without_a_card_goes_by_the_names_of_its_files(
    volumes: Workspace, hub: FakeHub, tiny_model: Path
) -> None:
    hub.add_directory(REPO, tiny_model)
    train = gzip.compress("".join(json.dumps(row) + "\n" for row in reviews(30)).encode())
    hub.add_dataset("acme/reviews", {"data/train.jsonl.gz": train, "data/test.jsonl": b"{}"})
    finished = prepare(volumes, hub, data=HubDataset(repo="acme/reviews", revision="main"))
    assert finished.code == 0, finished.log


def test_a_data_set_that_is_only_a_script_is_refused(volumes: Workspace, hub: FakeHub) -> None:
    hub.add_dataset("acme/reviews", {"reviews.py": b"raise SystemExit('code of a repository was run')"})
    finished = prepare(volumes, hub, data=HubDataset(repo="acme/reviews", revision="main"))
    assert (finished.code, finished.reason) == (ExitCode.INVALID_DATA, "DatasetNotFound")
    assert "reviews.py" in finished.message and "never runs" in finished.message
