"""The rules of the Kubernetes API conventions, over every node of every schema."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneserve.api import schema as generator

ROOT = Path(__file__).resolve().parents[2]
CRDS = {name: yaml.safe_load(text) for name, text in generator.manifests().items()}
Node = tuple[str, dict[str, Any]]

CAMEL_CASE = re.compile("[a-z][a-zA-Z0-9]*")
#: What the conventions have another form for: conditions, `...Time`, `...Seconds`, and words that say what happens.
FORBIDDEN_NAMES = re.compile("^phase$|Timestamp$|Duration$|^(enable|disable)[A-Z]")


def version(crd: dict[str, Any]) -> dict[str, Any]:
    (only,) = crd["spec"]["versions"]
    return only


def root(crd: dict[str, Any]) -> dict[str, Any]:
    return version(crd)["schema"]["openAPIV3Schema"]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[Node]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


NODES = [
    (crd["spec"]["names"]["kind"] + path, node)
    for crd in CRDS.values()
    for part in ("spec", "status")
    for path, node in nodes(root(crd)["properties"][part], f".{part}")
]
each_crd = pytest.mark.parametrize("crd", CRDS.values(), ids=CRDS.keys())


def test_the_files_are_what_the_models_say() -> None:
    assert generator.stale(ROOT) == [], "run `make crds`"


def test_a_drift_is_noticed(tmp_path: Path) -> None:
    generator.write(tmp_path)
    assert generator.stale(tmp_path) == []
    edited, removed, foreign = (
        tmp_path / "crds/tuneserve.dev_finetunes.yaml",
        tmp_path / "charts/tuneserve/files/crds/tuneserve.dev_modelserves.yaml",
        tmp_path / "crds/tuneserve.dev_others.yaml",
    )
    edited.write_text(edited.read_text().replace("maximum: 512", "maximum: 513"))
    removed.unlink()
    foreign.write_text("kind: CustomResourceDefinition\n")
    assert {tmp_path / path for path in generator.stale(tmp_path)} == {edited, removed, foreign}


def test_the_generator_is_deterministic() -> None:
    assert generator.manifests() == generator.manifests()


@pytest.mark.parametrize("text", generator.manifests().values(), ids=generator.manifests().keys())
def test_the_manifest_fits_into_an_annotation(text: str) -> None:
    assert len(text.encode()) < generator.SIZE_LIMIT


def test_every_field_is_described() -> None:
    # A list or a map describes its plain items.
    described = [node for node in NODES if not (node[0].endswith(("]", "}")) and node[1]["type"] != "object")]
    sentence = re.compile('[A-Z][^\n`]*[."]')
    assert [path for path, node in described if not sentence.fullmatch(node.get("description", ""))] == []


def test_everything_is_bounded() -> None:
    assert [path for path, node in NODES if not is_bounded(node)] == []


def is_bounded(node: dict[str, Any]) -> bool:
    match node["type"]:
        case "string":
            return "maxLength" in node or "enum" in node or node.get("format") == "date-time"
        case "array":
            return "maxItems" in node
        case "integer":
            return {"minimum", "maximum", "format"} <= node.keys()
        case "object":
            return "maxProperties" in node or "additionalProperties" not in node
        case _:
            return True


def test_decimal_numbers_are_text() -> None:
    assert {node["type"] for _, node in NODES} == {"object", "array", "string", "integer", "boolean"}


def test_lists_say_how_they_are_merged() -> None:
    lists = [(path, node) for path, node in NODES if node["type"] == "array"]
    assert {node["x-kubernetes-list-type"] for _, node in lists} == {"atomic", "map"}
    keys = {path: node.get("x-kubernetes-list-map-keys", []) for path, node in lists}
    assert [path for path, node in lists if not set(keys[path]) <= set(node["items"].get("required", []))] == []


def test_names_follow_the_conventions() -> None:
    names = [(path, name) for path, node in NODES for name in node.get("properties", {})]
    assert [item for item in names if FORBIDDEN_NAMES.search(item[1]) or not CAMEL_CASE.fullmatch(item[1])] == []
    values = [(path, value) for path, node in NODES for value in node.get("enum", [])]
    assert [item for item in values if not re.fullmatch("[A-Za-z][A-Za-z0-9]*", item[1])] == []


def test_sentences_of_rules_say_what_must_be() -> None:
    rules = [(path, rule) for path, node in NODES for rule in node.get("x-kubernetes-validations", [])]
    assert [item for item in rules if not item[1]["message"].startswith("must ")] == []


@each_crd
def test_conditions_are_merged_by_type(crd: dict[str, Any]) -> None:
    conditions = root(crd)["properties"]["status"]["properties"]["conditions"]
    assert (conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"]) == ("map", ["type"])
    assert set(conditions["items"]["properties"]) == {
        "type",
        "status",
        "observedGeneration",
        "lastTransitionTime",
        "reason",
        "message",
    }


@each_crd
def test_status_is_a_subresource_that_nobody_must_write(crd: dict[str, Any]) -> None:
    assert version(crd)["subresources"]["status"] == {}
    assert root(crd)["required"] == ["spec"]
    assert "default" not in root(crd)["properties"]["status"]


@each_crd
def test_columns_show_fields_that_exist(crd: dict[str, Any]) -> None:
    for column in version(crd)["additionalPrinterColumns"]:
        if column["jsonPath"].startswith(".metadata."):
            continue
        found = resolve(root(crd), column["jsonPath"])
        assert found, f"{column['name']}: nothing is at {column['jsonPath']}"
        assert {node["type"] for node in found} == {column["type"]}


def test_the_scale_of_a_modelserve_shows_fields_that_exist() -> None:
    crd = CRDS["tuneserve.dev_modelserves.yaml"]
    paths = version(crd)["subresources"]["scale"]
    types = {name: [node["type"] for node in resolve(root(crd), path)] for name, path in paths.items()}
    assert types == {
        "specReplicasPath": ["integer"],
        "statusReplicasPath": ["integer"],
        "labelSelectorPath": ["string"],
    }


def resolve(schema: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """The schemas at a JSON path with names, `*`, `[*]` and `[?(@.name=="value")]`."""
    found = [schema]
    for step in re.findall(r"""\.\w+|\.\*|\[\*\]|\[\?\(@\.\w+=="\w+"\)\]""", path):
        if step == ".*":
            found = [child for node in found for child in node["properties"].values()]
        elif step.startswith("."):
            found = [node["properties"][step[1:]] for node in found if step[1:] in node.get("properties", {})]
        else:
            found = [node["items"] for node in found]
            for name in re.findall(r"@\.(\w+)", step):
                assert all(name in node["properties"] for node in found)
    return found
