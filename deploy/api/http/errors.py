"""The answers that are not 2xx, in the shape that OpenAI's clients turn into typed exceptions."""

import json
import math
import re
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import Request as HttpRequest
from fastapi import Response
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException

_TOO_DEEP = "it is nested too deeply (at most about 200 levels are read)"
_TYPES = {429: "rate_limit_error"}


MAX_WORD = 100
"""Characters of a word in a message, such as a number or a name that a client sent."""

MAX_MESSAGE = 1_000


class ApiError(Exception):
    """An error that a request is answered with.

    message: a sentence for the user, without secrets or tracebacks; what it quotes of the client's is cut. param:
    dotted path of the field at fault.
    code: OpenAI's word for the case, where it has one. retry_after_s: seconds after which the client may try
    again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        message = _cut(message)
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param and _cut(param)
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """Return the JSON of the error."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """Return the error as an HTTP response."""
        headers = dict(headers or {})
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return Response(self.body(), status_code=self.status, headers=headers, media_type="application/json")


def _cut(message: str) -> str:
    """Return a message with its middle left out if it is long, and the ends of its long words.

    A client's value may stand in it, of megabytes or of 400 digits; done here, no message can forget to.
    """
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
    return _LONG_WORD.sub(r"\1...", message)


_LONG_WORD = re.compile(rf"(\S{{{MAX_WORD}}})\S+")

INTERNAL_ERROR = ApiError(
    500, "Internal server error; the server's log has it under this response's x-request-id."
)


def invalid_body(error: ValidationError, body: bytes) -> ApiError:
    """Return the answer to a body that a pydantic model refused, with the most precise of its errors."""
    complaints = error.errors(include_url=False, include_input=False)
    if complaints[0]["type"] == "json_invalid":
        return ApiError(400, _mended(complaints[0]["msg"]))
    sent = from_json(body)
    paths = [_path(sent, complaint["loc"], complaint["type"]) for complaint in complaints]
    # Of a union's branches the one is meant whose type is right and whose bound is not kept.
    path, complaint = max(
        zip(paths, complaints, strict=True),
        key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")),
    )
    param = ".".join(path) or None
    reason = _mended(complaint["msg"])
    return ApiError(400, f"{param}: {reason}" if param else reason, param=param)


def _mended(message: str) -> str:
    return message.removeprefix("Value error, ").replace("recursion limit exceeded", _TOO_DEEP)


def _path(sent: object, loc: tuple[int | str, ...], kind: str) -> list[str]:
    """Return the path in the sent JSON to which pydantic points.

    It leaves out pydantic's own names for the branches of a union.
    """
    path = []
    for step in loc:
        if isinstance(sent, dict) and (step in sent or kind == "missing"):
            sent = sent.get(step)
        elif isinstance(sent, list) and isinstance(step, int) and step < len(sent):
            sent = sent[step]
        else:
            continue
        path.append(str(step))
    return path


async def answer_api_error(http: HttpRequest, error: Exception) -> Response:
    """Answer an ApiError, as FastAPI's handler for it."""
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_error(http: HttpRequest, error: Exception) -> Response:
    """Answer an error of the routing (unknown path, wrong method), as FastAPI's handler for it."""
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {HTTPStatus(error.status_code).phrase}"
    return ApiError(error.status_code, message).response(error.headers)
