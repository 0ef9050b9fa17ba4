"""What the cluster's package decides without a cluster: addresses, image names, which blobs travel."""

from __future__ import annotations

import io
import json
import os
import tarfile
from ipaddress import IPv4Network
from itertools import combinations
from pathlib import Path

import pytest

from tuneserve_cluster import oci
from tuneserve_cluster.addresses import MAX_CLUSTERS, AddressPlan, free_index, parse_routes
from tuneserve_cluster.build import parts, source_hash
from tuneserve_cluster.errors import ClusterError
from tuneserve_cluster.images import Layer, Layout
from tuneserve_cluster.kwok import fake_node
from tuneserve_cluster.leftovers import own_namespaces
from tuneserve_cluster.settings import Cluster, write_if_changed


def test_no_two_clusters_share_an_address() -> None:
    plans = [AddressPlan(index) for index in range(MAX_CLUSTERS)]
    networks = [network for plan in plans for network in plan.networks]
    assert not [pair for pair in combinations(networks, 2) if pair[0].overlaps(pair[1])]
    assert all(len(plan.interface) <= 15 for plan in plans)


def test_an_index_is_free_if_no_cluster_and_no_route_has_it() -> None:
    assert free_index([], []) == 0
    assert free_index([0, 1], []) == 2
    assert free_index([], [IPv4Network("10.201.0.0/24")]) == 1
    assert free_index([], [IPv4Network("10.0.0.0/8")]) is None


def test_routes_are_read_without_the_default_route() -> None:
    lines = ["default via 192.0.2.1 dev eth0", "10.200.0.0/24 dev x", "local 127.0.0.1 dev lo table local"]
    said = "\n".join([*lines, "unreachable 10.9.0.0/16"])
    assert parse_routes(said) == [IPv4Network("10.200.0.0/24"), IPv4Network("127.0.0.1/32"), IPv4Network("10.9.0.0/16")]


def test_a_namespace_number_that_another_cluster_got_later_is_not_its_own(tmp_path: Path) -> None:
    died, lives = (Cluster(name, tmp_path) for name in ("died", "lives"))
    for cluster, began, inodes in ((died, 100, ["net:[1]", "mnt:[2]"]), (lives, 200, ["net:[1]", "mnt:[3]"])):
        cluster.state.mkdir(parents=True)
        cluster.namespaces_file.write_text(json.dumps(inodes))
        os.utime(cluster.namespaces_file, (began, began))
    assert own_namespaces(died) == {"mnt:[2]"}
    assert own_namespaces(lives) == {"net:[1]", "mnt:[3]"}


@pytest.mark.parametrize(
    ("written", "looked_up"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1", "docker.io/library/busybox:1"),
        ("tuneserve/operator:abc", "docker.io/tuneserve/operator:abc"),
        ("localhost/a:1", "localhost/a:1"),
        ("localhost:5000/a", "localhost:5000/a:latest"),
        ("ghcr.io/a/b:1", "ghcr.io/a/b:1"),
        ("a/b@sha256:12", "docker.io/a/b@sha256:12"),
    ],
)
def test_names_are_those_that_the_kubelet_looks_up(written: str, looked_up: str) -> None:
    assert oci.normalise(written) == looked_up


def test_a_tag_alone_is_no_name() -> None:
    with pytest.raises(ClusterError, match="no full name"):
        oci.image_name({"digest": "sha256:1", "annotations": {"org.opencontainers.image.ref.name": "latest"}})


def layer(text: str) -> bytes:
    made = Layer()
    made.file("file", text.encode())
    return made.bytes()


def layout(folder: Path, **images: list[str]) -> Path:
    made = Layout(folder)
    for name, layers in images.items():
        made.image(f"tuneserve/{name}:1", [layer(text) for text in layers])
    made.close()
    return folder


def test_only_what_the_store_lacks_travels(tmp_path: Path) -> None:
    source = oci.Folder(layout(tmp_path, trainer=["base", "trainer"], server=["base", "server"]))
    trainer, server = oci.images(source)
    assert trainer.name == "docker.io/tuneserve/trainer:1"
    everything = oci.missing_blobs([trainer, server], set())
    assert len(everything) == 7, "two manifests, two configurations, three layers: the shared one once"
    changed = oci.missing_blobs([server], set(trainer.blobs))
    assert len(changed) == 3
    assert not oci.is_new(trainer, {trainer.name: trainer.digest})
    assert oci.is_new(trainer, {trainer.name: server.digest})


def test_the_stream_is_a_layout_with_full_names(tmp_path: Path) -> None:
    source = oci.Folder(layout(tmp_path, operator=["base", "top"]))
    (image,) = oci.images(source)
    stream = io.BytesIO()
    oci.write_tar(stream, source, [image], [image.digest])
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        assert tar.getnames() == ["oci-layout", "index.json", oci.blob_path(image.digest)]
        index = json.load(tar.extractfile("index.json"))  # type: ignore[arg-type]
    assert index["manifests"][0]["annotations"]["io.containerd.image.name"] == "docker.io/tuneserve/operator:1"


def test_an_archive_is_read_as_its_folder(tmp_path: Path) -> None:
    folder = layout(tmp_path / "layout", operator=["base"])
    archive = tmp_path / "operator.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, arcname=".")
    with oci.open_source(archive) as packed, oci.open_source(folder) as plain:
        assert oci.images(packed) == oci.images(plain)


def test_what_is_no_image_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for path in (tmp_path, tmp_path / "text", tmp_path / "absent"):
        with pytest.raises(ClusterError, match=str(path)), oci.open_source(path):
            pass


def test_the_same_files_make_the_same_image(tmp_path: Path) -> None:
    one, two = (oci.images(oci.Folder(layout(tmp_path / name, a=["x"]))) for name in ("one", "two"))
    assert one == two


def test_fake_nodes_have_gpus_but_no_node_info() -> None:
    node = fake_node(3, gpus=8)
    assert node["status"]["capacity"]["nvidia.com/gpu"] == "8"
    assert node["metadata"]["labels"]["nvidia.com/gpu.product"] == "NVIDIA-GeForce-RTX-4090"
    assert "nodeInfo" not in node["status"]


def test_every_version_is_pinned_and_the_hash_is_stable() -> None:
    assert parts()[0].title.startswith("kube-apiserver")
    assert source_hash() == source_hash()


@pytest.mark.parametrize("name", ["", "A", "a/b", "x" * 31, "-a"])
def test_bad_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cluster name"):
        Cluster(name, tmp_path)


def test_the_cache_may_be_neither_too_deep_nor_under_run() -> None:
    for cache in ("/run/x", "/" + "x" * 90):
        with pytest.raises(ClusterError, match="TUNESERVE_CACHE"):
            Cluster("a", Path(cache))


def test_a_file_is_not_rewritten_with_the_same_bytes(tmp_path: Path) -> None:
    write_if_changed(tmp_path / "f", "a")
    before = (tmp_path / "f").stat()
    write_if_changed(tmp_path / "f", "a")
    assert (tmp_path / "f").stat().st_ino == before.st_ino
