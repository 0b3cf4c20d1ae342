"""What every part of a request's body has in common.

A field that would change the answer and is not served is refused by name. One that we do not know is ignored, and
`ignored_fields` names it for the log. Null is the same as absent.
"""

import reprlib
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator


class Sent(BaseModel):
    """An object of a body."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


def only(*served: object) -> AfterValidator:
    """Refuses every value but these."""

    def check(value: object) -> object:
        if value not in served:
            others = f" (only {', '.join(map(repr, served))})" if served else ""
            raise ValueError(f"{reprlib.repr(value)} is not supported{others}")
        return value

    return AfterValidator(check)


NotServed = Annotated[Any, only()]


def ignored_fields(sent: BaseModel) -> Iterator[str]:
    """Dotted names of what a body holds and we do not know, without list positions; may repeat."""
    yield from sent.model_extra or ()
    for name in type(sent).model_fields:
        value = getattr(sent, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                yield from (f"{name}.{ignored}" for ignored in ignored_fields(inner))
