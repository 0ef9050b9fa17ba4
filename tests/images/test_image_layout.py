"""The OCI layout on disk: names, shared blobs, and what pruning leaves."""

import hashlib
import json
from pathlib import Path

import pytest
from tuneserve_images.layout import Layout, with_image


def store(layout: Layout, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    (layout.blobs / digest).write_bytes(content)
    return f"sha256:{digest}"


def build(layout: Layout, reference: str, *layers: bytes, folder: Path) -> None:
    """What a builder leaves: the blobs, and an index with one image under a name of its own."""
    scratch = layout.scratch(folder)
    config = store(scratch, f"config of {reference}".encode())
    manifest = {"config": {"digest": config}, "layers": [{"digest": store(scratch, layer)} for layer in layers]}
    digest = store(scratch, json.dumps(manifest).encode())
    (scratch.folder / "index.json").write_text(
        json.dumps({"manifests": [{"digest": digest, "mediaType": "m", "size": 1, "annotations": {"other": "x"}}]})
    )
    layout.add(reference, built=scratch)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "oci")
    build(layout, "tuneserve/trainer:1", b"torch", b"code 1", folder=tmp_path / "a")
    build(layout, "tuneserve/server:1", b"torch", b"vllm", folder=tmp_path / "b")
    return layout


def contents(layout: Layout) -> set[bytes]:
    return {file.read_bytes() for file in layout.blobs.iterdir()}


def test_images_carry_the_names_that_the_kubelet_looks_for(layout: Layout) -> None:
    names = [entry["annotations"]["io.containerd.image.name"] for entry in layout.entries]
    assert names == ["docker.io/tuneserve/trainer:1", "docker.io/tuneserve/server:1"]
    assert layout.has("tuneserve/trainer:1") and not layout.has("tuneserve/trainer:2")


def test_a_new_tag_replaces_the_old_one_and_prune_frees_its_layers(layout: Layout, tmp_path: Path) -> None:
    build(layout, "tuneserve/trainer:2", b"torch", b"code 2", folder=tmp_path / "c")
    assert not layout.has("tuneserve/trainer:1")
    assert b"code 1" in contents(layout)
    assert layout.prune() > len(b"code 1")
    assert {b"torch", b"code 2", b"vllm"} <= contents(layout)
    assert b"code 1" not in contents(layout)
    assert layout.has("tuneserve/trainer:2") and layout.has("tuneserve/server:1")
    assert layout.prune() == 0


def test_an_image_that_lost_a_layer_is_not_there(layout: Layout) -> None:
    next(file for file in layout.blobs.iterdir() if file.read_bytes() == b"torch").unlink()
    assert not layout.has("tuneserve/trainer:1")


def test_what_an_interrupted_build_left_is_pruned(layout: Layout) -> None:
    (layout.blobs.parent / "oci-put-blob123").write_bytes(b"half a layer")
    assert layout.prune() == len(b"half a layer")


def test_nothing_is_there_before_the_first_build(tmp_path: Path) -> None:
    empty = Layout(tmp_path / "none")
    assert empty.entries == [] and not empty.has("tuneserve/trainer:1") and empty.prune() == 0


def test_repositories_with_a_common_beginning_are_told_apart() -> None:
    first = with_image([], reference="tuneserve/train:1", entry={"digest": "a"})
    both = with_image(first, reference="tuneserve/trainer:1", entry={"digest": "b"})
    assert [entry["digest"] for entry in both] == ["a", "b"]
