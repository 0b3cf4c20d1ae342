"""The base of every object in a request's body.

A field that would change the answer and is not served is refused by name. A field that we do not know is
ignored, and `ignored_fields` names it for the log. Null is the same as absent.
"""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from deploy.api.openai.limits import MAX_FIELDS


class OpenAIBaseModel(BaseModel):
    """An object of a request's body, which keeps unknown fields and takes null as absent."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        if isinstance(data, dict):
            if len(data) > MAX_FIELDS:
                raise ValueError(f"an object may have at most {MAX_FIELDS} fields, not {len(data)}")
            return {name: value for name, value in data.items() if value is not None}
        return data


@dataclass(frozen=True, eq=False)
class _AcceptOnly:
    """The pydantic annotation that `accept_only` returns."""

    served: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(schema) | {"enum": [*self.served] or [None]}

    def _check(self, value: object) -> object:
        if value not in self.served:
            others = f" (only {', '.join(map(repr, self.served))})" if self.served else ""
            raise ValueError(f"{reprlib.repr(value)} is not supported{others}")
        return value


def accept_only(*served: Any) -> _AcceptOnly:
    """Return an annotation that refuses every value but these, and says so in the schema."""
    return _AcceptOnly(served)


NotServed = Annotated[Any, accept_only()]
"""The type of a field that is refused whatever its value is."""


def ignored_fields(sent: BaseModel) -> Iterator[str]:
    """Yield the dotted names of a body's unknown fields, without list positions; a name may repeat."""
    yield from sent.model_extra or ()
    for name in type(sent).model_fields:
        value = getattr(sent, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                yield from (f"{name}.{ignored}" for ignored in ignored_fields(inner))
