"""Readers of the tool calls in a model's text while it comes, in the formats of hermes (Qwen3) and GLM-4.x. Pure.

    <tool_call>                                        <tool_call>get_weather
    {"name": "get_weather", "arguments": {...}}        <arg_key>city</arg_key>
    </tool_call>                                       <arg_value>Rome</arg_value>
                                                       </tool_call>

No text is lost: what looks like a call and is none is content. A call that breaks off within its arguments
keeps what came of them, which then is no JSON object, and the rest is content.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from deploy.api.reading.partial import Expression, Step, ahead, num_held, text
from deploy.api.reading.parts import CallArguments, CallBegun, Content, Part

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_BLANKS = Step(r"\s{0,99}", r"\s{0,99}")  # bounded: a model that writes more is not writing a call


class _Call(Protocol):
    """The parser of the inside of one call, between OPEN and CLOSE.

    Every method takes the text that has not been read yet; those that read return what is left of it.
    """

    def begin(self, unread: str) -> tuple[str, str] | None:
        """Read the function's name behind OPEN.

        Returns (name, rest), ("", unread) if more text is needed, or None if this is no call.
        """
        ...

    def arguments(self, unread: str) -> tuple[str, str]:
        """Read arguments: return (the JSON that is certain, rest)."""
        ...

    def end(self, unread: str) -> str | None:
        """Read the end of the call: return what stands behind CLOSE, None if CLOSE is not there."""
        ...

    def may_go_on(self, unread: str) -> bool:
        """Return whether the unread text may be part of this call, once more of it has come."""
        ...

    def cut(self, unread: str) -> str:
        """Return what of the unread text is content, when no more text comes."""
        ...


class CallReader:
    """A reader of content with tool calls.

    Blanks around a call are dropped. new_call: makes a parser of one call.
    """

    def __init__(self, new_call: Callable[[], _Call]) -> None:
        self._new_call = new_call
        self._call: _Call | None = None  # the call whose arguments come, None outside of one
        self._num_calls = 0
        self._unread = ""
        self._blanks_are_dropped = False

    def push(self, text: str, /) -> list[Part]:
        self._unread += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        rest, self._unread = self._unread, ""
        if self._call is not None:
            rest = self._call.cut(rest)
        return [Content(rest)] if rest else []

    def _step(self, parts: list[Part]) -> bool:
        """Read one part. Returns False if more text is needed."""
        if self._call is not None:
            return self._within(self._call, parts)
        if self._blanks_are_dropped:
            self._unread = self._unread.lstrip()
        if not self._unread:
            return False
        self._blanks_are_dropped = False
        before, opened, behind = self._unread.partition(OPEN)
        certain = before if opened else before[: len(before) - num_held(before, OPEN)]
        certain = certain.rstrip()
        if certain:
            parts.append(Content(certain))
            self._unread = self._unread[len(certain) :]
        return bool(opened) and self._begin(behind, parts)

    def _begin(self, behind: str, parts: list[Part]) -> bool:
        """Begin a call, if this is one. self._unread holds blanks, OPEN, and then `behind`."""
        call = self._new_call()
        begun = call.begin(behind)
        if begun is None:  # so OPEN is content like any other
            parts.append(Content(self._unread[: len(self._unread) - len(behind)]))
            self._unread = behind
            return True
        name, rest = begun
        if not name:
            return False
        parts.append(CallBegun(self._num_calls, name))
        self._call, self._unread = call, rest
        self._num_calls += 1
        return True

    def _within(self, call: _Call, parts: list[Part]) -> bool:
        piece, self._unread = call.arguments(self._unread)
        if piece:
            parts.append(CallArguments(self._num_calls - 1, piece))
        rest = call.end(self._unread)
        if rest is None and call.may_go_on(self._unread):
            return False
        self._call = None
        self._blanks_are_dropped = rest is not None
        self._unread = self._unread if rest is None else rest
        return True


class HermesCall:
    """The parser of hermes: {"name": "f", "arguments": {...}}.

    The arguments are passed on as they are, up to the brace that closes them. They need not be valid JSON:
    the client sees what the model wrote. A missing last brace or CLOSE is forgiven.
    """

    _HEAD = Expression(
        *(step for token in ("{", '"name"', ":") for step in (_BLANKS, text(token))),
        *(_BLANKS, Step(r'"([^"\\\x00-\x1f]+)"', r'(?:"[^"\\\x00-\x1f]*)?')),
        *(step for token in (",", '"arguments"', ":") for step in (_BLANKS, text(token))),
        *(_BLANKS, ahead("{")),
    )
    _TAIL = Expression(_BLANKS, Step(r"\}?", r"\}?"), _BLANKS, text(CLOSE))

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._complete = False

    def begin(self, unread: str) -> tuple[str, str] | None:
        if head := self._HEAD.match(unread):
            return head[1], unread[head.end() :]
        return ("", unread) if self._HEAD.may_come(unread) else None

    def arguments(self, unread: str) -> tuple[str, str]:
        end = 0
        while end < len(unread) and not self._complete:
            if unread[end] == "<" and not self._in_string:  # not JSON: a brace is missing
                self._complete = True
                break
            self._take(unread[end])
            end += 1
        return unread[:end], unread[end:]

    def end(self, unread: str) -> str | None:
        tail = self._TAIL.match(unread) if self._complete else None
        return unread[tail.end() :] if tail else None

    def may_go_on(self, unread: str) -> bool:
        return not self._complete or self._TAIL.may_come(unread)

    def cut(self, unread: str) -> str:
        return ""  # what is unread is the beginning of the tail

    def _take(self, character: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        elif character in "{}":
            self._depth += 1 if character == "{" else -1
            self._complete = not self._depth


class GlmCall:
    """The parser of GLM-4.x: the function's name, then keys and values.

    A value is a string where the schema says so, else JSON, and if it is no JSON, a string after all.
    schemas: the JSON schema of every tool's parameters, by the tool's name.
    """

    _NAME = r"[^\s<]"
    _HEAD = Expression(_BLANKS, Step(f"({_NAME}+)", f"{_NAME}*"), _BLANKS, ahead("<arg_key>", CLOSE))
    _PAIR = Expression(
        *(_BLANKS, text("<arg_key>"), Step("([^<]*)", "[^<]*"), text("</arg_key>")),
        *(_BLANKS, text("<arg_value>"), Step("(.*?)", ".*"), text("</arg_value>")),
    )
    _TAIL = Expression(_BLANKS, text(CLOSE))

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self._schema: Mapping[str, Any] = {}
        self._num_pairs = 0

    def begin(self, unread: str) -> tuple[str, str] | None:
        if head := self._HEAD.match(unread):
            self._schema = self._schemas.get(head[1], {})
            return head[1], unread[head.end() :]
        return ("", unread) if self._HEAD.may_come(unread) else None

    def arguments(self, unread: str) -> tuple[str, str]:
        written = ""
        while "</arg_value>" in unread and (pair := self._PAIR.match(unread)):
            key, value = pair.groups()
            written += f"{', ' if self._num_pairs else '{'}{json.dumps(key, ensure_ascii=False)}: "
            written += _as_json(value, types_of(properties_of(self._schema).get(key)))
            self._num_pairs += 1
            unread = unread[pair.end() :]
        if self._TAIL.match(unread):
            written += "}" if self._num_pairs else "{}"
        return written, unread

    def end(self, unread: str) -> str | None:
        tail = self._TAIL.match(unread)
        return unread[tail.end() :] if tail else None

    def may_go_on(self, unread: str) -> bool:
        return self._PAIR.may_come(unread) or self._TAIL.may_come(unread)

    def cut(self, unread: str) -> str:
        return unread if unread.strip() else ""


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the properties of an object's schema, empty if it has none."""
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def types_of(schema: object) -> set[str]:
    """Return the types that a schema names, including those of its alternatives."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type", [])
    types = {named} if isinstance(named, str) else set(_strings(named))
    for alternative in [*list_of(schema.get("anyOf")), *list_of(schema.get("oneOf"))]:
        types |= types_of(alternative)
    return types


def list_of(value: object) -> Sequence[object]:
    """Return the value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def _strings(value: object) -> list[str]:
    return [item for item in list_of(value) if isinstance(item, str)]


def _as_json(value: str, types: set[str]) -> str:
    """Return the JSON of a value that the model wrote without quotes. types: those that its schema names."""
    stripped = value.strip()
    is_null = stripped == "null" and "null" in types
    if is_null or ("string" not in types and _is_json(stripped)):
        return stripped
    return json.dumps(value, ensure_ascii=False)


def _is_json(value: str) -> bool:
    try:
        json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
