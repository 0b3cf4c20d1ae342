"""Engine: the serving loop. One thread of its own; submit, cancel and adopt from any thread.

A step is: plan (frozen) -> forward -> sample -> commit. Only commit changes what a client or a later step can see, so
a step that loses a shard is simply run again, from the same plan, when a new membership has arrived.
"""

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from experts.fabric import Aborted, Fabric, Membership, PeerLost, ShardFailed, StepFailed
from experts.progress import show
from router.cache.block_tables import BlockTables
from router.cache.kv_cache import KVCache, num_blocks_for, stored_dtype
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.model.attention import PagedAttention, plan_attention
from router.model.decode_graphs import batch_sizes, graphs_of
from router.model.trunk import Trunk
from router.request import QueueFull, Request, RequestOutput
from router.sampling.grammar import Grammars
from router.sampling.sampler import LogitsError, Sampled, sample
from router.schedule.inbox import Inbox
from router.schedule.roster import Roster
from router.schedule.running import Answer, RunningRequest
from router.schedule.scheduler import Scheduler
from router.schedule.step_plan import StepPlan
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PAUSE_S = 0.1
"""Seconds after a turn that failed outside its step, lest one that always fails fill the log."""


@dataclass(frozen=True)
class EngineStatus:
    """A snapshot of the engine for health checks, people and metrics.

    idle_s: seconds since the last step ended, None before the first. It counts, since the start: num_preempted, requests
    that were preempted, to be computed again; num_looked_up, tokens of prompts that were looked up in the prefix cache,
    of which num_cached were found.
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
    """The loop that serves requests with one trunk and its expert shards. Owns the KV cache, the queue and the wire."""

    def __init__(
        self,
        trunk: Trunk,
        fabric: Fabric,
        tokenizer: Tokenizer,
        *,
        config: RouterConfig,
        kv_bytes: int,
        eos: frozenset[int],
        on_outputs: Callable[[list[RequestOutput]], None],
        on_lost: Callable[[StepFailed], None],
    ) -> None:
        """Allocate the KV cache and prepare, but do not start, the thread.

        kv_bytes: memory for keys and values. on_outputs, on_lost: called in the engine's thread, at most once per step;
        they must not block.
        """
        shape, block_size = trunk.shape, config.kv_cache.block_size
        kv_dtype = stored_dtype(config.kv_cache, dtype=trunk.dtype, device=trunk.device)
        num_blocks = num_blocks_for(shape, kv_bytes, block_size=block_size, dtype=kv_dtype)
        self.max_model_len = min(shape.max_model_len, num_blocks * block_size)
        """Most tokens of a prompt and its answer together."""
        self._tables = BlockTables(
            num_blocks=num_blocks,
            block_size=block_size,
            max_requests=config.max_requests,
            max_tokens=self.max_model_len,
        )
        self._cache = KVCache(shape, num_slots=num_blocks * block_size, dtype=kv_dtype, device=trunk.device)
        self._trunk = trunk
        self._tokenizer = tokenizer
        self._config = config
        self._eos = eos
        self._on_outputs = on_outputs
        self._attention = PagedAttention(self._cache, block_size=block_size)
        self._dispatcher = Dispatcher(fabric, device=trunk.device, on_lost=on_lost)
        self._scheduler = Scheduler(self._tables, max_batch_tokens=config.max_batch_tokens)
        self._roster = Roster(self._scheduler)
        self._graphs = graphs_of(
            trunk,
            self._attention,
            self._dispatcher,
            sizes=batch_sizes(config.max_requests),
            max_blocks=self._tables.table_RN.shape[1],
        )
        self._num_steps = 0
        self._stepped_at: float | None = None
        self._inbox = Inbox()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From any thread

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End the thread and close the links; requests that still run get no more output."""
        self._inbox.close()
        self._dispatcher.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def prepare(self, request: Request) -> RunningRequest:
        """Check a request and make what `submit` takes. A grammar may take a second.

        Raises ValueError for a request that can never run.
        """
        params, num_tokens, vocab_size = request.params, len(request.prompt), self._trunk.shape.vocab_size
        if not 1 <= num_tokens < self.max_model_len:
            raise ValueError(
                f"the prompt has {num_tokens} tokens; at least 1 and at most {self.max_model_len - 1} fit"
            )
        ids = [*request.prompt, *params.stop_token_ids, *(token for token, _ in params.logit_bias)]
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(f"the request has a token id outside the vocabulary of {vocab_size}")
        now = time.monotonic()
        return RunningRequest(
            request,
            Answer(
                request,
                Detokenizer(self._tokenizer, request.prompt, stop=params.stop),
                eos=self._eos,
                max_model_len=self.max_model_len,
            ),
            seed=random.getrandbits(63) if params.seed is None else params.seed,
            guide=None if params.grammar is None else self._grammars.guide(params.grammar),
            came_at=now,
            deadline=math.inf if request.timeout_s is None else now + request.timeout_s,
        )

    def submit(self, prepared: RunningRequest) -> None:
        """Queue a request. Raises QueueFull when too many wait."""
        num_live = len(self._roster) + self._inbox.num_submitted
        if num_live >= self._config.max_requests + self._config.max_queue:
            raise QueueFull
        self._inbox.submit(prepared)

    def cancel(self, request_id: str) -> None:
        """Forget a request: its row and blocks are free before the next step. Unknown ids are ignored."""
        self._inbox.cancel(request_id)

    def expire_all(self) -> None:
        """End every request as if its time were up."""
        self._inbox.expire_all()

    def adopt(self, members: Membership) -> None:
        """Enter this epoch before the next step."""
        self._inbox.adopt(members)

    def is_alive(self) -> bool:
        """Return whether the engine's thread runs."""
        return self._thread.is_alive()

    def status(self) -> EngineStatus:
        """Return a snapshot of the engine."""
        stepped_at, scheduler = self._stepped_at, self._scheduler
        num_running = len(scheduler.running)
        return EngineStatus(
            epoch=self._dispatcher.epoch,
            linked=self._dispatcher.linked,
            num_steps=self._num_steps,
            idle_s=None if stepped_at is None else time.monotonic() - stepped_at,
            num_running=num_running,
            num_waiting=len(self._roster) + self._inbox.num_submitted - num_running,
            num_free_blocks=self._tables.num_free_blocks,
            num_blocks=self._tables.num_blocks,
            num_preempted=scheduler.num_preempted,
            num_looked_up=scheduler.num_looked_up,
            num_cached=scheduler.num_found,
        )

    @cached_property
    def _grammars(self) -> Grammars:
        """Made for the first request that has a grammar: a large vocabulary takes a second."""
        return Grammars(self._tokenizer.to_json(), vocab_size=self._trunk.shape.vocab_size, eos=self._eos)

    # The engine's thread

    def _run(self) -> None:
        while not self._inbox.closed:
            try:
                self.turn(wait_s=1.0)
            except (
                Exception
            ):  # the thread ends with the process only: a dead one would leave every client waiting
                logger.exception("a turn of the engine failed")
                time.sleep(PAUSE_S)

    def turn(self, *, wait_s: float) -> None:
        """Take what other threads have asked for, then run one step. wait_s: how long to wait for something to do."""
        dispatcher, roster = self._dispatcher, self._roster
        mail = self._inbox.take(timeout_s=0.0 if dispatcher.linked and roster else wait_s)
        if mail.members is not None:
            dispatcher.adopt(mail.members)
            if self._graphs and dispatcher.linked:
                self._graphs.capture(report=show("router"))
        for prepared in mail.submitted:
            roster.add(prepared)
        for request_id in mail.cancelled:
            roster.forget(request_id)
        outputs = roster.expire(math.inf if mail.expire_all else time.monotonic())
        if roster:
            outputs += self.step() if dispatcher.linked else self._give_up()
        if outputs:
            self._on_outputs(outputs)

    def step(self) -> list[RequestOutput]:
        """Run one step. If it loses a shard, nothing of it is committed and the plan is kept for the next try."""
        plan = self._roster.next_plan()
        if plan.guides:
            self._grammars.start_masks(plan.guides)  # other threads compute them while the forward runs
        try:
            logits_NV = self._forward(plan)
            self._num_steps += 1
            self._stepped_at = time.monotonic()
            return self._commit(plan, logits_NV)
        except PeerLost as loss:
            self._dispatcher.lose(loss)
            return self._roster.retry(plan)
        except ShardFailed as failure:
            outputs = self._roster.retry(plan)
            if self._roster.doubts_shards:
                self._dispatcher.lose(failure)
            else:
                logger.warning("%s", failure)
                self._dispatcher.renew()
            return outputs
        except Aborted:
            return []
        except Exception:  # whatever model code raises must not end the loop for the others
            logger.exception("step %d failed", self._num_steps)
            self._dispatcher.renew()
            ones = [part.running for part in plan.parts]
            return self._roster.fail("a step failed; the router's log says why", ones)

    def _forward(self, plan: StepPlan) -> Tensor:
        """Return the logits [N, V] of the rows that are sampled or scored, in plan order."""
        device = self._trunk.device
        if len(slots := self._tables.slots_to_erase()):
            self._cache.erase(slots)
        attention = plan_attention(
            plan.chunks, self._tables, shape=self._trunk.shape, dtype=self._trunk.dtype, device=device
        )
        self._dispatcher.begin(step=self._num_steps, rows=len(plan.tokens))
        if self._graphs and self._graphs.fits(attention):
            logits_BV = self._graphs.forward(plan.tokens, plan.positions, attention)
            kept = plan.kept_rows
            return logits_BV if len(kept) == len(logits_BV) else logits_BV[kept]
        return self._trunk.forward(
            torch.tensor(plan.tokens, device=device),
            torch.tensor(plan.positions, device=device),
            keep_N=torch.tensor(plan.kept_rows, dtype=torch.int64, device=device),
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
                part.score_prompt(logits_NV[begin:end])
            if part.samples:
                sampled.append(part.running)
                rows.append(end - 1)
        return self._sample(sampled, logits_NV if len(rows) == len(logits_NV) else logits_NV[rows])

    def _sample(self, running: Sequence[RunningRequest], logits_NV: Tensor) -> list[RequestOutput]:
        """Sample one token for each request. Those whose logits are not finite fail, and only those."""
        if not running:
            return []
        try:
            sampled = sample(logits_NV, [live.sampling_row() for live in running])
        except LogitsError as error:
            bad = [running[n] for n in error.rows]
            failed = self._roster.fail("the model computed logits that are not finite", bad)
            good = [n for n in range(len(running)) if n not in error.rows]
            return failed + self._sample([running[n] for n in good], logits_NV[good])
        chosen = [(live.guide, one.token) for live, one in zip(running, sampled, strict=True) if live.guide]
        if chosen:
            self._grammars.accept(chosen)
        return [self._push(*pair) for pair in zip(running, sampled, strict=True)]

    def _push(self, running: RunningRequest, sampled: Sampled) -> RequestOutput:
        """Commit one more token. Its logits were finite, so what it was computed from is: others may share it."""
        self._scheduler.prove(running)
        running.tokens.append(sampled.token)
        guide = running.guide
        if guide is not None and guide.error:
            why = f"the grammar cannot go on: {guide.error}"
            return self._roster.fail(why, [running], at_fault=True)[0]
        output = running.answer.push(sampled, complete=guide is not None and guide.finished)
        if output.finish:
            self._roster.forget(output.id)
        return output

    def _give_up(self) -> list[RequestOutput]:
        """Return outputs that fail everything once the shards have been away for longer than the limit."""
        away_s = self._dispatcher.away_s
        if away_s < self._config.stall_limit_s:
            return []
        return self._roster.fail(f"the expert shards have been away for {away_s:.0f} s")
