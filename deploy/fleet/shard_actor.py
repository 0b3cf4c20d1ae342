"""ShardActor: the process of one expert shard, a detached Ray actor."""

import os
import secrets
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from deploy import logs
from deploy.fleet.spec import FleetSpec, ShardState, ShardStats
from deploy.kernel_caches import keep_kernels
from experts.fabric import ShardAddress
from experts.fabric.tcp.layer_log import Layers
from experts.placement import ExpertPlacement, place_evenly
from experts.progress import Progress, show, took

if TYPE_CHECKING:
    from experts.fabric.tcp.shard_end import ShardListener
    from experts.shard import ExpertShard


class ShardActor:
    """A Ray actor around one ExpertShard, with threads: its other methods answer while `load` runs.

    It exits by itself when its lease lapses, which is spec.lease_s at first.
    """

    def __init__(self, spec: FleetSpec, rank: int, name: str) -> None:
        keep_kernels()
        logs.configure(spec.log_format)
        self._spec = spec
        self._rank = rank
        self._name = name
        self._epoch = 0
        self._address: ShardAddress | None = None
        self._placement: ExpertPlacement | None = None
        self._listener: ShardListener | None = None
        self._shard: ExpertShard | None = None
        self._loading: Progress | None = Progress(0, 1, "libraries")
        self._show = show(f"shard {rank}")
        self._node = ray.get_runtime_context().get_node_id()
        self._watched = threading.Event()
        self._lease_ends = time.monotonic() + spec.lease_s
        threading.Thread(target=self._exit_without_lease, name="lease", daemon=True).start()

    def load(self) -> ShardAddress:
        """Load the experts and listen for routers.

        Raises ValueError for a checkpoint that cannot be served.
        """
        self._report(Progress(0, 1, "libraries"))
        # Imported here, because the Fleet imports this class, and its start need not wait for torch.
        import torch

        from experts.backends import KernelSettings
        from experts.checkpoint.reader import ExpertCheckpoint
        from experts.device import default_device, resolve_dtype
        from experts.fabric.tcp.shard_end import ShardListener
        from experts.shard import load_shard

        self._report(Progress(1, 1, "libraries"))
        spec, experts, device = self._spec, self._spec.experts, default_device()
        # On a GPU the host only starts kernels; a pool for each shard of the host would only be in the way.
        usual = 1 if device.type == "cuda" else os.cpu_count() or 1
        torch.set_num_threads(experts.threads or usual)
        with ExpertCheckpoint(Path(spec.checkpoint)) as checkpoint:
            self._placement = place_evenly(checkpoint.shape, num_ranks=experts.shards)
            self._shard = load_shard(
                checkpoint,
                self._placement,
                rank=self._rank,
                backend=experts.backend,
                dtype=resolve_dtype(spec.dtype, device=device),
                device=device,
                settings=KernelSettings.of(experts),
                report=self._report,
            )
        host, token = ray.util.get_node_ip_address(), secrets.token_bytes(32)
        self._listener = ShardListener(self._shard, host=host, name=self._name, token=token)
        self._address = self._listener.address
        self._loading = None
        return self._address

    def describe(self) -> ShardState:
        """Return what a restarted Fleet has to know of this shard."""
        return ShardState(
            rank=self._rank,
            spec=self._spec,
            address=self._address,
            placement=self._placement,
            epoch=self._epoch,
            node=self._node,
        )

    def stats(self) -> ShardStats:
        """Return the counts and the size of this shard. Waits for the device."""
        num_pairs, num_activated = self._shard.counts() if self._shard else (0, 0)
        layers = self._listener.log.total() if self._listener else Layers()
        return ShardStats(
            rank=self._rank,
            pid=os.getpid(),
            node=self._node,
            num_pairs=num_pairs,
            num_activated=num_activated,
            num_layers=layers.num_layers,
            num_rows=layers.num_rows,
            layer_s=layers.seconds,
            resident_mib=_resident_mib(),
            loading=self._loading,
            took=took(),
        )

    def note_epoch(self, epoch: int) -> None:
        """Remember an epoch, so that a restarted Fleet counts on from the highest that a shard has seen."""
        self._epoch = max(self._epoch, epoch)

    def renew(self, ttl_s: float) -> None:
        """Make the lease end ttl_s seconds from now."""
        self._lease_ends = time.monotonic() + ttl_s

    def until_death(self) -> None:
        """Block until called again, so that Ray tells the caller within milliseconds when this process dies.

        The next call ends this one, because a Fleet that died leaves its call behind, which would hold one of
        this actor's threads for good.
        """
        before, self._watched = self._watched, threading.Event()
        before.set()
        self._watched.wait()

    def _report(self, progress: Progress) -> None:
        self._loading = progress
        self._show(progress)

    def _exit_without_lease(self) -> None:
        while time.monotonic() < self._lease_ends:
            time.sleep(1.0)
        os._exit(0)  # no router wants this shard any more; a clean exit would wait for until_death


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
