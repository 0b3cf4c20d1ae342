"""The endpoint's OpenAPI schema.

The handlers parse their bodies themselves, so FastAPI does not know what they take and answer; this file
tells it.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from typing_extensions import TypedDict  # pydantic makes no schema of typing's own before Python 3.12

from deploy.api.http.keys import OPEN_PATHS
from deploy.version import version

Handler = Callable[..., Awaitable[Response]]

_REF = "#/components/schemas/{model}"
_EVENT = {
    "type": "object",
    "properties": {
        "data": {
            "type": "string",
            "description": "JSON of a part of the answer; of the last event, [DONE], or of an error if it failed.",
            "contentMediaType": "application/json",
        }
    },
    "required": ["data"],
}
_NULL = {"type": "null"}
_ALWAYS = (408, 413, 500, 503)
"""Statuses that any request may be answered with."""


_WITH_KEYS = (401, 403, 429)
"""Statuses that a request which needs a key may be answered with besides."""


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """The body of every answer that is not 2xx, and the last event of a stream that fails."""

    error: ErrorDetail


class ModelDescription(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    object: str
    data: list[ModelDescription]


class Health(TypedDict):
    status: str


class ReadyReport(TypedDict):
    """The answer of /ready.

    reason: a sentence why the server is not ready, else "". detail: more, for people.
    """

    ready: bool
    reason: str
    detail: dict[str, Any]


class Version(TypedDict):
    version: str


@dataclass(frozen=True)
class Operation:
    """The description of one route for the schema.

    answers: the shapes of answers, by status. errors: error statuses beside those that any request may get.
    body: the shape of the request's body. example: an example of it, without `model`. streams: 200 may be a
    stream of events instead.
    """

    id: str
    summary: str
    answers: Mapping[int, Any]
    errors: tuple[int, ...] = ()
    body: type[BaseModel] | None = None
    example: Mapping[str, Any] | None = None
    streams: bool = False


class DescribedApp(FastAPI):
    """A FastAPI application whose schema describes the bodies of its operations.

    model: the name of the only model that there is. keys: whether requests need an API key.
    """

    def __init__(self, *, model: str, keys: bool) -> None:
        super().__init__(
            title="sparkmoe",
            version=version(),
            redoc_url=None,
            swagger_ui_oauth2_redirect_url=None,
            redirect_slashes=False,
        )
        self._model = model
        self._keys = keys
        self._bodies: list[type[BaseModel]] = []

    def add_operation(self, method: str, path: str, handler: Handler, operation: Operation) -> None:
        """Add a route with its description."""
        guarded = self._keys and path not in OPEN_PATHS
        if operation.body is not None:
            self._bodies.append(operation.body)
        self.add_api_route(
            path,
            handler,
            methods=[method],
            operation_id=operation.id,
            summary=operation.summary,
            responses=_responses(operation, _WITH_KEYS if guarded else ()),
            openapi_extra=_request_body(operation, self._model)
            | ({"security": [{"key": []}]} if guarded else {}),
        )

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI schema, which is made at the first call."""
        if self.openapi_schema is None:
            schema = super().openapi()
            schema["components"]["schemas"] |= _body_schemas(self._bodies, model=self._model)
            if self._keys:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            _drop_validation_errors(schema)
        return super().openapi()


def _responses(operation: Operation, more: tuple[int, ...]) -> dict[int | str, dict[str, Any]]:
    """Return the answers of an operation as FastAPI takes them.

    more: error statuses beside those it names.
    """
    errors = dict.fromkeys(sorted({*operation.errors, *more, *_ALWAYS}), ErrorResponse)
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": shape, "description": HTTPStatus(status).phrase}
        for status, shape in (errors | dict(operation.answers)).items()
    }
    if operation.streams:
        found[200]["content"] = {"text/event-stream": {"itemSchema": _EVENT}}
    return found


def _request_body(operation: Operation, model: str) -> dict[str, Any]:
    if operation.body is None:
        return {}
    content = {
        "schema": {"$ref": _REF.format(model=operation.body.__name__)},
        "example": {"model": model, **(operation.example or {})},
    }
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def _body_schemas(bodies: list[type[BaseModel]], *, model: str) -> dict[str, Any]:
    """Return the schemas of bodies and their parts, by name.

    Added is what pydantic does not know: which models there are, and that null is the same as absent.
    """
    _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
    for body in bodies:
        found["$defs"][body.__name__]["properties"]["model"] = {"type": "string", "enum": [model]}
    for schema in found["$defs"].values():
        properties = schema.get("properties", {})
        for name in properties.keys() - {*schema.get("required", [])}:
            properties[name] = _or_null(properties[name])
    return found["$defs"]


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that allows null, too."""
    if "anyOf" in schema:
        others = [choice for choice in schema["anyOf"] if choice != _NULL]
        return schema | {"anyOf": [*others, _NULL]}
    if not schema.keys() & {"type", "$ref", "enum"}:
        return schema  # it allows anything already
    around = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    return {"anyOf": [{key: schema[key] for key in schema.keys() - around.keys()}, _NULL], **around}


def _drop_validation_errors(schema: dict[str, Any]) -> None:
    """Remove FastAPI's own answer to a path that it cannot parse: our paths hold only strings."""
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
