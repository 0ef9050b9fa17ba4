"""A small Hugging Face-compatible hub over real HTTP, for the real client: revisions, tokens, failures."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: As on the hub, large files carry a sha256 and small ones only a git hash.
_LARGE = (".safetensors", ".parquet")


@dataclass(kw_only=True)
class Repository:
    kind: str
    """`model` or `dataset`."""
    name: str
    files: dict[str, bytes]
    branches: tuple[str, ...] = ("main",)
    token: str | None = None
    """Whoever does not send it is refused."""
    corrupt: frozenset[str] = frozenset()
    """Files whose bytes on the wire are not those that the listing states."""

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()


@dataclass(kw_only=True)
class FakeHub:
    endpoint: str = ""
    repositories: list[Repository] = field(default_factory=list)
    status: int | None = None
    """Answer everything with this instead."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request, in order."""

    def add_directory(self, name: str, directory: Path, **options: object) -> Repository:
        """A model repository with the files of a directory."""
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        repository = Repository(kind="model", name=name, files=files, **options)  # type: ignore[arg-type]
        self.repositories.append(repository)
        return repository

    def add_dataset(self, name: str, files: dict[str, bytes], **options: object) -> Repository:
        repository = Repository(kind="dataset", name=name, files=files, **options)  # type: ignore[arg-type]
        self.repositories.append(repository)
        return repository

    def downloaded(self) -> list[str]:
        """Names of the files that were fetched, not only asked about."""
        return [line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET") and "/resolve/" in line]

    def find(self, *, kind: str, name: str) -> Repository | None:
        return next((found for found in self.repositories if (found.kind, found.name) == (kind, name)), None)


@contextmanager
def serve_hub(address: str = "127.0.0.1") -> Iterator[FakeHub]:
    """A hub on that address of this machine, until the block ends."""
    hub = FakeHub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer((address, 0), Handler)
    hub.endpoint = f"http://{address}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet: the requests are kept in `FakeHub.requests`."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.served.requests.append(f"{self.command} /{path}")
        if self.served.status is not None:
            return self._send(self.served.status)
        if path.startswith("api/"):
            kind, _, rest = path.removeprefix("api/").partition("/")
            name, _, revision = rest.partition("/revision/")
            return self._info(kind.removesuffix("s"), name, revision or "main")
        kind = "dataset" if path.startswith("datasets/") else "model"
        name, _, rest = path.removeprefix("datasets/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        return self._file(kind, name, revision, file)

    def _repository(self, kind: str, name: str, revision: str) -> Repository | None:
        found = self.served.find(kind=kind, name=name)
        if found is None:
            # As the hub does: whoever is not logged in does not learn what exists.
            known = self.headers.get("Authorization")
            self._send(404 if known else 401, headers={"X-Error-Code": "RepoNotFound"})
        elif found.token is not None and self.headers.get("Authorization") != f"Bearer {found.token}":
            self._send(403 if self.headers.get("Authorization") else 401, headers={"X-Error-Code": "GatedRepo"})
        elif revision not in (*found.branches, found.commit):
            self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return found
        return None

    def _info(self, kind: str, name: str, revision: str) -> None:
        found = self._repository(kind, name, revision)
        if found is None:
            return
        siblings = []
        for file, content in sorted(found.files.items()):
            sibling: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": _git(content)}
            if file.endswith(_LARGE):
                sibling["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        body = {"id": name, "sha": found.commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        self._send(200, json.dumps(body).encode(), headers={"Content-Type": "application/json"})

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        found = self._repository(kind, name, revision)
        if found is None:
            return
        content = found.files.get(file)
        if content is None:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound"})
        etag = _sha256(content) if file.endswith(_LARGE) else _git(content)
        if file in found.corrupt:
            content = bytes(len(content))
        self._send(200, content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": found.commit})

    def _send(self, status: int, body: bytes = b"", *, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
