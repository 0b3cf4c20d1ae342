"""From a config to an engine: the trunk, its fabric, and for `local` the shards. Imports everything heavy."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from deploy.config import AppArgs
from experts.backends import resolve_backend
from experts.checkpoint import ExpertCheckpoint
from experts.config import ExpertsConfig
from experts.fabric import Fabric, Membership, PeerLost
from experts.fabric.local import LocalFabric, local_membership
from experts.fabric.tcp import TcpFabric
from experts.placement import place_evenly
from experts.shard import load_shard
from router.engine import Engine
from router.request import RequestOutput
from router.tokenizer import Tokenizer, eos_token_ids
from router.trunk import Trunk


def device() -> torch.device:
    """The first GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtypes(args: AppArgs) -> tuple[torch.dtype, torch.dtype]:
    """Of the trunk and of the wire."""
    auto = torch.float32 if device().type == "cpu" else torch.bfloat16
    trunk = _dtype(args.router.dtype, auto=auto)
    return trunk, _dtype(args.fabric.wire_dtype, auto=trunk)


def build_engine(
    args: AppArgs,
    *,
    local: ExpertsConfig | None,
    on_outputs: Callable[[list[RequestOutput]], None],
    on_lost: Callable[[PeerLost], None],
) -> Engine:
    """An engine that has not started. local: the experts that it shall hold itself; None for fabric `tcp`."""
    torch.set_num_threads(args.router.threads or os.cpu_count() or 1)
    trunk_dtype, wire_dtype = dtypes(args)
    trunk = Trunk(args.model.path, dtype=trunk_dtype, device=device())
    fabric: Fabric
    members: Membership | None = None
    if local is not None:
        fabric, members = _local(args.model.path, local, dtype=wire_dtype)
    else:
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


def _local(path: Path, experts: ExpertsConfig, *, dtype: torch.dtype) -> tuple[LocalFabric, Membership]:
    with ExpertCheckpoint(path) as checkpoint:
        placement = place_evenly(checkpoint.shape, num_ranks=experts.shards)
        shards = [
            load_shard(
                checkpoint,
                placement,
                rank=rank,
                backend=resolve_backend(experts.backend),
                dtype=dtype,
                device=device(),
            )
            for rank in range(experts.shards)
        ]
    return LocalFabric(shards), local_membership(placement)


def _dtype(name: str, *, auto: torch.dtype) -> torch.dtype:
    return auto if name == "auto" else getattr(torch, name)
