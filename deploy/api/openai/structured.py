"""Structured outputs: the fields by which a body constrains the answer, OpenAI's response_format and vLLM's."""

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from deploy.api.grammars.wanted import Kind, WantedGrammar
from deploy.api.http.errors import ApiError
from deploy.api.openai.fields import NotServed, OpenAIBaseModel, accept_only

Schema = dict[str, Any] | str
Choices = Annotated[list[str], Field(min_length=1, fail_fast=True)]

_KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar")


class JsonSchema(OpenAIBaseModel):
    """A JSON schema for the answer. `strict` changes nothing: schemas are always kept to."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class ResponseFormat(OpenAIBaseModel):
    type: Annotated[str, accept_only("text", "json_object", "json_schema")]
    json_schema: JsonSchema | None = Field(default=None, validate_default=True)

    @field_validator("json_schema")
    @classmethod
    def _is_there(cls, json_schema: JsonSchema | None, info: ValidationInfo) -> JsonSchema | None:
        if json_schema is None and info.data.get("type") == "json_schema":
            raise PydanticCustomError("missing", "Field required")
        return json_schema

    def constraints(self) -> list[WantedGrammar]:
        """Return the constraints that this object asks for."""
        if self.type == "json_schema":
            assert self.json_schema is not None
            return [WantedGrammar("response_format", "json", self.json_schema.schema_)]
        return [WantedGrammar("response_format", "any_json", None)] if self.type == "json_object" else []


class StructuredOutputs(OpenAIBaseModel):
    json_: Schema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: Annotated[Any, accept_only(False)] = None
    structural_tag: NotServed = None

    def constraints(self) -> list[WantedGrammar]:
        """Return the constraints that this object asks for."""
        values = (self.json_, self.regex, self.choice, self.grammar)
        return [
            WantedGrammar(f"structured_outputs.{kind}", kind, value)
            for kind, value in zip(_KINDS, values, strict=True)
            if value is not None
        ]


class StructuredOutputFields(OpenAIBaseModel):
    """The fields of a body that constrain the answer. At most one of them may do so."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    def output_constraint(self) -> WantedGrammar | None:
        """Return the constraint of the answer, None if it is free.

        Raises ApiError if several fields ask for one.
        """
        constraints = [
            constraint
            for asks in (self.response_format, self.structured_outputs)
            if asks
            for constraint in asks.constraints()
        ]
        for kind in _KINDS:
            if (value := getattr(self, f"guided_{kind}")) is not None:
                constraints.append(WantedGrammar(f"guided_{kind}", kind, value))
        if len(constraints) > 1:
            raise cannot_combine(constraints[0].field, constraints[1].field)
        return constraints[0] if constraints else None


def cannot_combine(first: str, second: str) -> ApiError:
    """Return the answer to a body with two fields that exclude each other."""
    return ApiError(400, f"{first} and {second} cannot go together.", param=second)
