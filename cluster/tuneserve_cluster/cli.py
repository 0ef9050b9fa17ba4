"""The command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tuneserve_cluster import build, external
from tuneserve_cluster.errors import ClusterError
from tuneserve_cluster.lifecycle import Lifecycle, Wishes
from tuneserve_cluster.settings import DEFAULT_NAME, Cluster, cache_folder, is_external

PASSED_ON = ("kubectl", "helm")


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--name",
        default=os.environ.get("TUNESERVE_CLUSTER", DEFAULT_NAME),
        help="which cluster (default: %(default)s, or TUNESERVE_CLUSTER)",
    )
    top = argparse.ArgumentParser(prog="cluster", description="A real one-node Kubernetes in namespaces of its own.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[shared])

    add("build", "install Debian packages and build all binaries (about 8 minutes, once)")
    up = add("up", "start the cluster; idempotent")
    up.add_argument(
        "--control-plane", action="store_true", help="no kubelet and no containers: for tests on fake nodes"
    )
    up.add_argument("--fake-nodes", type=int, metavar="N", help="have exactly N fake nodes")
    up.add_argument("--fake-gpus", type=int, default=1, metavar="G", help="GPUs of each fake node (default: 1)")
    up.add_argument(
        "--hold-fake-jobs", action="store_true", help="pods of Jobs on fake nodes run until they are given an exit code"
    )
    up.add_argument("--gpus", type=int, metavar="G", help="pretend that the real node has G GPUs")
    down = add("down", "end the cluster and remove all it made, but for its images")
    down.add_argument("--all", action="store_true", help="every cluster of this cache, whatever its name")
    down.add_argument("--purge", action="store_true", help="remove its images, too")
    add("status", "show the components; exit code 0 if all is well")
    load = add("load-image", "load images into the cluster: OCI layout folders or oci-archives")
    load.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    add("images", "list the images in the cluster")
    prune = add("prune-images", "remove the images tuneserve/* that are not named")
    prune.add_argument("keep", nargs="*", metavar="KEEP")
    add("kubeconfig", "print the path of an admin kubeconfig")
    add("env", 'print lines for a shell: eval "$(cluster env)"')
    for name in PASSED_ON:
        commands.add_parser(name, help=f"run {name} against the cluster: cluster {name} [--name NAME] ARGS...")
    return top


def main(arguments: Sequence[str]) -> int:
    """Runs one command; errors become a sentence and exit code 1."""
    try:
        if arguments and arguments[0] in PASSED_ON:
            return pass_on(arguments[0], list(arguments[1:]))
        code = command(parser().parse_args(arguments))
        sys.stdout.flush()
        return code
    except ClusterError as error:
        print(error.report(), file=sys.stderr)
        return 1
    except BrokenPipeError:  # `cluster up | head -1`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def pass_on(tool: str, arguments: list[str]) -> int:
    """Becomes kubectl or helm; all but a leading --name is theirs."""
    name = os.environ.get("TUNESERVE_CLUSTER", DEFAULT_NAME)
    if arguments[:1] == ["--name"] and len(arguments) > 1:
        name, arguments = arguments[1], arguments[2:]
    elif arguments and arguments[0].startswith("--name="):
        name, arguments = arguments[0].removeprefix("--name="), arguments[1:]
    if is_external():
        os.execvp(tool, [tool, *arguments])
    cluster = existing(name)
    os.execve(cluster.bin / tool, [tool, *arguments], cluster.environment)


def all_names() -> list[str]:
    """Clusters that run, or left images behind."""
    folders = [*cache_folder().glob("clusters/*"), *cache_folder().glob("stores/*")]
    return sorted({folder.name for folder in folders if folder.is_dir()})


def existing(name: str) -> Cluster:
    cluster = Cluster(name, cache_folder())
    if not cluster.kubeconfig.exists():
        raise ClusterError(f"the cluster {name!r} is not up; run `cluster up`")
    return cluster


def command(options: argparse.Namespace) -> int:
    if is_external():
        return external_command(options)
    lifecycle = Lifecycle(Cluster(options.name, cache_folder()))
    match options.command:
        case "build":
            print(build.build(cache_folder()))
        case "up":
            lifecycle.up(
                Wishes(
                    options.control_plane, options.fake_nodes, options.fake_gpus, options.hold_fake_jobs, options.gpus
                )
            )
        case "down":
            for name in all_names() if options.all else [options.name]:
                Lifecycle(Cluster(name, cache_folder())).down(options.purge)
        case "status":
            return 0 if lifecycle.status() else 1
        case "load-image":
            for path in options.paths:
                for image in lifecycle.store.load(path):
                    sent = f"new, {image.sent_bytes / (1 << 20):.1f} MiB sent" if image.new else "already there"
                    print(f"{image.name}: {sent}")
        case "images":
            for image_name, digest in sorted(lifecycle.store.named().items()):
                print(f"{image_name}\t{digest}")
        case "prune-images":
            for removed in lifecycle.store.prune(options.keep):
                print(f"removed {removed}")
        case "kubeconfig":
            print(existing(options.name).kubeconfig)
        case "env":
            cluster = existing(options.name)
            print(f"export KUBECONFIG='{cluster.kubeconfig}'")
            print(f"export PATH='{cluster.bin}':\"$PATH\"")
    return 0


def external_command(options: argparse.Namespace) -> int:
    """What the commands mean for a cluster of the user's own."""
    match options.command:
        case "load-image":
            raise ClusterError(external.LOAD_IMAGE)
        case "kubeconfig":
            print(os.environ.get("KUBECONFIG", ""))
        case "env":
            print(f"export KUBECONFIG='{os.environ.get('KUBECONFIG', '')}'")
        case "build" | "images" | "prune-images":
            print("CLUSTER=external: nothing to do for a cluster of your own")
        case _:
            external.check()
    return 0
