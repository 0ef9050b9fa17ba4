"""Fetches one file over HTTPS, and keeps it only if it is the one that was meant."""

import hashlib
import http.client
import logging
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tuneserve_pipeline.errors import InvalidConfig, InvalidData, Unavailable

log = logging.getLogger(__name__)

_BLOCK = 1 << 20
_TIMEOUT_SECONDS = 60
#: Answers that will be the same the next time.
_FINAL = frozenset({400, 401, 403, 404, 405, 410, 451})


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows to another host, as stores of files do, but never out of TLS."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError(f"it redirects to {urlsplit(newurl).scheme}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, *, sha256: str, path: Path, name: str) -> None:
    """Store the file at `path`; `name` is what the user calls it.

    Raises `InvalidConfig` for what is not there or may not be read, `InvalidData` for another content, `Unavailable`
    if there is no whole answer.
    """
    if urlsplit(url).scheme != "https":
        raise InvalidConfig(reason="UrlInvalid", message=f"{name}: only https:// is fetched")
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=ssl.create_default_context()), _SecureRedirects
    )
    request = urllib.request.Request(url, headers={"User-Agent": "tuneserve"})
    digest = hashlib.sha256()
    size, expected = 0, None
    try:
        with opener.open(request, timeout=_TIMEOUT_SECONDS) as answer, path.open("wb") as file:
            length = answer.headers.get("Content-Length")
            expected = int(length) if length is not None and length.isdigit() else None
            while block := answer.read(_BLOCK):
                digest.update(block)
                size += len(block)
                _write(file, block)
    except urllib.error.HTTPError as error:
        if error.code in _FINAL:
            raise InvalidConfig(
                reason="DatasetNotFound",
                message=f"{name}: the server answers {error.code}: correct the url; it must need no login",
            ) from error
        raise _unavailable(name, f"the server answers {error.code}") from error
    except _DiskError as error:
        raise error.cause from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", None) or error
        raise _unavailable(name, f"no whole answer ({cause})") from error
    if expected is not None and size < expected:
        raise _unavailable(name, f"the answer ended after {size} of {expected} bytes")
    if digest.hexdigest() != sha256.lower():
        path.unlink()
        raise InvalidData(
            reason="ChecksumMismatch",
            message=f"{name}: the file has the sha256 {digest.hexdigest()}, the spec says {sha256}: the file was "
            "changed, or the url is another's; correct whichever is wrong",
        )
    log.info("fetched %s (%d bytes)", name, size)


class _DiskError(Exception):
    """An error of the disk among those of the network."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _write(file: Any, block: bytes) -> None:
    try:
        file.write(block)
    except OSError as error:
        raise _DiskError(error) from error


def _unavailable(name: str, what: str) -> Unavailable:
    return Unavailable(reason="DatasetUnreachable", message=f"{name}: {what}; it is tried again")
