"""From a config to an engine: the trunk, its fabric, and for `local` the shards. Imports everything heavy."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from deploy.config import AppArgs
from experts.backends import KernelSettings
from experts.checkpoint import ExpertCheckpoint
from experts.config import ExpertsConfig
from experts.device import default_device, resolve_dtype
from experts.fabric import Fabric, Membership, StepFailed
from experts.fabric.frames import max_rows
from experts.fabric.local import LocalFabric, local_membership
from experts.fabric.tcp import TcpFabric
from experts.placement import place_evenly
from experts.shard import load_shard
from router.engine import Engine
from router.request import RequestOutput
from router.tokenizer import Tokenizer, eos_token_ids
from router.trunk import Trunk


def build_engine(
    args: AppArgs,
    *,
    local: ExpertsConfig | None,
    on_outputs: Callable[[list[RequestOutput]], None],
    on_lost: Callable[[StepFailed], None],
) -> Engine:
    """An engine that has not started. local: the experts that it shall hold itself; None for fabric `tcp`."""
    bars = args.api.log_format == "text"  # they are no JSON
    if not bars:
        disable_progress_bar()  # transformers', for the trunk's weights
    torch.set_num_threads(args.router.threads or os.cpu_count() or 1)
    device = default_device()
    trunk_dtype = resolve_dtype(args.router.dtype, device=device)
    wire_dtype = trunk_dtype if args.fabric.wire_dtype == "auto" else getattr(torch, args.fabric.wire_dtype)
    trunk = Trunk(args.model.path, dtype=trunk_dtype, device=device)
    fabric: Fabric
    members: Membership | None = None
    if local is not None:
        fabric, members = _local(args.model.path, local, dtype=wire_dtype, device=device, bars=bars)
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
        eos=eos_token_ids(args.model.path),
        on_outputs=on_outputs,
        on_lost=on_lost,
    )
    if members is not None:
        engine.adopt(members)
    return engine


def _check_step(args: AppArgs, *, hidden: int, wire_dtype: torch.dtype) -> None:
    """Raises ValueError if the wire cannot carry the largest step."""
    most = max_rows(hidden, wire_dtype)
    if args.router.max_batch_tokens > most:
        raise ValueError(
            f"router.max_batch_tokens={args.router.max_batch_tokens}: fabric tcp carries at most {most} tokens "
            f"of this model per step in {wire_dtype}"
        )


def _local(
    path: Path, experts: ExpertsConfig, *, dtype: torch.dtype, device: torch.device, bars: bool
) -> tuple[LocalFabric, Membership]:
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
                progress=bars,
            )
            for rank in range(experts.shards)
        ]
    return LocalFabric(shards), local_membership(placement)
