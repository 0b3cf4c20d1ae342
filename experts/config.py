"""The settings of a user for the experts and for the wire to them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """The base of every config: it is frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ExpertsConfig(Config):
    """The settings of the experts.

    They may change while serving: they stand in the Router deployment's `user_config`.
    """

    shards: int = Field(ge=1)
    """The number of EP ranks, each a process that pins its share of every layer's experts."""

    backend: Literal["auto", "reference", "torch", "cpu", "triton", "b12x", "b12x-w4a16", "b12x-emulated"] = (
        "auto"
    )
    """The kernel that computes experts. `auto` takes the fastest that this machine's devices run."""

    strategy: Literal["auto", "spread", "pack"] = "auto"
    """The placement of shards on nodes: `spread` wants a node each, `pack` fills a node first, `auto` spreads if it can."""

    scales: Literal["exact", "baked"] = "exact"
    """The multipliers of `b12x` and its emulation. `exact` keeps the checkpoint's; `baked` rounds them into the block
    scales, which is less accurate and what vLLM's class for this kernel does."""

    micro: bool = False
    """Leave FlashInfer's micro kernels on for calls of backend `b12x` of up to 8 tokens, although they race."""

    threads: int | None = Field(default=None, ge=1)
    """The CPU threads of each shard's torch; None takes every core, or one where the shard has a GPU. `cpu` uses one."""


class FabricConfig(Config):
    """The settings of the wire between router and shards. They are fixed for the life of a router."""

    kind: Literal["auto", "local", "tcp"] = "auto"
    """The kind of wire. `local` runs every shard inside the router's process; `auto` is `tcp`."""

    wire_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of hidden states and partial sums on the wire; `auto` is the trunk's."""

    slow_after_s: float = Field(default=2.0, gt=0)
    """The seconds that a shard may take over one layer before the log reports it as slow."""

    dead_after_s: float = Field(default=10.0, gt=0)
    """The seconds that a shard may take over one layer before it is declared dead and replaced."""

    @model_validator(mode="after")
    def _slow_before_dead(self) -> "FabricConfig":
        if self.slow_after_s >= self.dead_after_s:
            raise ValueError(
                f"slow_after_s={self.slow_after_s} must be below dead_after_s={self.dead_after_s}"
            )
        return self
