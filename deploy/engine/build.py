"""Building an engine from a config: the trunk, the fabric and, for the fabric `local`, the shards.

It imports torch and transformers, so it is itself imported late.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from deploy.config import AppArgs
from experts.backends import KernelSettings
from experts.checkpoint.index import CheckpointIndex
from experts.checkpoint.reader import ExpertCheckpoint
from experts.config import ExpertsConfig
from experts.device import default_device, resolve_dtype
from experts.fabric import Fabric, Membership, StepFailed, Waited
from experts.fabric.local import LocalFabric, local_membership
from experts.fabric.tcp.frames import max_rows
from experts.fabric.tcp.router_end import TcpFabric
from experts.placement import place_evenly
from experts.progress import show
from experts.shard import load_shard
from router.cache.kv_cache import memory_for
from router.engine import Engine
from router.model.trunk import Trunk
from router.request import RequestOutput
from router.text.tokenizer import Tokenizer, eos_token_ids


class BuiltEngine(NamedTuple):
    """An engine that has not started. waited: the method of its fabric (see Fabric.waited)."""

    engine: Engine
    waited: Callable[[], Mapping[int, Waited]]


def build_engine(
    args: AppArgs,
    *,
    experts: ExpertsConfig,
    shares_gpu: bool,
    on_outputs: Callable[[list[RequestOutput]], None],
    on_lost: Callable[[StepFailed], None],
) -> BuiltEngine:
    """Load the trunk and return an engine around it.

    shares_gpu: a shard is, or will be, on the same GPU, so memory for its experts is set aside. on_outputs
    and on_lost are called in the engine's thread. Raises ValueError for a config that this machine or model
    cannot serve.
    """
    torch.set_num_threads(args.router.threads or os.cpu_count() or 1)
    device = default_device()
    trunk_dtype = resolve_dtype(args.router.dtype, device=device)
    wire_dtype = trunk_dtype if args.fabric.wire_dtype == "auto" else getattr(torch, args.fabric.wire_dtype)
    trunk = Trunk.load(args.model.path, dtype=trunk_dtype, device=device, report=show("trunk"))
    fabric: Fabric
    members: Membership | None = None
    if args.fabric.kind == "local":
        fabric, members = _local(args.model.path, experts, dtype=wire_dtype, device=device)
    else:
        _check_step(args, hidden=trunk.shape.hidden, wire_dtype=wire_dtype)
        fabric = TcpFabric(
            hidden=trunk.shape.hidden,
            wire_dtype=wire_dtype,
            slow_after_s=args.fabric.slow_after_s,
            dead_after_s=args.fabric.dead_after_s,
        )
    engine = Engine(
        trunk,
        fabric,
        Tokenizer(args.model.path),
        config=args.router,
        kv_bytes=memory_for(
            args.router.kv_cache,
            device=device,
            set_aside=shard_bytes(args.model.path, num_shards=experts.shards) if shares_gpu else 0,
        ),
        eos=eos_token_ids(args.model.path),
        on_outputs=on_outputs,
        on_lost=on_lost,
    )
    if members is not None:
        engine.adopt(members)
    return BuiltEngine(engine, fabric.waited)


def shard_bytes(path: Path, *, num_shards: int) -> int:
    """Return the bytes of the largest shard's experts, in FP4 with an FP8 scale for every 16 weights."""
    with CheckpointIndex(path) as index:
        shape = index.shape
    num_experts = -(-shape.num_experts // num_shards) * len(shape.moe_layers)
    return num_experts * 3 * shape.hidden * shape.intermediate * 9 // 16


def _check_step(args: AppArgs, *, hidden: int, wire_dtype: torch.dtype) -> None:
    """Raise ValueError if the wire cannot carry the largest step."""
    most = max_rows(hidden, wire_dtype)
    if args.router.max_batch_tokens > most:
        raise ValueError(
            f"router.max_batch_tokens={args.router.max_batch_tokens}: fabric tcp carries at most {most} tokens "
            f"of this model per step in {wire_dtype}"
        )


def _local(
    path: Path, experts: ExpertsConfig, *, dtype: torch.dtype, device: torch.device
) -> tuple[LocalFabric, Membership]:
    """Load all shards into this process and return a fabric over them with their membership."""
    with ExpertCheckpoint(path) as checkpoint:
        placement = place_evenly(checkpoint.shape, num_ranks=experts.shards)
        shards = [
            load_shard(
                checkpoint,
                placement,
                rank=rank,
                backend=experts.backend,
                dtype=dtype,
                device=device,
                settings=KernelSettings.of(experts),
                report=show(f"shard {rank}"),
            )
            for rank in range(experts.shards)
        ]
    return LocalFabric(shards), local_membership(placement)
