"""What a user may say about the endpoint."""

from typing import Annotated

from pydantic import Field

from deploy.logs import LogFormat
from deploy.paths import FromRoot
from experts.config import Config

Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]
"""As browsers send it: with a scheme, perhaps a port, and no slash at the end; `*` is every one."""


class ApiConfig(Config):
    """Fixed for the life of an ingress."""

    keys_file: FromRoot | None = None
    """API keys, on every node that an ingress may run on: a line is `KEY` or `NAME KEY`, comments begin with #. What
    changes in it counts within a second. None: whoever reaches the endpoint may use it."""

    max_body_mib: int = Field(default=8, ge=1)
    """A longer body is refused (HTTP 413)."""

    request_timeout_s: float | None = Field(default=None, gt=0)
    """A request that takes longer ends with the text that there is; its finish_reason is "timeout"."""

    cors_origins: tuple[Origin, ...] = ()
    """Web pages that browsers let use the endpoint, e.g. https://chat.example.org."""

    access_log: bool = True
    """A line for every request when it ends, but for probes: /health and /ready."""

    log_format: LogFormat = "text"
    """Of what we write in every process; Serve's own lines follow its `logging_config`. A Fleet and shards that run keep
    what they were started with."""
