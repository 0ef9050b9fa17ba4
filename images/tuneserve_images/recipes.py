"""What there is to build, from what, and under which tag. Reads files; builds nothing.

A tag is a hash of all that goes into an image: its Dockerfile, the packages of uv.lock, the code, and its parent's tag.
So the same inputs have the same name in every checkout, and what has a name is never built again.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

TAG_LENGTH = 12
REPOSITORY = "tuneserve"
TRAINER_CODE = ("pipeline/tuneserve_pipeline",)
OPERATOR_CODE = (
    "operator/tuneserve",
    # All that the control plane may know of the pipeline.
    "pipeline/tuneserve_pipeline/__init__.py",
    "pipeline/tuneserve_pipeline/contract.py",
)


class BuildError(Exception):
    """What went wrong and what to do, in words for the user."""


@dataclass(frozen=True)
class Step:
    """One image to build: a `published` one goes into the layout, the others are only built upon."""

    name: str
    about: str
    """What it is, and how long it usually takes on two cores."""
    parent: str | None = None
    dockerfile: str | None = None
    target: str | None = None
    """A stage of the Dockerfile; none: the last, and the parent is its stage ENVIRONMENT, already built."""
    packages: str | None = None
    """The argument of images/packages."""
    code: tuple[str, ...] = ()
    """Files and folders that are copied into the image, relative to the repository."""
    constants: tuple[str, ...] = ()

    @property
    def published(self) -> bool:
        return self.parent is not None and self.parent.endswith(f"-{ENVIRONMENT}")

    @property
    def kept(self) -> bool:
        """Whether the builder's own copy makes the next build shorter: what code is put upon, and its parents."""
        return not self.published and self.name != f"server-{ENVIRONMENT}"


ENVIRONMENT = "environment"
DEBIAN_SUITE = "bookworm"
DEBIAN_PACKAGES = ("python3", "ca-certificates")


def _environment(image: str, *, parent: str, about: str) -> Step:
    return Step(
        name=f"{image}-{ENVIRONMENT}",
        about=about,
        parent=parent,
        dockerfile=f"images/{image}/Dockerfile",
        target=ENVIRONMENT,
        packages=image,
    )


def _final(image: str, *, about: str, code: tuple[str, ...] = ()) -> Step:
    return Step(
        name=image,
        about=about,
        parent=f"{image}-{ENVIRONMENT}",
        dockerfile=f"images/{image}/Dockerfile",
        code=code,
    )


# In the order in which they are best started, parents first.
STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        Step(
            name="debian",
            about="Debian with Python, by debootstrap: 45 s",
            constants=(DEBIAN_SUITE, *DEBIAN_PACKAGES),
        ),
        Step(
            name="base",
            about="torch, 5 GB: 2 min",
            parent="debian",
            dockerfile="images/base/Dockerfile",
            target=ENVIRONMENT,
            packages="base",
        ),
        _environment("trainer", parent="base", about="packages of the training stages: 1 min"),
        _final("trainer", about="code of the training stages: 1 s, or 1 min with a new environment", code=TRAINER_CODE),
        _environment("server", parent="base", about="vLLM for CPU: 1 min"),
        _final("server", about="vLLM for CPU, into the store: 30 s"),
        _environment("operator", parent="debian", about="packages of the operator: 10 s"),
        _final("operator", about="code of the operator: 1 s", code=OPERATOR_CODE),
    )
}
PUBLISHED = tuple(name for name, step in STEPS.items() if step.published)


def code_files(root: Path, paths: Iterable[str]) -> list[Path]:
    """The files that a COPY of `paths` takes along, sorted; what .dockerignore leaves out is left out here too.

    Raises BuildError for a path that is not there.
    """
    files: set[Path] = set()
    for path in paths:
        place = root / path
        if not place.exists():
            raise BuildError(f"{path} is missing: an image is made of it")
        found = place.rglob("*") if place.is_dir() else [place]
        files |= {file for file in found if file.is_file() and file.suffix != ".pyc"}
    return sorted(files)


def snapshot(root: Path, folder: Path) -> Path:
    """Copy all that images are made of, so that an edit during a build changes neither the images nor their tags."""
    paths = {".dockerignore", "pyproject.toml", "uv.lock", "images/packages"}
    for step in STEPS.values():
        paths |= {*step.code, *([step.dockerfile] if step.dockerfile else [])}
    for file in code_files(root, paths):
        copy = folder / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy)
    return folder


def content_tag(parts: Iterable[bytes]) -> str:
    """A hash in which no two different lists of parts collide."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:TAG_LENGTH]


class Recipes:
    """The tags of all steps for one checkout; each is worked out once."""

    def __init__(self, *, root: Path, locked: Callable[[str], bytes] | None = None) -> None:
        self.root = root
        self._locked = locked or self._packages
        self._tags: dict[str, str] = {}

    def tag(self, name: str) -> str:
        """The content hash of a step; raises BuildError when an input is missing."""
        if name not in self._tags:
            self._tags[name] = content_tag(self._inputs(STEPS[name]))
        return self._tags[name]

    def reference(self, name: str) -> str:
        """The name of an image as a pod writes it, `tuneserve/trainer:0123456789ab`."""
        return f"{REPOSITORY}/{name}:{self.tag(name)}"

    def _inputs(self, step: Step) -> Iterable[bytes]:
        yield step.name.encode()
        yield self.tag(step.parent).encode() if step.parent else b""
        yield "\0".join(step.constants).encode()
        if step.dockerfile:
            yield self._read(self.root / step.dockerfile)
        if step.packages:
            yield self._locked(step.packages)
        for file in code_files(self.root, step.code):
            yield file.relative_to(self.root).as_posix().encode()
            yield self._read(file)

    def _read(self, file: Path) -> bytes:
        try:
            return file.read_bytes()
        except OSError as error:
            raise BuildError(f"{file.relative_to(self.root)} cannot be read: {error.strerror}") from error

    def _packages(self, image: str) -> bytes:
        try:
            done = subprocess.run([self.root / "images/packages", image], capture_output=True, check=True)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode().strip()
            raise BuildError(f"the packages of {image} cannot be read from uv.lock: {said}") from error
        return done.stdout


def needed(names: Iterable[str], *, have: Callable[[str], bool]) -> list[str]:
    """What must be built for `names`, parents first: a step that is there needs no parents."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or have(name):
            return
        if parent := STEPS[name].parent:
            visit(parent)
        order.append(name)

    for name in names:
        visit(name)
    return order
