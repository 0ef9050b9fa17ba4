"""A stage's output directory: digested, readable by the server's user, and there as a whole or not at all.

Written as `<hash>.partial`, renamed when complete; immutable from then on. Must import no machine-learning library.
"""

import hashlib
import json
import os
import stat
from importlib import metadata
from pathlib import Path

from tuneserve_pipeline.contract import MANIFEST_NAME, Manifest, Outcome, OutputFile, StageConfig
from tuneserve_pipeline.errors import StageFailure

#: Packages whose versions a manifest records, if they are installed.
RECORDED_PACKAGES = (
    "tuneserve", "torch", "transformers", "tokenizers", "safetensors", "peft", "trl", "bitsandbytes", "accelerate",
    "datasets", "huggingface_hub", "scikit-learn", "jinja2", "pyarrow",
)  # fmt: skip


def list_files(directory: Path) -> list[Path]:
    """All regular files below `directory`, sorted by path; a link counts as what it points to."""
    found = [Path(root) / name for root, _, names in os.walk(directory) for name in names]
    return sorted(found, key=lambda path: path.relative_to(directory).as_posix())


def digest_file(path: Path) -> str:
    """sha256 in hex, read in pieces: a model file is larger than the memory of the pod."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(directory: Path) -> tuple[OutputFile, ...]:
    """What lies below `directory`, but for its manifest."""
    return tuple(
        OutputFile(path=name, size=path.stat().st_size, sha256=digest_file(path))
        for path in list_files(directory)
        if (name := path.relative_to(directory).as_posix()) != MANIFEST_NAME
    )


def open_to_readers(directory: Path) -> None:
    """Files 0644, directories 0755: safetensors writes 0600, and another user serves what this one wrote."""
    for root, _, names in os.walk(directory):
        # The set-group-id bit of the volume's fsGroup stays, or new files would leave the group.
        os.chmod(root, 0o755 | (os.stat(root).st_mode & stat.S_ISGID))
        for name in names:
            os.chmod(os.path.join(root, name), 0o644)


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    for root, _, names in os.walk(directory):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old content or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync(path.parent)


def publish(directory: Path, final: Path) -> None:
    """Give a complete directory its final name. A crash before leaves no output, a crash after a whole one."""
    open_to_readers(directory)
    sync_tree(directory)
    directory.rename(final)
    sync(final.parent)


def versions() -> dict[str, str]:
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(directory: Path, *, config: StageConfig, outcome: Outcome, files: tuple[OutputFile, ...]) -> None:
    manifest = Manifest(config=config, outcome=outcome, files=files, versions=versions())
    write_text(directory / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")


def recorded_outcome(directory: Path) -> Outcome | None:
    """The outcome of a finished output; None when there is no such directory.

    Raises `StageFailure` when files are missing or have another size: somebody touched what is immutable.
    """
    if not directory.is_dir():
        return None
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        outcome = Outcome.model_validate(manifest["outcome"])
        wrong = [
            file["path"]
            for file in manifest["files"]
            if not (path := directory / file["path"]).is_file() or path.stat().st_size != file["size"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(directory, f"its {MANIFEST_NAME} cannot be read ({error})", directory.parent.name) from error
    if wrong:
        raise _damaged(directory, f"missing or changed: {', '.join(wrong[:5])}", outcome.stage)
    return outcome


def _damaged(directory: Path, what: str, stage: str) -> StageFailure:
    return StageFailure(
        reason="OutputDamaged",
        message=f"the finished output {directory} was changed after it was written: {what}. Ask for a new one with the "
        f"annotation tuneserve.dev/rebuild: {stage}",
    )
