"""Everything up to a running operator: the cluster's programs, the images, the cluster, the chart.

With CLUSTER=external nothing is built: TUNESERVE_VALUES names a file of chart values with images that cluster can pull.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tuneserve_demo.tools import EXTERNAL, ROOT, DemoError, Kubectl, headline, output, run, say, tool

SYSTEM = "tuneserve-system"
RELEASE = "tuneserve"
CHART = ROOT / "charts/tuneserve"
CLUSTER = ROOT / "cluster/cluster"
IMAGES = ROOT / "images/build"
# Bytes: two generations of images side by side, when even the layer of torch is new.
SHORT_OF_DISK = 20 << 30


def install() -> None:
    """Install TuneServe from this checkout; quick when everything is there. Raises DemoError."""
    if EXTERNAL:
        headline("The chart, on the cluster of KUBECONFIG")
        values = os.environ.get("TUNESERVE_VALUES")
        if not values:
            raise DemoError(
                "CLUSTER=external needs TUNESERVE_VALUES: a file of chart values with images that the cluster can pull "
                "(image.repository, image.tag, images.trainer, images.server) and a defaultProfile it has nodes for"
            )
        helm(Path(values))
        return
    headline("Programs and images (about 25 min on two cores the first time, later only what changed)")
    images = build()
    headline("Cluster")
    run(CLUSTER, "up", failure="the cluster does not start")
    if shutil.disk_usage(ROOT).free < SHORT_OF_DISK:
        # Else they stay until the new ones are in, which share most of their layers.
        forget_old_images(images)
    run(CLUSTER, "load-image", output(IMAGES, "--layout").strip(), failure="the images cannot be loaded")
    headline("TuneServe")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(chart_values(images), file)
        file.flush()
        helm(Path(file.name))
    forget_old_images(images)


def build() -> dict[str, str]:
    """The cluster's programs and the images beside each other: compiling waits for the processor, images for disks.

    Returns the images' names.
    """
    images = subprocess.Popen([IMAGES, "all"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        run(CLUSTER, "build", failure="the cluster's programs cannot be built")
    except BaseException:
        images.terminate()
        raise
    finally:
        names, _ = images.communicate()
    if images.returncode:
        raise DemoError("the images cannot be built: see above")
    return dict(json.loads(names))


def chart_values(images: Mapping[str, str]) -> dict[str, object]:
    """Values for a cluster without GPUs that has these images and reaches no registry."""
    repository, _, tag = images["operator"].rpartition(":")
    return {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        "images": {"trainer": images["trainer"], "server": images["server"]},
        "defaultProfile": "cpu",
        "profiles": {"cpu": {"imagePullPolicy": "Never"}},
    }


def helm(values: Path) -> None:
    command: list[str | Path] = [
        *tool("helm"),
        "upgrade",
        "--install",
        RELEASE,
        CHART,
        "--namespace",
        SYSTEM,
        "--create-namespace",
    ]
    try:
        output(*command, "--values", values, "--wait", "--timeout", "3m")
    except DemoError as error:
        raise DemoError(f"{error}\n{why_not_running()}") from error
    say(f"The operator runs in the namespace {SYSTEM}.")


def why_not_running() -> str:
    """The operator's pods, and the last words of the one that does not start."""
    kubectl = Kubectl(SYSTEM)
    try:
        pods = kubectl.run("get", "pods")
        return f"{pods}\n{kubectl.run('logs', f'deployment/{RELEASE}', '--tail=15')}"
    except DemoError as error:
        return str(error)


def forget_old_images(images: Mapping[str, str]) -> None:
    """Free the disk of images that neither this checkout nor any pod uses."""
    template = "jsonpath={.items[*].spec.containers[*].image} {.items[*].spec.template.spec.containers[*].image}"
    used = Kubectl(SYSTEM).run("get", "pods,deployments", "--all-namespaces", "-o", template)
    output(CLUSTER, "prune-images", *sorted({*images.values(), *used.split()}))
