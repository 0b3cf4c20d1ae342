"""The client of /ready: asks a server over HTTP whether it is ready.

It imports no Ray, so that `sparkmoe status` is quick.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from experts.progress import Progress, Took

KEY_VARIABLE = "SPARKMOE_API_KEY"


class LaunchError(Exception):
    """The server could not be started or reached; its text is a sentence for the terminal."""


def readiness(url: str) -> tuple[bool, str, dict[str, Any]]:
    """Return (ready, why not, detail) of a server.

    Raises LaunchError if nothing answers, or something else does.
    """
    try:
        status, body = _get(f"{url}/ready")
    except (OSError, HTTPException, ValueError) as error:  # ValueError: not a URL
        raise LaunchError(f"nothing answers at {url}: {_reason(error)}") from error
    try:
        report = json.loads(body)
        return bool(report["ready"]), str(report["reason"]), dict(report["detail"])
    except (ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{url}/ready answered {status}, but not as a sparkmoe server does") from error


def status_lines(ready: bool, reason: str, detail: dict[str, Any]) -> list[str]:
    """Return the lines that `sparkmoe status` prints, without empty values."""
    shards = detail.get("shards", [])
    rest = {key: value for key, value in detail.items() if key != "shards"}
    return [
        "ready" if ready else f"not ready: {reason}",
        *(f"  {key}: {value}" for key, value in _shown(rest)),
        *("  shard " + ", ".join(f"{key} {value}" for key, value in _shown(shard)) for shard in shards),
    ]


def loading_of(shard: Mapping[str, Any]) -> Progress | None:
    """Return how far a shard of the detail has loaded, None if it serves."""
    loading = shard.get("loading")
    return Progress(**loading) if loading else None


def _shown(detail: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the keys of a detail with their values as text, without those that are empty."""
    texts = {key: f"{value:.1f}" if isinstance(value, float) else str(value) for key, value in detail.items()}
    if progress := loading_of(detail):
        texts["loading"] = str(progress)
    if parts := detail.get("took"):
        texts["took"] = ", ".join(f"{work} {Took(**one)}" for work, one in parts.items())
    return [(key, text) for key, text in texts.items() if detail[key] not in ("", None, {})]


def _get(url: str) -> tuple[int, bytes]:
    """Return status and body; a server that is not ready says why in the body of a 503.

    A server with keys tells details only to an owner of one, which is taken from KEY_VARIABLE.
    """
    key = os.environ.get(KEY_VARIABLE)
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def _reason(error: Exception) -> str:
    """Return an error in one line, without the angle brackets that urllib puts around it."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(cause).split()) or type(cause).__name__
