"""WantedGrammar: what a body asks for as the form of its answer, before anything has been compiled."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic_core import from_json

from deploy.api.grammars.bounds import bytes_of, check_bytes, check_choices, check_lark, check_schema
from router.sampling import grammar

Kind = Literal["any_json", "json", "regex", "choice", "grammar", "calls"]

UserGrammars = Literal["all", "json_only", "off"]
"""The forms that clients may ask for: `all`; `json_only`, JSON schemas, choices and tool calls; or `off`, none of
their own: only response_format={"type": "json_object"}."""

_ALLOWED: dict[UserGrammars, tuple[Kind, ...]] = {
    "all": ("any_json", "json", "regex", "choice", "grammar", "calls"),
    "json_only": ("any_json", "json", "choice", "calls"),
    "off": ("any_json",),
}


@dataclass(frozen=True)
class WantedGrammar:
    """The form of an answer.

    field: the dotted path of the field that asks for it. kind, value: the schema (an object or its text), the
    regex, the choices, or the Lark grammar; of "calls", the rules of an answer that is tool calls, where `calls`
    is the rule of all of them; of "any_json", None. calls: such rules, if the answer may be calls instead, else
    "".
    """

    field: str
    kind: Kind
    value: Any
    calls: str = ""

    def check(self, served: UserGrammars) -> None:
        """Raise ValueError for what is not served here, or beyond the bounds. Reads nothing natively."""
        wanted = ["calls", self.kind] if self.calls else [self.kind]
        if not set(wanted) <= set(_ALLOWED[served]):
            raise ValueError(f"this is switched off on this server (api.user_grammars is {served})")
        check_bytes(bytes_of(self.calls), "tools' schemas")
        match self.kind:
            case "json":
                _check_schema(self.value)
            case "choice":
                check_choices(self.value)
            case "regex":
                check_bytes(bytes_of(self.value), "regex")
            case "grammar":
                check_bytes(bytes_of(self.value), "grammar")
                check_lark(self.value)
            case "calls":
                check_bytes(bytes_of(self.value), "tools' schemas")

    def make(self) -> str:
        """Return the grammar as llguidance writes it, which nothing has compiled. Raises ValueError.

        It parses natively, so only a child process may call it.
        """
        match self.kind:
            case "any_json":
                made = grammar.of_json_schema({"type": "object"})
            case "json":
                made = grammar.of_json_schema(self.value)
            case "regex":
                made = grammar.of_regex(self.value)
            case "choice":
                made = grammar.of_choice(self.value)
            case "grammar":
                made = grammar.of_lark(self.value)
            case "calls":
                made = grammar.of_lark(f"start: calls\n{self.value}")
        return grammar.either(self.calls, "calls", made) if self.calls else made

    def to_json(self) -> str:
        """Return the JSON of what decides the grammar; equal texts are equal grammars."""
        return json.dumps(asdict(self) | {"field": ""})

    def weight(self, order: str) -> int:
        """Return how far others go first: 0 for the usual schemas. order: its to_json.

        What takes long to compile has long regular expressions.
        """
        plain = self.kind not in ("regex", "grammar") and "pattern" not in order
        return 0 if plain else len(order)


def _check_schema(schema: Any) -> None:
    if isinstance(schema, str):
        check_bytes(bytes_of(schema), "JSON schema")
        try:
            check_schema(from_json(schema))
        except ValueError as error:
            raise ValueError(f"the JSON schema: {error}") from error
        return
    check_schema(schema)
    check_bytes(bytes_of(json.dumps(schema)), "JSON schema")
