"""Calibration: the largest inputs of a checkpoint's expert matrices on a sample text, from which input scales are made.

The trunk runs as it does when serving, all sequences in one forward. A recorder takes the dispatcher's place and reads one
expert at a time, so memory holds the trunk, one expert and the activations.
T tokens, D hidden, K top-k, R tokens routed to one expert, I intermediate.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.checkpoint.reader import ExpertCheckpoint
from experts.progress import Progress, Report, show, silent
from router.cache.block_tables import BlockTables
from router.cache.kv_cache import KVCache
from router.model.attention import Chunk, PagedAttention, plan_attention
from router.model.trunk import Trunk
from router.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_TEXT = Path(__file__).with_name("calibration.txt")
"""The sample that is shipped: English, code and chats."""

SEQUENCE_TOKENS = 512
MAX_SEQUENCES = 64


def calibrate(checkpoint: Path, text: Path, *, progress: bool) -> dict[int, tuple[float, float]]:
    """Return, for each MoE layer, the largest magnitude of the inputs of gate and up, and of those of down.

    checkpoint: not quantised. The first 32768 tokens of the text count. Runs on the GPU in bfloat16 if there is one,
    else on the CPU in float32. Raises ValueError for a checkpoint that we do not serve, or a text without tokens.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with ExpertCheckpoint(checkpoint) as experts:
        if experts.format != "dense":
            raise ValueError(f"{checkpoint}: is already quantised; give the BF16 checkpoint")
        report = show("calibrate") if progress else silent
        trunk = Trunk.load(checkpoint, dtype=dtype, device=device, report=report)
        sequences = _sequences(checkpoint, text, max_tokens=min(SEQUENCE_TOKENS, trunk.shape.max_model_len))
        recorder = _Recorder(experts, report)
        _forward(trunk, sequences, recorder)
        recorder.report_layers()
        return recorder.amax


class _Recorder:
    """A stand-in for the dispatcher: computes routed experts with weights from disk, and records their matrices' inputs."""

    def __init__(self, experts: ExpertCheckpoint, report: Report) -> None:
        self.amax: dict[int, tuple[float, float]] = {}
        self._experts = experts
        self._report = report

    def report_layers(self) -> None:
        """Report how many layers are done."""
        self._report(Progress(len(self.amax), len(self._experts.shape.moe_layers), "layers"))

    def moe(self, layer: int, x_TD: Tensor, logical_TK: Tensor, w_TK: Tensor) -> Tensor:
        self.report_layers()
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        down_amax = x_TD.new_zeros(())
        for expert in range(self._experts.shape.num_experts):
            token_R, k_R = (logical_TK == expert).nonzero(as_tuple=True)
            if len(token_R) == 0:
                continue
            gate, up, down = (matrix.to(x_TD) for matrix in self._experts.read_dense(layer, expert))
            x_RD = x_TD[token_R]
            h_RI = F.silu(x_RD @ gate.T) * (x_RD @ up.T)
            out_TD.index_add_(0, token_R, (h_RI @ down.T).float() * w_TK[token_R, k_R, None])
            down_amax = torch.maximum(down_amax, h_RI.abs().amax())  # unlike max(), it keeps a NaN
        self.amax[layer] = (x_TD.abs().amax().item(), down_amax.item())
        return out_TD.to(x_TD.dtype)


def _sequences(checkpoint: Path, text: Path, *, max_tokens: int) -> list[list[int]]:
    if not text.is_file():
        raise ValueError(f"{text}: no such text file")
    tokens = Tokenizer(checkpoint).encode(text.read_text(encoding="utf-8"))
    if not tokens:
        raise ValueError(f"{text}: has no tokens to calibrate on")
    starts = range(0, len(tokens), max_tokens)
    if len(starts) > MAX_SEQUENCES:
        logger.warning(
            "%s: only the first %d of %d tokens count", text, MAX_SEQUENCES * max_tokens, len(tokens)
        )
        starts = starts[:MAX_SEQUENCES]
    return [tokens[start : start + max_tokens] for start in starts]


def _forward(trunk: Trunk, sequences: Sequence[Sequence[int]], experts: _Recorder) -> None:
    """Run one step in which each sequence is a prompt in one block of the cache."""
    longest = len(sequences[0])
    tables = BlockTables(
        num_blocks=len(sequences), block_size=longest, max_requests=len(sequences), max_tokens=longest
    )
    chunks = []
    for sequence in sequences:
        row = tables.take_row()
        assert row is not None
        tables.reserve(row, len(sequence))
        chunks.append(Chunk(row=row, start=0, count=len(sequence)))
    device = trunk.device
    trunk.forward(
        torch.tensor([token for sequence in sequences for token in sequence], device=device),
        torch.cat([torch.arange(len(sequence)) for sequence in sequences]).to(device),
        keep_N=torch.tensor([0], device=device),
        attention=PagedAttention(
            _shared_cache(trunk, num_slots=len(sequences) * longest), block_size=longest
        ),
        plan=plan_attention(chunks, tables, shape=trunk.shape, dtype=trunk.dtype, device=device),
        experts=experts,
    )


def _shared_cache(trunk: Trunk, *, num_slots: int) -> KVCache:
    """Return a cache whose layers share memory: a whole prompt reads only what its own layer has just written."""
    cache = KVCache(
        replace(trunk.shape, num_layers=1), num_slots=num_slots, dtype=trunk.dtype, device=trunk.device
    )
    cache.k = cache.k.expand(trunk.shape.num_layers, -1, -1, -1)
    cache.v = cache.v.expand(trunk.shape.num_layers, -1, -1, -1)
    return cache
