"""Data files over HTTPS: a real server with a certificate of its own."""

import hashlib
import http.server
import json
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.stages import Finished, Workspace
from support.tiny import reviews
from tuneserve_pipeline.contract import ExitCode, HttpFile, PrepareSpec

CONTENT = "".join(json.dumps(row) + "\n" for row in reviews(30)).encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()

Fetch = Callable[..., Finished]


@dataclass
class Site:
    """What the server answers."""

    address: str = ""
    status: int = 200
    content: bytes = CONTENT
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    command = [*make.split(), "-keyout", str(path.with_suffix(".key")), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture
def site(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    served = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.requests.append(self.path)
            moved = self.path.startswith("/moved")
            self.send_response(302 if moved else served.status)
            content = b"" if moved else served.content
            for name, value in ({"Content-Length": str(len(content))} | served.headers).items():
                if name != "Location" or moved:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    served.address = f"https://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("NO_PROXY", "localhost")
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(workspace: Workspace, classification: PrepareSpec, site: Site) -> Fetch:
    """Runs `prepare` on a file of the site."""

    def run(path: str = "/data/rows.jsonl?key=secret", *, sha256: str = SHA256) -> Finished:
        source = HttpFile(url=site.address + path, sha256=sha256)
        return workspace.run_here(workspace.config(classification.model_copy(update={"train": (source,)})))

    return run


def test_a_file_is_fetched_and_named_without_its_key(fetch: Fetch, site: Site) -> None:
    finished = fetch()
    assert finished.code == 0, finished.message
    assert finished.rows("train.parquet")[0]["source"].startswith("localhost/data/rows.jsonl:")
    assert site.requests == ["/data/rows.jsonl?key=secret"]
    assert not (finished.directory / "downloads").exists()
    assert "secret" not in (finished.directory / "report.json").read_text()


def test_another_content_is_refused_with_both_sums(fetch: Fetch, site: Site) -> None:
    finished = fetch(sha256="0" * 64)
    assert (finished.code, finished.reason) == (ExitCode.INVALID_DATA, "ChecksumMismatch")
    assert SHA256 in finished.message and "0" * 64 in finished.message
    assert "spec.dataset.train[0].http localhost/data/rows.jsonl" in finished.message


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (404, ExitCode.INVALID_CONFIG, "DatasetNotFound"),
        (403, ExitCode.INVALID_CONFIG, "DatasetNotFound"),
        (500, ExitCode.UNAVAILABLE, "DatasetUnreachable"),
        (429, ExitCode.UNAVAILABLE, "DatasetUnreachable"),
    ],
)
def test_a_server_that_refuses_is_named(fetch: Fetch, site: Site, status: int, code: int, reason: str) -> None:
    site.status = status
    finished = fetch()
    assert (finished.code, finished.reason) == (code, reason)
    assert str(status) in finished.message and "secret" not in finished.message


def test_an_answer_that_breaks_off_is_tried_again(fetch: Fetch, site: Site) -> None:
    site.headers = {"Content-Length": str(len(CONTENT) + 100)}
    finished = fetch()
    assert (finished.code, finished.reason) == (ExitCode.UNAVAILABLE, "DatasetUnreachable")


def test_a_redirect_is_followed_but_never_out_of_tls(fetch: Fetch, site: Site) -> None:
    site.headers = {"Location": f"{site.address}/data/rows.jsonl"}
    finished = fetch("/moved/rows.jsonl")
    assert finished.code == 0, finished.message
    site.headers = {"Location": site.address.replace("https", "http") + "/data/rows.jsonl"}
    refused = fetch("/moved/other.jsonl")
    assert refused.code == ExitCode.UNAVAILABLE and "redirects to http" in refused.message
    assert site.requests[-1] == "/moved/other.jsonl"


def test_a_certificate_that_nobody_vouches_for_is_not_trusted(
    fetch: Fetch, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    finished = fetch()
    assert finished.code == ExitCode.UNAVAILABLE and "certificate" in finished.message.lower()
    assert site.requests == []
