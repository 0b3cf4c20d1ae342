"""The formats in which models write tool calls: a reader of each, and the grammar that forces a call."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deploy.api.grammars.bounds import check_bytes
from deploy.api.reading.tool_calls import (
    CLOSE,
    OPEN,
    CallReader,
    GlmCall,
    HermesCall,
    list_of,
    properties_of,
    types_of,
)
from router.sampling.grammar import json_rule, literal

_NO_PARAMETERS = {"properties": {}, "additionalProperties": False}


class CallableFunction(Protocol):
    """A function that the model may call.

    Its parameters are the JSON schema of an object; empty if it takes none.
    """

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class ToolFormat:
    """The format of a model's tool calls.

    new_reader: makes the reader of an answer that may call these functions. call_rules: returns the Lark
    rules of one call of one of these functions; the rule is named `call`. It raises ValueError where they would
    be too long: GLM's repeat a schema's definitions for each of its properties.
    """

    new_reader: Callable[[Sequence[CallableFunction]], CallReader]
    call_rules: Callable[[Sequence[CallableFunction]], str]


def format_of(template: str) -> ToolFormat | None:
    """Return the format of a chat template.

    None if the template has no tool calls, or some that we cannot read, as Qwen3-Coder's.
    """
    if "<arg_key>" in template:
        return _GLM
    return _HERMES if OPEN in template and "<function=" not in template else None


def calls_rules(rules: str, *, several: bool) -> str:
    """Return the Lark rules of an answer that is one call, or with `several` one or more.

    The rule is named `calls`.
    """
    return f'calls: ("\\n"? call){"+" if several else ""}\n{rules}'


def _hermes_rules(functions: Sequence[CallableFunction]) -> str:
    begin, end = literal(f"{OPEN}\n"), literal(f"\n{CLOSE}")
    rules = [f"call: {begin} ({_alternatives('call', len(functions))}) {end}"]
    for place, function in enumerate(functions):
        head = literal(f'{{"name": {json.dumps(function.name)}, "arguments": ')
        rules.append(f'call_{place}: {head} arguments_{place} "}}"')
        rules.append(f"arguments_{place}: {_json(_schema(function))}")
    return "\n".join(rules)


def _glm_rules(functions: Sequence[CallableFunction]) -> str:
    rules = [
        f"call: {literal(OPEN)} ({_alternatives('call', len(functions))}) {literal(CLOSE)}",
        'words[suffix="</arg_value>"]: /(?s:.*)/',
    ]
    num_bytes = 0
    for place, function in enumerate(functions):
        schema = _schema(function)
        required = list_of(schema.get("required"))
        pairs = []
        for number, (key, of_value) in enumerate(properties_of(schema).items()):
            name = f"pair_{place}_{number}"
            pairs.append(name if key in required else f"{name}?")
            rules.append(f"{name}: {_glm_pair(key, name)}")
            rules.append(f"{name}_value: {_glm_value(of_value, schema)}")
            num_bytes += len(rules[-1])
            check_bytes(num_bytes, "tools' schemas")
        rules.append(f'call_{place}: {literal(function.name)} "\\n"? {" ".join(pairs)}')
    return "\n".join(rules)


def _glm_pair(key: str, name: str) -> str:
    return f'{literal(f"<arg_key>{key}</arg_key>")} "\\n"? "<arg_value>" {name}_value "\\n"?'


def _glm_value(schema: Any, around: Mapping[str, Any]) -> str:
    """Return the rule of a value up to </arg_value>.

    A string stands there as it is, anything else as JSON.
    """
    if "string" in types_of(schema):
        words = schema.get("enum")
        if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
            return f'({" | ".join(map(literal, words))}) "</arg_value>"'
        return "words"
    definitions = {name: around[name] for name in ("$defs", "definitions") if name in around}
    inner = {**definitions, **schema} if isinstance(schema, Mapping) else {}
    return f'({_json(inner)}) "</arg_value>"'


def _schema(function: CallableFunction) -> dict[str, Any]:
    return {"type": "object", **(function.parameters or _NO_PARAMETERS)}


def _json(schema: Mapping[str, Any]) -> str:
    """Return the rule of a schema's JSON.

    It has the blanks that chat templates put, for these are what the model has seen.
    """
    return json_rule(schema, item_separator=", ", key_separator=": ")


def _alternatives(name: str, number: int) -> str:
    return " | ".join(f"{name}_{place}" for place in range(number))


def _hermes_reader(functions: Sequence[CallableFunction]) -> CallReader:
    return CallReader(HermesCall)


def _glm_reader(functions: Sequence[CallableFunction]) -> CallReader:
    schemas = {function.name: function.parameters for function in functions}
    return CallReader(lambda: GlmCall(schemas))


_HERMES = ToolFormat(_hermes_reader, _hermes_rules)
_GLM = ToolFormat(_glm_reader, _glm_rules)
