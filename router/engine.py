"""Engine: the serving loop. One thread of its own; submit, cancel and adopt from any thread.

A step is: plan (frozen) -> forward -> sample -> commit. Only commit changes what a client or a later step can see, so
a step that loses a shard is simply run again, from the same plan, when a new membership has arrived.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.fabric import Aborted, Fabric, Membership, PeerLost, ShardFailed, StepFailed
from router.answer import Answer
from router.attention import PagedAttention, plan_attention
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.kv_cache import BlockTables, KVCache, num_blocks_for
from router.mailbox import Mailbox
from router.request import QueueFull, Request, RequestOutput
from router.retries import Retries
from router.sampler import LogitsError, Sampled
from router.scheduler import RunningRequest, Scheduler, StepPlan
from router.scoring import sample_next, score_prompt
from router.tokenizer import Detokenizer, Tokenizer
from router.trunk import Trunk

logger = logging.getLogger(__name__)

LINK_TIMEOUT_S = 10.0
"""To open the links of a new epoch: its shards listen already when it is published."""


@dataclass(frozen=True)
class EngineStatus:
    """A snapshot for health checks, people and metrics. idle_s: since the last step ended, None before the first.

    Since the start: num_preempted, requests put back to be computed again; num_looked_up, tokens of prompts that
    were looked up in the prefix cache, of which num_cached were found.
    """

    epoch: int
    linked: bool
    num_steps: int
    idle_s: float | None
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_preempted: int = 0
    num_looked_up: int = 0
    num_cached: int = 0


class Engine:
    """Owns the KV cache, the queue and the router's end of the fabric."""

    def __init__(
        self,
        trunk: Trunk,
        fabric: Fabric,
        tokenizer: Tokenizer,
        *,
        config: RouterConfig,
        eos: frozenset[int],
        on_outputs: Callable[[list[RequestOutput]], None],
        on_lost: Callable[[StepFailed], None],
    ) -> None:
        """on_outputs, on_lost: called in the engine's thread, at most once per step; they must not block."""
        shape, kv = trunk.shape, config.kv_cache
        num_blocks = num_blocks_for(shape, kv, dtype=trunk.dtype)
        self.max_model_len = min(shape.max_model_len, num_blocks * kv.block_size)
        """Tokens of a prompt and its answer together."""
        tables = BlockTables(
            num_blocks=num_blocks,
            block_size=kv.block_size,
            max_requests=config.max_requests,
            max_tokens=self.max_model_len,
        )
        cache = KVCache(shape, num_slots=num_blocks * kv.block_size, dtype=trunk.dtype, device=trunk.device)
        self._trunk = trunk
        self._fabric = fabric
        self._tokenizer = tokenizer
        self._config = config
        self._eos = eos
        self._on_outputs = on_outputs
        self._on_lost = on_lost
        self._cache = cache
        self._attention = PagedAttention(cache, block_size=kv.block_size)
        self._dispatcher = Dispatcher(fabric, device=trunk.device)
        self._scheduler = Scheduler(tables, max_batch_tokens=config.max_batch_tokens)
        self._live: dict[str, RunningRequest] = {}
        self._retries = Retries()
        self._linked = False
        self._unlinked_at = time.monotonic()
        self._num_steps = 0
        self._stepped_at: float | None = None
        self._mailbox = Mailbox()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End the thread and close the links; requests that still run get no more output."""
        self._mailbox.close()
        self._fabric.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError for one that can never run, QueueFull when too many wait."""
        num_tokens, vocab_size = len(request.prompt), self._trunk.shape.vocab_size
        if not 1 <= num_tokens < self.max_model_len:
            raise ValueError(
                f"the prompt has {num_tokens} tokens; at least 1 and at most {self.max_model_len - 1} fit"
            )
        if min(request.prompt) < 0 or max(request.prompt) >= vocab_size:
            raise ValueError(f"the prompt has a token id outside the vocabulary of {vocab_size}")
        num_live = len(self._live) + self._mailbox.num_submitted
        if num_live >= self._config.max_requests + self._config.max_queue:
            raise QueueFull(retry_after_s=1.0)
        self._mailbox.submit(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request: its row and blocks are free before the next step. Unknown ids are ignored."""
        self._mailbox.cancel(request_id)

    def adopt(self, members: Membership) -> None:
        """Enter this epoch before the next step."""
        self._mailbox.adopt(members)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def status(self) -> EngineStatus:
        stepped_at, tables = self._stepped_at, self._scheduler.tables
        num_running = len(self._scheduler.running)
        return EngineStatus(
            epoch=self._dispatcher.epoch,
            linked=self._linked,
            num_steps=self._num_steps,
            idle_s=None if stepped_at is None else time.monotonic() - stepped_at,
            num_running=num_running,
            num_waiting=len(self._live) + self._mailbox.num_submitted - num_running,
            num_free_blocks=tables.num_free_blocks,
            num_blocks=tables.num_blocks,
        )

    # The engine's thread

    def _run(self) -> None:
        while not self._mailbox.closed:
            mail = self._mailbox.take(or_until=lambda: self._linked and bool(self._live), timeout_s=1.0)
            if mail.members is not None:
                self._link(mail.members)
            for request in mail.submitted:
                self._begin(request)
            for request_id in mail.cancelled:
                self._cancel(request_id)
            if self._live and (outputs := self.step() if self._linked else self._give_up()):
                self._on_outputs(outputs)

    def step(self) -> list[RequestOutput]:
        """One step. If it loses a shard, nothing of it is committed and the plan is kept for the next try."""
        plan = self._retries.take() or self._scheduler.plan()
        try:
            logits_NV = self._forward(plan)
            self._num_steps += 1
            self._stepped_at = time.monotonic()
            return self._commit(plan, logits_NV)
        except PeerLost as loss:
            self._unlink(loss)
            return self._try_again(plan)
        except ShardFailed as failure:
            outputs = self._try_again(plan)
            if self._retries.doubts_shards:
                self._unlink(failure)
            else:
                logger.warning("%s", failure)
                self._link(self._dispatcher.members)
            return outputs
        except Aborted:
            return []
        except Exception:  # whatever model code raises must not end the loop for the others
            logger.exception("step %d failed", self._num_steps)
            self._link(
                self._dispatcher.members
            )  # an answer may still be on its way: links that owe one are renewed
            return self._fail(
                (part.running for part in plan.parts), "a step failed; the router's log says why"
            )

    def _try_again(self, plan: StepPlan) -> list[RequestOutput]:
        to_blame = self._retries.put(plan)
        return self._fail([to_blame], "the expert shards failed in each of its steps") if to_blame else []

    def _forward(self, plan: StepPlan) -> Tensor:
        """Logits [N, V] of the rows that are sampled or scored, in plan order."""
        device = self._trunk.device
        attention = plan_attention(
            plan.chunks, self._scheduler.tables, dtype=self._trunk.dtype, device=device
        )
        self._dispatcher.begin(step=self._num_steps, rows=plan.num_tokens)
        return self._trunk.forward(
            torch.tensor(plan.tokens(), device=device),
            torch.tensor(plan.positions(), device=device),
            keep_N=torch.tensor(plan.kept_rows(), dtype=torch.int64, device=device),
            attention=self._attention,
            plan=attention,
            experts=self._dispatcher,
        )

    def _commit(self, plan: StepPlan, logits_NV: Tensor) -> list[RequestOutput]:
        """Sample, then make the step visible: computed tokens, scores, text, freed blocks."""
        sampled: list[RunningRequest] = []
        rows: list[int] = []
        end = 0
        for part in plan.parts:
            begin, end = end, end + part.num_kept
            part.running.num_computed += part.chunk.count
            if part.running.request.params.prompt_logprobs is not None:
                score_prompt(part, logits_NV[begin:end])
            if part.samples:
                sampled.append(part.running)
                rows.append(end - 1)
        return self._sample(sampled, logits_NV if len(rows) == len(logits_NV) else logits_NV[rows])

    def _sample(self, running: Sequence[RunningRequest], logits_NV: Tensor) -> list[RequestOutput]:
        """One token for each request. Those whose logits are not finite fail, and only those."""
        try:
            sampled = sample_next(running, logits_NV)
        except LogitsError as error:
            for n in error.rows:
                self._erase(running[n])
            failed = self._fail(
                (running[n] for n in error.rows), "the model computed logits that are not finite"
            )
            good = [n for n in range(len(running)) if n not in error.rows]
            return failed + self._sample([running[n] for n in good], logits_NV[good])
        return [self._push(*pair) for pair in zip(running, sampled, strict=True)]

    def _erase(self, running: RunningRequest) -> None:
        """Its keys and values may be NaN, which would spoil whoever gets the blocks next, even behind a mask."""
        assert running.row is not None
        self._cache.erase(self._scheduler.tables.slots(running.row, 0, running.num_computed))

    def _push(self, running: RunningRequest, sampled: Sampled) -> RequestOutput:
        running.tokens.append(sampled.token)
        output = running.answer.push(sampled)
        if output.finish:
            self._forget(output.id)
        return output

    def _begin(self, request: Request) -> None:
        detokenizer = Detokenizer(self._tokenizer, request.prompt, stop=request.params.stop)
        answer = Answer(request, detokenizer, eos=self._eos, max_model_len=self.max_model_len)
        seed = random.getrandbits(63) if request.params.seed is None else request.params.seed
        running = RunningRequest(request, answer, seed=seed)
        self._live[request.id] = running
        self._scheduler.add(running)

    def _forget(self, request_id: str) -> None:
        running = self._live.pop(request_id, None)
        if running is not None:
            self._scheduler.remove(running)
            self._retries.forget(running)

    def _cancel(self, request_id: str) -> None:
        running = self._live.get(request_id)
        if running is not None and running.num_computed and not running.answer.num_tokens:
            self._erase(running)  # nobody has looked yet whether what it computed is finite
        self._forget(request_id)

    def _fail(self, running: Iterable[RunningRequest], why: str) -> list[RequestOutput]:
        failed = [one.request.id for one in running]
        for request_id in failed:
            self._forget(request_id)
        return [RequestOutput(id=request_id, finish="error", error=why) for request_id in failed]

    def _link(self, members: Membership) -> None:
        try:
            self._dispatcher.adopt(members, timeout_s=LINK_TIMEOUT_S)
        except PeerLost as loss:
            self._unlink(loss)
            return
        except Aborted:
            return
        self._linked = True
        logger.info("epoch %d: %d shards linked", members.epoch, len(members.shards))

    def _unlink(self, loss: StepFailed) -> None:
        logger.warning("%s", loss)
        if self._linked:
            self._unlinked_at = time.monotonic()
        self._linked = False
        self._on_lost(loss)

    def _give_up(self) -> list[RequestOutput]:
        """Outputs that fail everything once the shards have been away for longer than the limit."""
        stalled_s = time.monotonic() - self._unlinked_at
        if stalled_s < self._config.stall_limit_s:
            return []
        return self._fail(
            list(self._live.values()), f"the expert shards have been away for {stalled_s:.0f} s"
        )
