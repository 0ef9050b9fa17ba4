"""The command line of images/build: what is asked for, one build at a time, and lines that say what takes the time."""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tuneserve_images.builder import Builder
from tuneserve_images.programs import install_missing
from tuneserve_images.recipes import PUBLISHED, STEPS, BuildError, Recipes, needed, snapshot
from tuneserve_images.schedule import run_all
from tuneserve_images.settings import ROOT, Folders


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Names of images, and whether only to print."""
    parser = argparse.ArgumentParser(
        prog="images/build",
        description="Build the images of this checkout into one OCI layout, and print their names as JSON. "
        "What is there already is not built again.",
        epilog="Then load them: cluster/cluster load-image $(images/build --layout)",
    )
    parser.add_argument("names", nargs="*", metavar="IMAGE", help=f"{', '.join(PUBLISHED)} or all (the default)")
    parser.add_argument("--print", action="store_true", dest="show", help="only print the names")
    parser.add_argument("--layout", action="store_true", help="print the folder of the layout; no build")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in (*PUBLISHED, "all")]
    if unknown:
        parser.error(f"there is no image {unknown[0]!r}: choose from {', '.join(PUBLISHED)}, all")
    if not options.names or "all" in options.names:
        options.names = list(PUBLISHED)
    return options


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 with a sentence on what went wrong, 130 interrupted."""
    options = parse(arguments)
    folders = Folders.of()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if options.layout:
            print(folders.layout)
        else:
            recipes = Recipes(root=ROOT) if options.show else build(options.names, folders=folders)
            print(json.dumps({name: recipes.reference(name) for name in options.names}))
    except BuildError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("images: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0


def build(names: Sequence[str], *, folders: Folders) -> Recipes:
    """Build what is missing, then remove what is old; returns what was built from."""
    recipes = Recipes(root=ROOT)
    builder = Builder(folders=folders, recipes=recipes)
    if all(builder.has(name) for name in names):
        return recipes
    for package in install_missing():
        _say(f"installed {package}")
    with _locked(folders.lock):
        start = time.monotonic()
        shutil.rmtree(folders.scratch, ignore_errors=True)
        (folders.scratch / "tmp").mkdir(parents=True)
        recipes = Recipes(root=snapshot(ROOT, folders.scratch / "context"))
        builder = Builder(folders=folders, recipes=recipes)
        builder.prepare()
        order = needed(names, have=builder.has)

        def run(name: str) -> None:
            began = time.monotonic()
            _say(f"{name}: {STEPS[name].about} …")
            builder.build(name)
            _say(f"{name}: done in {time.monotonic() - began:.0f} s")

        parents = {name: step.parent for name, step in STEPS.items()}
        run_all(sorted(order, key=list(STEPS).index), parents=parents, run=run, stop=builder.runner.stop)
        builder.prune()
        _say(f"all there after {time.monotonic() - start:.0f} s")
    return recipes


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One build at a time in a cache."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another build is running; waiting for it …")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(f"images: {text}", file=sys.stderr, flush=True)
