"""API keys: those of a file, which is read again when it changes, and the middleware that asks for one."""

import hmac
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.api.http.access_log import current_entry, route_path
from deploy.api.http.errors import ApiError
from deploy.api.http.quota import UNLIMITED, Account, Clock, Quota, Use, current_use

logger = logging.getLogger(__name__)

CHECK_S = 1.0
"""Seconds between two looks at the file, at least."""

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
"""Paths that need no key, because load balancers have none."""

_MISSING = ApiError(401, "An API key is needed: `Authorization: Bearer KEY`.", code="invalid_api_key")
_WRONG = ApiError(401, "The API key is none of this server's.", code="invalid_api_key")


@dataclass(frozen=True)
class Key:
    """A key of the file: the name of its owner, and what it may use."""

    name: str
    quota: Quota = UNLIMITED


class ApiKeys:
    """The keys of a file. If it becomes unreadable, they stay as they were, with a warning; if empty, none is left."""

    def __init__(self, file: Path, *, clock: Clock = time.monotonic) -> None:
        """Read the file. Raises ValueError as `read_keys` does, but not for a file without keys."""
        self._file = file
        self._clock = clock
        self._seen = _stamp(file)
        self._keys = _read(file)
        self._accounts: dict[bytes, Account] = {}
        self._next_look = time.monotonic() + CHECK_S
        self._warn_if_none()

    def find(self, sent: bytes) -> tuple[str, Account] | None:
        """Return the name of a key and its account, None if it is no key. Takes the same time for every key."""
        self._follow()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key, sent):
                found = key
        if found is None:
            return None
        key = self._keys[found]
        account = self._accounts.get(found)
        if account is None:
            account = self._accounts[found] = Account(key.quota, clock=self._clock)
        return key.name, account

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
            self._keys = _read(self._file)
        except ValueError as error:
            logger.warning("the API keys stay as they were: %s", error)
            return
        logger.info("%s: the number of API keys is now %d", self._file, len(self._keys))
        self._warn_if_none()
        for key, account in list(self._accounts.items()):
            if key in self._keys:
                account.allow(self._keys[key].quota)
            else:
                del self._accounts[key]

    def _warn_if_none(self) -> None:
        if not self._keys:
            logger.warning("%s has no key: everybody is refused", self._file)


def read_keys(file: Path) -> dict[bytes, Key]:
    """Return the keys of a file; one without a name is named after its line.

    Raises ValueError, which quotes no key, for a file that cannot be read, has none, or is not such a file.
    """
    keys = _read(file)
    if not keys:
        raise ValueError(f"api.keys_file: {file} has no key")
    return keys


def _read(file: Path) -> dict[bytes, Key]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"api.keys_file: {file}: {error.strerror}") from error
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        try:
            secret, key = _parse(words, number)
        except ValueError as error:
            raise ValueError(f"api.keys_file: {file}, line {number}: {error}") from None
        keys[secret] = key
    return keys


def _parse(words: Sequence[bytes], number: int) -> tuple[bytes, Key]:
    """Return the secret and the key of a line's words. Raises ValueError that quotes neither."""
    # A key may hold "=" (base64): only what begins like a field is one.
    first = next((at for at, word in enumerate(words) if at and _FIELD.match(word)), len(words))
    *name, secret = words[:first]
    if len(name) > 1:
        raise ValueError(f"must be `KEY` or `NAME KEY`, then perhaps {_FIELDS}")
    fields: dict[str, Any] = {}
    for word in words[first:]:
        matched = _FIELD.match(word)
        if matched is None or (field := matched[1].decode()) in fields:
            raise ValueError(f"behind the key may stand {_FIELDS}, each once")
        fields[field] = _value(field, word[matched.end() :].decode(errors="replace"))
    return secret, Key(name[0].decode(errors="replace") if name else f"line {number}", Quota(**fields))


_FIELD = re.compile(rb"(requests|tokens_per_minute|priority)=")
_FIELDS = "`requests=8`, `tokens_per_minute=100000` and `priority=yes`"


def _value(field: str, text: str) -> int | bool:
    if field == "priority":
        if text not in ("yes", "no"):
            raise ValueError("priority must be yes or no")
        return text == "yes"
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) == 0:
        raise ValueError(f"{field} must be a whole number above 0, of at most 9 digits")
    return int(text)


class KeyGuard:
    """Middleware that answers 401 to a request without a key, except on OPEN_PATHS, and 429 beyond its quota.

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
        found = self._keys.find(sent) if sent else None
        is_open = route_path(scope) in OPEN_PATHS
        if found is None and not is_open:
            refusal = _WRONG if sent else _MISSING
            await refusal.response({"www-authenticate": "Bearer"})(scope, receive, send)
            return
        if found is None:
            await self._app(scope, receive, send)
            return
        current_entry().key, account = found
        if is_open:
            await self._app(scope, receive, send)
            return
        try:
            use = Use(account)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        before = current_use.set(use)
        try:
            await self._app(scope, receive, send)
        finally:
            current_use.reset(before)
            use.end()


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
