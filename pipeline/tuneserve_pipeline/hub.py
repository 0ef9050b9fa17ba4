"""Fetches models and data sets from a Hugging Face-compatible hub: data only, verified, never code.

Every answer of the hub ends as a file, as `InvalidConfig` (not there, not allowed) or as `Unavailable` (try again).
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuneserve_pipeline import base
from tuneserve_pipeline.contract import HubDataset, HubModel
from tuneserve_pipeline.errors import InvalidConfig, InvalidData, StageFailure, Unavailable
from tuneserve_pipeline.layout import select_files
from tuneserve_pipeline.metrics import Progress
from tuneserve_pipeline.output import digest_file, publish

log = logging.getLogger(__name__)

#: A repository name as a directory name: `/` cannot occur in one, `--` stands for it as in the hub's own cache.
_SEPARATOR = "--"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One commit of a repository."""

    commit: str
    sizes: Mapping[str, int]
    """File -> bytes."""
    sha256: Mapping[str, str]
    """Of large files only: the hub knows no others."""


class Hub:
    """One hub, with the user's token if there is one."""

    def __init__(self, *, endpoint: str | None, token_file: Path) -> None:
        # Images set this for the stages that must not call out; this one is told to.
        os.environ["HF_HUB_OFFLINE"] = "0"
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from huggingface_hub import HfApi

        token = token_file.read_text(encoding="utf-8").strip() if token_file.is_file() else ""
        self._token = bool(token)
        self._api = HfApi(endpoint=endpoint, token=token or False, library_name="tuneserve")

    def fetch_model(self, source: HubModel, *, directory: Path, progress: Progress, share: float) -> tuple[Path, str]:
        """Store a model below `directory` as `<repo>/<commit>`; returns that path and the commit.

        What is there is not fetched again, and what was broken off goes on. Moves `progress` up by `share`.
        """
        name = f"spec.baseModel.huggingFace {source.repo}@{source.revision}"
        root = directory / source.repo.replace("/", _SEPARATOR)
        if (root / source.revision).is_dir():
            return root / source.revision, source.revision  # The revision is a commit, and it is here.
        listing = self._list(source.repo, source.revision, kind="model", name=name)
        final = root / listing.commit
        if final.is_dir():
            return final, listing.commit
        partial = root / f"{listing.commit}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        small = [file for file in base.MODEL_FILES if file in listing.sizes]
        for file in small:
            self._download(source.repo, file, listing=listing, into=partial, kind="model", name=name)
        # All that can be wrong without the weights is found before they are fetched.
        base.read_config(partial, name=name)
        index = base.read_json(partial / base.INDEX, name=name)
        weights = base.check_weights(listing.sizes.keys(), index, name=name)
        _check_space(partial, sum(listing.sizes[file] for file in weights), name=name)
        begin, done = progress.now.ratio or 0.0, 0
        total = sum(listing.sizes[file] for file in weights) or 1
        for file in weights:
            self._download(source.repo, file, listing=listing, into=partial, kind="model", name=name)
            done += listing.sizes[file]
            progress.update(ratio=begin + share * done / total)
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        publish(partial, final)
        return final, listing.commit

    def fetch_dataset(self, source: HubDataset, *, directory: Path, name: str) -> tuple[list[Path], str]:
        """Store the data files of a split in `directory`; returns their paths and the commit."""
        listing = self._list(source.repo, source.revision, kind="dataset", name=name)
        card: Mapping[str, Any] = {}
        if "README.md" in listing.sizes:
            from huggingface_hub.repocard import metadata_load

            readme = self._download(
                source.repo, "README.md", listing=listing, into=directory, kind="dataset", name=name
            )
            card = metadata_load(readme) or {}
        files = select_files(listing.sizes, card=card, subset=source.subset, split=source.split)
        if not files:
            scripts = [file for file in listing.sizes if file.endswith(".py")]
            there = ", ".join(sorted(file for file in listing.sizes if not file.startswith("."))[:8])
            why = "; TuneServe never runs a loading script" if scripts else ""
            raise InvalidData(
                reason="DatasetNotFound",
                message=f"{name}: no JSONL, JSON, CSV or Parquet file for the subset {source.subset} and the split "
                f"{source.split}{why}. The repository holds: {there}",
            )
        return [
            self._download(source.repo, file, listing=listing, into=directory, kind="dataset", name=name)
            for file in files
        ], listing.commit

    def _list(self, repo: str, revision: str, *, kind: Literal["model", "dataset"], name: str) -> Listing:
        with self._errors(name):
            info = self._api.repo_info(repo, repo_type=kind, revision=revision, files_metadata=True)
        siblings = getattr(info, "siblings", None) or []
        return Listing(
            commit=str(info.sha),
            sizes={file.rfilename: int(file.size or 0) for file in siblings},
            sha256={file.rfilename: file.lfs.sha256 for file in siblings if file.lfs is not None},
        )

    def _download(
        self, repo: str, file: str, *, listing: Listing, into: Path, kind: Literal["model", "dataset"], name: str
    ) -> Path:
        log.info("fetching %s of %s@%s (%d bytes)", file, repo, listing.commit[:12], listing.sizes.get(file, 0))
        with self._errors(name):
            path = Path(self._api.hf_hub_download(repo, file, repo_type=kind, revision=listing.commit, local_dir=into))
        expected = listing.sha256.get(file)
        if expected is not None and digest_file(path) != expected:
            path.unlink()
            raise Unavailable(
                reason="DownloadCorrupt", message=f"{name}: {file} arrived with another sha256 than the hub states"
            )
        return path

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """What the client raises, as the contract's failures; errors of the disk stay what they are."""
        import httpx
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            yield
        except HfHubHTTPError as error:
            raise self._refused(error.response, name) from error
        except HFValidationError as error:
            raise InvalidConfig(reason="HubNotFound", message=f"{name}: {error}") from error
        except (httpx.HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
            cause = error.__cause__ or error
            raise Unavailable(
                reason="HubUnreachable",
                message=f"{name}: {self._api.endpoint} does not answer ({type(cause).__name__}: {cause}); it is tried "
                "again. If pods have no way out, name a mirror as the hub's endpoint or use spec.baseModel.claim",
            ) from error

    def _refused(self, response: Any, name: str) -> InvalidConfig | Unavailable:
        status = int(response.status_code)
        place = f"{name}: {self._api.endpoint} answers {status}"
        if status in (401, 403):
            what = (
                "the token may not read it: ask for access to the repository, or give another token"
                if self._token
                else "it is private, gated or does not exist: correct its name, or give a token with access"
            )
            return InvalidConfig(reason="HubAccessDenied", message=f"{place}; {what} (tokenSecret)")
        if status in (400, 404, 410):
            which = {"RevisionNotFound": "no such revision", "EntryNotFound": "no such file"}
            what = which.get(str(response.headers.get("X-Error-Code")), "no such repository")
            return InvalidConfig(reason="HubNotFound", message=f"{place}, {what}: correct its name and its revision")
        return Unavailable(reason="HubUnavailable", message=f"{place}; it is tried again")


def _check_space(directory: Path, needed: int, *, name: str) -> None:
    """Find out before a long download that it cannot fit."""
    there = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    free = shutil.disk_usage(directory).free
    if free + there < needed:
        raise StageFailure(
            reason="DiskFull",
            message=f"{name}: its weights take {needed / 2**30:.1f} GiB, and the artifacts claim has "
            f"{free / 2**30:.1f} GiB left: make the claim larger (spec.output.claim.size)",
        )
