"""The config of the router: the engine and the trunk that it drives."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from experts.config import Config


class KVCacheConfig(Config):
    """The paged KV cache."""

    block_size: int = Field(default=16, ge=1, le=256)
    """Tokens per block."""

    memory_gib: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Memory for keys and values of all layers together, in GiB; `auto` takes what the device has left, see kv_cache.memory_for."""

    dtype: Literal["auto", "fp8_e4m3"] = "auto"
    """Dtype of keys and values; `auto` is the trunk's. FP8 holds twice as many tokens, a little less exactly, see fp8.py."""


class RouterConfig(Config):
    """The engine; fixed for the life of a router."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the trunk; `auto` is float32 on a CPU and bfloat16 on a GPU."""

    max_requests: int = Field(default=64, ge=1)
    """Requests that run at the same time; more wait in the queue."""

    max_queue: int = Field(default=256, ge=0)
    """Requests that may wait; one more is refused (HTTP 429)."""

    max_batch_tokens: int = Field(default=2048, ge=1)
    """Most tokens of one step; a longer prompt is computed in parts. There must be at least one for each of max_requests."""

    stall_limit_s: float = Field(default=900.0, gt=0)
    """Seconds that requests wait for lost shards before they fail (HTTP 503)."""

    drain_s: float = Field(default=30.0, ge=0)
    """Seconds that requests may go on once the server is told to stop; then they end with the text that they have."""

    ready_within_s: float = Field(default=10.0, gt=0)
    """/ready is true while the last decode step is no older than so many seconds; if it is older, a step is made."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the trunk; None leaves it to torch, which takes every core."""

    kv_cache: KVCacheConfig = KVCacheConfig()

    @model_validator(mode="after")
    def _every_request_goes_on(self) -> "RouterConfig":
        if self.max_batch_tokens < self.max_requests:
            raise ValueError(
                f"max_batch_tokens={self.max_batch_tokens} is less than max_requests={self.max_requests}: "
                "each step must have a token for every request that runs"
            )
        return self
