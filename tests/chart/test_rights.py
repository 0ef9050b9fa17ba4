"""What the chart lets the operator do."""

import pytest

from chart.release import Helm, only

pytestmark = pytest.mark.controlplane


def test_no_rights_beyond_what_the_operator_does(helm: Helm) -> None:
    objects = helm.template({"rbac": {"aggregate": False}})
    roles = [item for item in objects if item["kind"] in ("Role", "ClusterRole")]
    granted = {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert "*" not in {part for right in granted for part in right}
    resources = {resource for _, resource, _ in granted}
    assert resources.isdisjoint({"secrets", "pods/exec", "roles", "clusterroles", "customresourcedefinitions", "nodes"})
    assert {verb for _, resource, verb in granted if resource == "persistentvolumeclaims"} == {"get", "create", "patch"}
    assert {verb for _, resource, verb in granted if resource == "pods"} == {"list", "watch"}
    assert {verb for group, resource, verb in granted if group == "tuneserve.dev" and "/" not in resource} == {
        "get",
        "list",
        "watch",
    }


def test_the_same_rights_in_each_watched_namespace(helm: Helm) -> None:
    everywhere = only(helm.template(), "ClusterRole")
    objects = helm.template({"watchNamespaces": ["a", "b"], "rbac": {"aggregate": False}})
    assert [item for item in objects if item["kind"].startswith("ClusterRole")] == []
    roles = [item for item in objects if item["kind"] == "Role" and item["metadata"]["name"] == "tuneserve"]
    assert {role["metadata"]["namespace"] for role in roles} == {"a", "b"}
    assert all(role["rules"] == everywhere["rules"] for role in roles)
    bindings = [item for item in objects if item["kind"] == "RoleBinding" and item["metadata"]["name"] == "tuneserve"]
    assert {binding["metadata"]["namespace"] for binding in bindings} == {"a", "b"}
    assert all(binding["subjects"][0]["namespace"] == "tuneserve-system" for binding in bindings)


def test_rights_can_be_left_to_others(helm: Helm) -> None:
    objects = helm.template(
        {"rbac": {"create": False, "aggregate": False}, "serviceAccount": {"create": False, "name": "given"}}
    )
    kinds = {item["kind"] for item in objects}
    assert kinds == {"CustomResourceDefinition", "ConfigMap", "Deployment"}
    assert only(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "given"
