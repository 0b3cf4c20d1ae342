"""InProcess: an engine over shards in its own process, run until what it was asked is answered."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from experts.checkpoint.reader import ExpertCheckpoint
from experts.fabric import Fabric, StepFailed
from experts.fabric.faulty import Fault, FaultyFabric
from experts.fabric.local import LocalFabric, local_membership
from experts.placement import ExpertPlacement, place_evenly
from experts.shard import ExpertShard, load_shard
from router.cache.kv_cache import memory_for
from router.config import RouterConfig
from router.engine import Engine
from router.model.trunk import Trunk
from router.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprob
from router.schedule.scheduler import Scheduler
from router.schedule.step_plan import StepPlan
from router.text.tokenizer import Tokenizer, eos_token_ids

CPU = torch.device("cpu")
SMALL_KV = 2**26
"""The KV cache's bytes where a test does not say: a pool that is checked at every step had better not be
large."""


@dataclass
class Joined:
    """All outputs of one request, joined."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_cached: int = 0
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    def add(self, output: RequestOutput) -> None:
        self.text += output.text
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.num_cached += output.num_cached
        self.finish, self.stop_reason, self.error = output.finish, output.stop_reason, output.error


class CheckedEngine(Engine):
    """An engine whose plans are checked before every step, and its block tables after it.

    checked: false for benchmarks, which then run the plain engine. at_step: what else happens, in the engine's thread, once so many steps have succeeded; such as late requests.
    preempted: requests that were put back after they had begun to answer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checked = True
        self.at_step: dict[int, Callable[[], None]] = {}
        self.preempted: set[str] = set()
        self._scheduler.plan = self._plan

    def _plan(self) -> StepPlan:
        plan = Scheduler.plan(self._scheduler)
        if not self.checked:
            return plan
        assert 1 <= len(plan.tokens) <= self._config.max_batch_tokens
        planned = [part.running for part in plan.parts]
        assert all(one in planned for one in self._scheduler.running if one.num_left == 1), (
            "who decodes goes on"
        )
        return plan

    def step(self) -> list[RequestOutput]:
        if not self.checked:
            return super().step()
        self.at_step.pop(self._num_steps, lambda: None)()
        outputs = super().step()
        self._scheduler.tables.check_integrity()
        waiting = self._scheduler.waiting
        self.preempted |= {one.request.id for one in waiting if len(one.tokens) > len(one.request.prompt)}
        return outputs


class InProcess:
    """An engine and its shards in this process. Shards that are lost come back: the engine enters the next epoch with the same ones.

    at_loss: what else happens, in the engine's thread, before they do.
    """

    def __init__(
        self,
        path: Path,
        fabric: Fabric,
        placement: ExpertPlacement,
        *,
        dtype: torch.dtype,
        device: torch.device,
        config: RouterConfig,
    ) -> None:
        kv = config.kv_cache
        self.at_loss: Callable[[], None] = lambda: None
        self.losses: list[StepFailed] = []
        self.answers: dict[str, Joined] = {}
        self._placement = placement
        self._changed = threading.Condition()
        self.engine = CheckedEngine(
            trunk_of(path, dtype, device),
            fabric,
            Tokenizer(path),
            config=config,
            kv_bytes=SMALL_KV if kv.memory_gib == "auto" else memory_for(kv, device=device),
            eos=eos_token_ids(path),
            on_outputs=self._take,
            on_lost=self._lost,
        )
        self.engine.adopt(local_membership(placement))

    def run(
        self, requests: Iterable[Request], *, failing: Collection[str] = (), deadline_s: float = 120
    ) -> dict[str, Joined]:
        """Run until every request has its answer, late ones included, and return all answers. The first requests come in one batch.

        Asserts that the failing ones have errors, and no others, and that in the end every block is free.
        """
        for request in requests:
            self.submit(request)
        if not self.engine.is_alive():
            self.engine.start()
        with self._changed:
            assert self._changed.wait_for(self._complete, deadline_s), self.engine.status()
        assert not self.engine.at_step, f"the engine was done before step {min(self.engine.at_step)}"
        errors = {name: answer.error for name, answer in self.answers.items() if answer.error}
        assert errors.keys() == set(failing), errors
        status = self.engine.status()
        assert status.num_free_blocks == status.num_blocks, status
        return self.answers

    def submit(self, request: Request) -> None:
        self.answers[request.id] = Joined()
        self.engine.submit(self.engine.prepare(request))

    def cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)
        self.answers[request_id].finish = "cancelled"

    def _complete(self) -> bool:
        return all(answer.finish for answer in self.answers.values())

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        with self._changed:
            for output in outputs:
                if self.answers[output.id].finish != "cancelled":
                    self.answers[output.id].add(output)
            self._changed.notify()

    def _lost(self, loss: StepFailed) -> None:
        self.losses.append(loss)
        self.at_loss()
        self.engine.adopt(local_membership(self._placement, epoch=loss.epoch + 1))


@contextmanager
def in_process(
    path: Path,
    *,
    num_shards: int,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    config: RouterConfig | None = None,
    fabric: Callable[[Sequence[ExpertShard]], Fabric] = LocalFabric,
) -> Iterator[InProcess]:
    """Yield an engine over shards of a checkpoint; it is stopped at the end.

    dtype: of trunk, wire and experts.
    """
    placement = placement_of(path, num_shards)
    shards = shards_of(path, num_shards, backend, dtype, device)
    server = InProcess(
        path, fabric(shards), placement, dtype=dtype, device=device, config=config or RouterConfig()
    )
    try:
        yield server
    finally:
        server.engine.stop()
        assert not server.engine.is_alive()


def faulty(shards: Sequence[ExpertShard], *, faults: Sequence[Fault]) -> Fabric:
    """Return a fabric for in_process() that fails as `faults` say."""
    return FaultyFabric(LocalFabric(shards), faults)


def greedy(name: str, prompt: Iterable[int], *, num_tokens: int) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True))


# Trunk and shards keep nothing of a request, so engines that run one after the other share them.


@cache
def trunk_of(path: Path, dtype: torch.dtype, device: torch.device) -> Trunk:
    return Trunk.load(path, dtype=dtype, device=device)


@cache
def placement_of(path: Path, num_shards: int) -> ExpertPlacement:
    with ExpertCheckpoint(path) as checkpoint:
        return place_evenly(checkpoint.shape, num_ranks=num_shards)


@cache
def shards_of(
    path: Path, num_shards: int, backend: str, dtype: torch.dtype, device: torch.device
) -> list[ExpertShard]:
    placement = placement_of(path, num_shards)
    with ExpertCheckpoint(path) as checkpoint:
        return [
            load_shard(checkpoint, placement, rank=rank, backend=backend, dtype=dtype, device=device)
            for rank in range(num_shards)
        ]
