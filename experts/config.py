"""What a user may say about the experts and about the wire to them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Base of every config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ExpertsConfig(Config):
    """May change while serving: it stands in the Router deployment's `user_config`."""

    shards: int = Field(ge=1)
    """EP ranks, each a process that pins its share of every layer's experts."""

    backend: Literal["auto", "reference", "torch", "cpu", "triton", "b12x", "b12x-w4a16", "b12x-emulated"] = (
        "auto"
    )
    """The kernel. `auto` takes the fastest that this machine's devices run."""

    strategy: Literal["auto", "spread", "pack"] = "auto"
    """Where shards go: `spread` wants a node each, `pack` fills a node first, `auto` spreads if it can."""

    scales: Literal["exact", "baked"] = "exact"
    """Of `b12x` and its emulation. `exact` keeps the checkpoint's multipliers; `baked` rounds them into the block scales,
    which is less accurate and what vLLM's class for this kernel does."""

    micro: bool = False
    """Of `b12x`: leave FlashInfer's micro kernels on for calls of up to 8 tokens, although they race."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each shard's kernel; None leaves it to torch, which takes every core. `cpu` uses one."""


class FabricConfig(Config):
    """The wire between router and shards; fixed for the life of a router."""

    kind: Literal["auto", "local", "tcp"] = "auto"
    """`local` runs every shard inside the router's process; `auto` is `tcp`."""

    wire_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of hidden states and partial sums on the wire; `auto` follows the trunk."""

    slow_after_s: float = Field(default=2.0, gt=0)
    """A shard that takes longer over one layer is reported in the log."""

    dead_after_s: float = Field(default=10.0, gt=0)
    """A shard that takes longer over one layer is declared dead and replaced."""

    @model_validator(mode="after")
    def _slow_before_dead(self) -> "FabricConfig":
        if self.slow_after_s >= self.dead_after_s:
            raise ValueError(
                f"slow_after_s={self.slow_after_s} must be below dead_after_s={self.dead_after_s}"
            )
        return self
