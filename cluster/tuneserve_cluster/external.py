"""CLUSTER=external: the user has a cluster already; ours is not started, only theirs is looked at."""

from __future__ import annotations

import os
import shutil

from tuneserve_cluster.errors import ClusterError, run

LOAD_IMAGE = (
    "CLUSTER=external: images cannot be loaded into a cluster of your own; push them to a registry that it can reach "
    "and set the chart's image values to it"
)


def check() -> None:
    """Says which cluster it is, or why it cannot be reached."""
    kubeconfig = os.environ.get("KUBECONFIG")
    if not kubeconfig:
        raise ClusterError(
            "CLUSTER=external needs KUBECONFIG to name the cluster: export KUBECONFIG=/path/to/kubeconfig"
        )
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise ClusterError("CLUSTER=external needs kubectl on PATH")
    version = run(
        [kubectl, "version", "--request-timeout=10s"], f"the cluster of KUBECONFIG={kubeconfig} cannot be reached"
    )
    server = next((line for line in version.splitlines() if line.startswith("Server")), "Server Version: unknown")
    print(f"CLUSTER=external: the cluster of {kubeconfig} answers ({server}); nothing of it is started or stopped here")
