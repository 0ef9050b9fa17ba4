"""The chart on a real API server, and the operator with no other rights than the chart gives it."""

import json
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.release import CHART, CLUSTER, NAMESPACE, RELEASE, Helm, Object, cluster, config_text
from support.kubectl import Kubectl, KubectlError
from support.operators import OperatorProcess

pytestmark = pytest.mark.controlplane

#: No node runs it; the operator of the tests is a process.
VALUES: Object = {"replicas": 0, "defaultProfile": "cpu", "progressIntervalSeconds": 1}
ROWS = '{"text": "good", "label": "a"}\n'

Install = Callable[[Object], None]


@pytest.fixture
def team(kubectl: Kubectl) -> Iterator[Kubectl]:
    """A namespace of users, another one in each test."""
    name = f"team-{uuid.uuid4().hex[:8]}"
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield Kubectl(command=kubectl.command, namespace=name)
    kubectl.run("delete", "namespace", name, "--wait=false")


@pytest.fixture
def install(helm: Helm, kubectl: Kubectl, team: Kubectl) -> Iterator[Install]:
    """Installs or upgrades the release; it is uninstalled at the end."""
    kubectl.run("delete", "serviceaccount", RELEASE, "--ignore-not-found")

    def install(values: Object) -> None:
        helm.run("upgrade", "--install", RELEASE, str(CHART), values={**VALUES, **values})
        kubectl.run("wait", "--for=condition=Established", "--timeout=60s", "crd/finetunes.tuneserve.dev")
        # Admission learns of new kinds later than the API server itself, and until then lets them own nothing.
        _eventually(lambda: all(_may_own(team, kind) for kind in ("FineTune", "ModelServe")), bool)

    yield install
    helm.run("uninstall", RELEASE, "--ignore-not-found")


def test_install_upgrade_uninstall(install: Install, helm: Helm, kubectl: Kubectl, team: Kubectl) -> None:
    install({})
    team.apply(_finetune())
    before = kubectl.get("deployment", RELEASE)
    install({"workers": 3})
    after = kubectl.get("deployment", RELEASE)
    assert before is not None and after is not None
    assert _checksum(before) != _checksum(after)
    assert "TuneServe 0.1.0 looks after all namespaces" in helm.run("status", RELEASE)

    helm.run("uninstall", RELEASE)
    assert kubectl.get("deployment", RELEASE) is None
    assert team.get("finetune", "reviews") is not None, "the kinds, and with them all objects, stay"
    install({})  # and the release can come back to them


#: Role, verb, resource, and whether who has that role in a namespace may do so there.
RIGHTS = (
    ("view", "list", "finetunes.tuneserve.dev", True),
    ("view", "get", "modelserves.tuneserve.dev/scale", True),
    ("view", "create", "finetunes.tuneserve.dev", False),
    ("edit", "create", "finetunes.tuneserve.dev", True),
    ("edit", "patch", "modelserves.tuneserve.dev/scale", True),
    ("edit", "patch", "finetunes.tuneserve.dev/status", False),
    ("admin", "delete", "modelserves.tuneserve.dev", True),
)


def test_rights_of_users(install: Install, team: Kubectl) -> None:
    install({})
    for role in ("view", "edit", "admin"):
        team.run("create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}er")
    # The controller adds the rules to the cluster's roles in its own time.
    _eventually(lambda: [right for right in RIGHTS if not _holds(team, *right)], lambda broken: not broken)


@pytest.mark.parametrize("everywhere", [True, False], ids=["all namespaces", "one namespace"])
def test_the_operator_needs_no_other_rights(
    install: Install,
    helm: Helm,
    kubectl: Kubectl,
    team: Kubectl,
    tmp_path: Path,
    everywhere: bool,
) -> None:
    values = {"watchNamespaces": [] if everywhere else [team.namespace]}
    install(values)
    kubectl.run("delete", "lease", RELEASE, "--ignore-not-found")
    operator = OperatorProcess(
        directory=tmp_path,
        kubeconfig=_kubeconfig(kubectl, tmp_path),
        config=yaml.safe_load(config_text(helm.template({**VALUES, **values}))),
        lease_namespace=NAMESPACE,
        name="as-installed",
    )
    operator.start()
    try:
        operator.wait_ready()
        _live_through_everything(team, operator)
        assert operator.alive(), operator.tail()
        forbidden = [line for line in operator.lines() if "forbidden" in json.dumps(line).lower()]
        assert forbidden == []
        refused = [line for line in operator.get("/metrics")[1].splitlines() if 'code="403"' in line]
        assert refused == []
        rules = [rule for item in helm.template({**VALUES, **values}) if _is_own_role(item) for rule in item["rules"]]
        assert _granted(rules) - _used(operator) == {
            ("events", "get"),  # an event that happens again is counted
            ("events", "patch"),
            ("finetunes/finalizers", "update"),  # to own objects so that they block its deletion
            ("modelserves/finalizers", "update"),
        }
        operator.terminate()
        assert operator.wait() == 0
        lease = kubectl.get("lease", RELEASE)
        assert lease is not None and not lease["spec"].get("holderIdentity"), "it gives the lease up at its end"
    finally:
        if operator.alive():
            operator.kill()


def test_kinds_that_are_not_kept_go_with_the_release(install: Install, helm: Helm, kubectl: Kubectl) -> None:
    install({"crds": {"keep": False}})
    helm.run("uninstall", RELEASE, "--wait")
    assert kubectl.get("crd", "finetunes.tuneserve.dev") is None


def _live_through_everything(team: Kubectl, operator: OperatorProcess) -> None:
    """Each kind of object is made, changed and removed once."""
    team.apply(_quota())
    team.wait("resourcequota", "no-pods", lambda quota: "hard" in quota.get("status", {}))
    team.apply(_claim("base-model"), _rows(ROWS), _finetune())
    first = _eventually(lambda: team.list("jobs"), bool)[0]["metadata"]["name"]
    # The Job gets no pod, and the operator asks why.
    _eventually(lambda: ("events", "list") in _used(operator), bool)
    team.delete("resourcequota", "no-pods")
    # Other data is another input: its Job takes the place of the one that runs.
    team.apply(_rows(ROWS * 2))
    team.run("annotate", "finetune", "reviews", "seen=again")
    _eventually(
        lambda: [job["metadata"]["name"] for job in team.list("jobs")], lambda names: names and first not in names
    )
    team.patch("finetune", "reviews", {"spec": {"suspend": True}})
    team.wait("job", team.list("jobs")[0]["metadata"]["name"], lambda job: job["spec"].get("suspend") is True)

    serve = {"model": {"claim": {"name": "base-model"}}}
    team.apply(
        {"apiVersion": "tuneserve.dev/v1alpha1", "kind": "ModelServe", "metadata": {"name": "chat"}, "spec": serve}
    )
    _eventually(lambda: team.get("deployment", "chat"), bool)
    _eventually(lambda: team.get("service", "chat"), bool)
    team.run("scale", "modelserve/chat", "--replicas=2")
    team.wait("deployment", "chat", lambda deployment: deployment["spec"]["replicas"] == 2)
    team.wait("modelserve", "chat", lambda found: "conditions" in found.get("status", {}))
    _eventually(lambda: team.list("events.events.k8s.io"), bool)

    team.delete("finetune", "reviews")
    team.delete("modelserve", "chat")
    _eventually(lambda: team.list("jobs"), lambda jobs: not jobs)
    _eventually(lambda: team.get("deployment", "chat"), lambda found: found is None)
    assert team.get("persistentvolumeclaim", "reviews-artifacts") is not None


def _may_own(kubectl: Kubectl, kind: str) -> bool:
    """Whether an object can say that one of the kind owns it and waits for it."""
    owner = {
        "apiVersion": "tuneserve.dev/v1alpha1",
        "kind": kind,
        "name": "any",
        "uid": "0",
        "blockOwnerDeletion": True,
    }
    owned = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owned", "ownerReferences": [owner]}}
    try:
        kubectl.run("create", "--dry-run=server", "-f", "-", stdin=json.dumps(owned))
    except KubectlError:
        return False
    return True


def _is_own_role(item: Object) -> bool:
    return item["kind"] in ("Role", "ClusterRole") and item["metadata"]["name"] in (RELEASE, f"{RELEASE}-lease")


def _granted(rules: list[Object]) -> set[tuple[str, str]]:
    return {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}


def _used(operator: OperatorProcess) -> set[tuple[str, str]]:
    """Resource and verb of everything that the operator has asked for."""
    verbs = {"apply": ("create", "patch"), "apply_status": ("patch",)}
    kinds = ("finetunes", "modelserves", "jobs", "pods", "deployments")
    watched = {(resource, verb) for resource in kinds for verb in ("list", "watch")}
    requests = re.findall(
        r'tuneserve_kube_requests_total{code="\d+",kind="(\w+)",verb="(\w+)"}', operator.get("/metrics")[1]
    )
    return watched | {
        (f"{kind.lower()}s" + ("/status" if verb == "apply_status" else ""), real)
        for kind, verb in requests
        for real in verbs.get(verb, (verb,))
    }


def _finetune() -> Object:
    spec = {
        "baseModel": {"claim": {"name": "base-model"}},
        "dataset": {"train": [{"configMap": {"name": "rows", "key": "rows.jsonl"}}]},
        "task": {"classification": {"labels": ["a", "b"]}},
    }
    return {"apiVersion": "tuneserve.dev/v1alpha1", "kind": "FineTune", "metadata": {"name": "reviews"}, "spec": spec}


def _quota() -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "no-pods"},
        "spec": {"hard": {"pods": "0"}},
    }


def _rows(text: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "rows"}, "data": {"rows.jsonl": text}}


def _claim(name: str) -> Object:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def _kubeconfig(kubectl: Kubectl, directory: Path) -> Path:
    """A kubeconfig of the operator's service account, and of nobody else."""
    admin = yaml.safe_load(Path(cluster("kubeconfig", "--name", CLUSTER)).read_text())
    token = kubectl.run("create", "token", RELEASE, "--duration=1h").strip()
    (context,) = admin["contexts"]
    admin["users"] = [{"name": context["context"]["user"], "user": {"token": token}}]
    path = directory / "kubeconfig"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(admin))
    with pytest.raises(KubectlError, match=r"[Ff]orbidden"):
        Kubectl(command=("kubectl", "--kubeconfig", str(path)), namespace=NAMESPACE).list("secrets")
    return path


def _checksum(deployment: Object) -> str:
    return deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"]


def _holds(kubectl: Kubectl, role: str, verb: str, resource: str, allowed: bool) -> bool:
    name, _, subresource = resource.partition("/")
    question = ["auth", "can-i", verb, name, f"--as={role}er", f"--subresource={subresource}"]
    command = [*kubectl.command, "--namespace", kubectl.namespace, *question]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() == ("yes" if allowed else "no")


def _eventually(look: Callable[[], Any], until: Callable[[Any], Any], *, timeout: float = 60) -> Any:
    """What `look` sees as soon as `until` holds, or at the end of the time."""
    deadline = time.monotonic() + timeout
    while not until(seen := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"never so in {timeout:.0f} s; last seen: {seen}")
        time.sleep(0.3)
    return seen
