"""Logging of our processes: which lines they write, and in which format.

Without it, a plain Ray actor writes nothing below WARNING.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

ROOMS = ("deploy", "experts", "router")

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the HTTP request that the current task serves, "" outside of one.

Every line that the task logs has it.
"""


def configure(log_format: LogFormat) -> None:
    """Send our INFO lines to stderr, which Ray keeps in its log files, unless a handler takes them already.

    Idempotent.
    """
    for room in ROOMS:
        logger = logging.getLogger(room)
        logger.setLevel(logging.INFO)
        if not logger.hasHandlers():
            logger.addHandler(handler(log_format))


def handler(log_format: LogFormat, stream: TextIO | None = None) -> logging.Handler:
    """Return a handler that writes every record as a line, to the given stream or to stderr.

    With `json` the line is an object, to which a caller's `extra={"fields": {...}}` adds members.
    """
    writer = logging.StreamHandler(stream)
    writer.setFormatter(_Json() if log_format == "json" else _Text())
    return writer


class _Text(logging.Formatter):
    """A formatter that escapes what is not printable.

    A message may hold text from clients, which must not end the line or move a terminal's cursor.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        owner = f"{found}: " if (found := request_id.get()) else ""
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {owner}{record.getMessage()}"
        if line.isprintable():
            return line
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if found := request_id.get():
            line["request_id"] = found
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
