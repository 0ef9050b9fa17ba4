"""Requests to the API server without a process for each: a hundred manifests are tried within seconds."""

import json
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from support.kubectl import Kubectl

Object = dict[str, Any]

_PLURALS = {"FineTune": "finetunes", "ModelServe": "modelserves"}


class RefusedError(AssertionError):
    """The API server said no; the message is its own."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The two kinds in one namespace; validates strictly, as kubectl does."""

    url: str
    namespace: str

    def try_create(self, manifest: Object) -> Object:
        """What would be stored; nothing is."""
        path = f"apis/{manifest['apiVersion']}/namespaces/{self.namespace}/{_PLURALS[manifest['kind']]}"
        request = urllib.request.Request(
            f"{self.url}/{path}?dryRun=All&fieldValidation=Strict",
            data=json.dumps(manifest).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RefusedError(json.load(error)["message"]) from error


@contextmanager
def proxied(kubectl: Kubectl) -> Iterator[Server]:
    """Through `kubectl proxy`, which knows how to log in to any cluster."""
    command = [*kubectl.command, "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            line = proxy.stdout.readline()
            found = re.search(r"127\.0\.0\.1:\d+", line)
            assert found, f"kubectl proxy did not start: {line}"
            yield Server(url=f"http://{found.group()}", namespace=kubectl.namespace)
        finally:
            proxy.terminate()
