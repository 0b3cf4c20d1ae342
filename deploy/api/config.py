"""The `api` part of the config: what a user may say about the endpoint."""

from typing import Annotated

from pydantic import Field

from deploy.api.grammars.wanted import UserGrammars
from deploy.logs import LogFormat
from deploy.paths import FromRoot
from experts.config import Config

Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]
"""An origin as browsers send it: with a scheme, perhaps a port, and no slash at the end; `*` is every one."""


class ApiConfig(Config):
    """The settings of the endpoint, which are fixed for the life of an ingress."""

    keys_file: FromRoot | None = None
    """The file of the API keys, on every node that an ingress may run on.

    A line is `KEY` or `NAME KEY`, and behind it perhaps fields: `requests=8` at a time,
    `tokens_per_minute=100000` of prompts and answers, `priority=yes`. Comments begin with #. A change counts
    within a second; an empty file refuses everybody. Without a file, everybody who reaches the endpoint may
    use it.
    """

    max_body_mib: int = Field(default=8, ge=1)
    """The longest body of a request; a longer one is refused (HTTP 413)."""

    user_grammars: UserGrammars = "all"
    """The grammars that clients may ask for: all; json_only: JSON schemas, choices and tool calls, but no regex and no
    Lark; or off: none but response_format={"type": "json_object"}. Others are refused (HTTP 400)."""

    body_timeout_s: float = Field(default=30.0, gt=0)
    """A body that has not come whole after this many seconds is refused (HTTP 408)."""

    max_unread_tokens: int = Field(default=1024, ge=16)
    """A stream whose client has left so many tokens unread ends, and its request is cancelled.

    Further bytes that servers and sockets keep, some hundreds of KiB for each client, come before.
    """

    special_tokens_in_content: bool = False
    """Whether a special token in a message, such as <|im_end|>, is that token.

    By default it is its text only, or a user of a chat could write messages in the name of others. Prompts of
    /v1/completions are not concerned: they are the whole text, special tokens and all.
    """

    request_timeout_s: float | None = Field(default=None, gt=0)
    """A request that takes longer ends with the text that there is; its stop_reason is "timeout"."""

    cors_origins: tuple[Origin, ...] = ()
    """The origins whose web pages browsers let use the endpoint, e.g. https://chat.example.org."""

    access_log: bool = True
    """Write a line to the log for every request when it ends, except the probes /health and /ready."""

    log_format: LogFormat = "text"
    """The format of what we log in every process; Serve's own lines follow its `logging_config`.

    A Fleet and shards that run keep the format that they were started with.
    """
