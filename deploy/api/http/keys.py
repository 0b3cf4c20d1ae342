"""API keys: those of a file, which is read again when it changes, and the middleware that asks for one."""

import hmac
import logging
import time
from ipaddress import ip_address
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.api.http.access_log import current_entry, route_path
from deploy.api.http.errors import ApiError

logger = logging.getLogger(__name__)

CHECK_S = 1.0
"""Seconds between two looks at the file, at least."""

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
"""Paths that need no key, because load balancers have none."""

_MISSING = ApiError(401, "An API key is needed: `Authorization: Bearer KEY`.", code="invalid_api_key")
_WRONG = ApiError(401, "The API key is none of this server's.", code="invalid_api_key")


class ApiKeys:
    """The keys of a file. If it becomes unreadable or empty, the keys stay as they were, with a warning."""

    def __init__(self, file: Path) -> None:
        """Read the file. Raises ValueError as `read_keys` does."""
        self._file = file
        self._seen = _stamp(file)
        self._names = read_keys(file)
        self._next_look = time.monotonic() + CHECK_S

    def name_of(self, sent: bytes) -> str | None:
        """Return the name of a key, None if it is no key. Takes the same time for every key."""
        self._follow()
        found = None
        for key, name in self._names.items():
            if hmac.compare_digest(key, sent):
                found = name
        return found

    def _follow(self) -> None:
        """Look at the file, if it is time, and read it again if it has changed."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + CHECK_S
        stamp = _stamp(self._file)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._names = read_keys(self._file)
        except ValueError as error:
            logger.warning("the API keys stay as they were: %s", error)
        else:
            logger.info("%s: the number of API keys is now %d", self._file, len(self._names))


def read_keys(file: Path) -> dict[bytes, str]:
    """Return the name of each key; a key without one is named after its line.

    Raises ValueError, which quotes no key, for a file that cannot be read, has none, or is not such a file.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"api.keys_file: {file}: {error.strerror}") from error
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        if len(words) > 2:
            raise ValueError(f"api.keys_file: {file}, line {number}: must be `KEY` or `NAME KEY`")
        *name, key = words
        names[key] = name[0].decode(errors="replace") if name else f"line {number}"
    if not names:
        raise ValueError(f"api.keys_file: {file} has no key")
    return names


class KeyGuard:
    """Middleware that answers 401 to a request without a key, except on OPEN_PATHS.

    The name of the key goes to the request's entry, for the access log and for whoever tells its owner more.
    """

    def __init__(self, app: ASGIApp, *, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = _bearer(Headers(scope=scope).get("authorization", ""))
        name = self._keys.name_of(sent) if sent else None
        if name is None and route_path(scope) not in OPEN_PATHS:
            refusal = _WRONG if sent else _MISSING
            await refusal.response({"www-authenticate": "Bearer"})(scope, receive, send)
            return
        current_entry().key = name
        await self._app(scope, receive, send)


def is_from_here(scope: Scope) -> bool:
    """Return whether a request comes from this machine.

    A proxy that forwards for others must say so (x-forwarded-for): Serve's HAProxy does not, behind it all
    requests come from here.
    """
    client = scope.get("client")
    addresses = [client[0]] if client else []
    for header in Headers(scope=scope).getlist("x-forwarded-for"):
        addresses += [address.strip() for address in header.split(",")]
    return bool(addresses) and all(map(_is_loopback, addresses))


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


def _bearer(authorization: str) -> bytes:
    """Return the key of an Authorization header, b"" if there is none."""
    scheme, _, key = authorization.partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Return a stamp that differs when the file, or its permissions, have changed; None if there is no file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
