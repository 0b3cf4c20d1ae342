"""PagedAttention: attention of a step that mixes prompts and decoding, hooked into transformers' modelling code.

A step's rows are packed: first one row for each decoding request, then the chunks of prompts.
T rows, B decoding requests, P chunks of prompts, X tiles, N blocks of a table, S context tokens, H query heads, G KV heads,
D head dim.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from router.cache.block_tables import BlockTables
from router.cache.fp8 import dequantize, quantize
from router.cache.kv_cache import KVCache, LayerCache
from router.kernels import cpu_loops, cpu_loops_run, our_kernels_run
from router.kernels.prompt_tiles import PromptTiles, cut_into_tiles, tokens_per_tile
from router.model_config import TrunkShape


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one request in a step: positions [start, start + count) of row `row` of the block tables."""

    row: int
    start: int
    count: int


@dataclass(frozen=True, eq=False)
class PromptSpan:
    """One chunk of a prompt: rows [first, last) of the step, whose context is in the blocks table_N.

    mask_TS: bool, true where a row may attend to a token of the context; None where the chunk starts its prompt, so that
    attention is plainly causal.
    """

    first: int
    last: int
    table_N: Tensor
    mask_TS: Tensor | None


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The metadata of one step's attention, computed once for all layers.

    slots_T: int64, the cache slot of each row's key and value. table_BN, length_B: int64, blocks and lengths of the
    contexts of the decoding rows, padded to the longest. mask_B11S: additive, 0 or -inf; None where a kernel of ours reads
    the cache in place. prompts: tiles on a GPU where kernels of ours run, else spans; empty if there are none.
    """

    slots_T: Tensor
    table_BN: Tensor
    length_B: Tensor
    mask_B11S: Tensor | None
    prompts: tuple[PromptSpan, ...] | PromptTiles

    @property
    def num_decoding(self) -> int:
        """The number of decoding rows, which come first."""
        return self.table_BN.shape[0]


def plan_attention(
    chunks: Sequence[Chunk],
    tables: BlockTables,
    *,
    shape: TrunkShape,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPlan:
    """Return the AttentionPlan of a step of these chunks.

    chunks: in row order; those of one token that ends their request's context come first, as decoding rows. dtype: that
    of the trunk.
    """
    num_decoding = next((i for i, chunk in enumerate(chunks) if chunk.count > 1), len(chunks))
    decoding, prompts = chunks[:num_decoding], chunks[num_decoding:]
    block_size = tables.block_size

    length_B = np.array([chunk.start + 1 for chunk in decoding], np.int64)
    num_blocks = -(-int(length_B.max()) // block_size) if decoding else 0
    table_BN = tables.table_RN[[chunk.row for chunk in decoding], :num_blocks]
    mask_B11S = None
    if not our_kernels_run(dtype, device):
        # Beyond its end a context repeats its own first block: another request's may hold NaN, which no mask hides.
        held_BN = np.arange(num_blocks) * block_size < length_B[:, None]
        table_BN = np.where(held_BN, table_BN, table_BN[:, :1])
        hidden_BS = torch.from_numpy(np.arange(num_blocks * block_size) >= length_B[:, None])
        mask_BS = torch.zeros(hidden_BS.shape, dtype=dtype).masked_fill_(hidden_BS, float("-inf"))
        mask_B11S = mask_BS[:, None, None, :].to(device)

    last_B = length_B - 1
    decode_slots_B = (
        table_BN[np.arange(num_decoding), last_B // block_size] * block_size + last_B % block_size
    )
    slots = [tables.slots(chunk.row, chunk.start, chunk.start + chunk.count) for chunk in prompts]
    return AttentionPlan(
        slots_T=torch.from_numpy(np.concatenate([decode_slots_B, *slots])).to(device),
        table_BN=torch.from_numpy(table_BN).to(device),
        length_B=torch.from_numpy(length_B).to(device),
        mask_B11S=mask_B11S,
        prompts=_prompts(prompts, tables, shape, first=num_decoding, dtype=dtype, device=device),
    )


def _prompts(
    chunks: Sequence[Chunk],
    tables: BlockTables,
    shape: TrunkShape,
    *,
    first: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[PromptSpan, ...] | PromptTiles:
    if not chunks or not (device.type == "cuda" and our_kernels_run(dtype, device)):
        return _spans(chunks, tables, first=first, device=device)
    tokens = tokens_per_tile(shape.num_heads // shape.num_kv_heads, dtype)
    num_blocks = -(-max(chunk.start + chunk.count for chunk in chunks) // tables.block_size)
    table_PN = tables.table_RN[[chunk.row for chunk in chunks], :num_blocks]
    tile_X4 = cut_into_tiles([(chunk.start, chunk.count) for chunk in chunks], first=first, tokens=tokens)
    return PromptTiles(torch.from_numpy(tile_X4).to(device), torch.from_numpy(table_PN).to(device), tokens)


def _spans(
    chunks: Sequence[Chunk], tables: BlockTables, *, first: int, device: torch.device
) -> tuple[PromptSpan, ...]:
    spans = []
    for chunk in chunks:
        end = chunk.start + chunk.count
        num_blocks = -(-end // tables.block_size)
        mask_TS = None
        if chunk.start:
            position_T = torch.arange(chunk.start, end)
            mask_TS = (torch.arange(num_blocks * tables.block_size) <= position_T[:, None]).to(device)
        table_N = torch.from_numpy(tables.table_RN[chunk.row, :num_blocks].copy()).to(device)
        spans.append(PromptSpan(first=first, last=first + chunk.count, table_N=table_N, mask_TS=mask_TS))
        first += chunk.count
    return tuple(spans)


class PagedAttention:
    """Writes a step's keys and values into the cache and attends to the cached contexts. One per trunk.

    plan: the step's, set before its first layer.
    """

    def __init__(self, cache: KVCache, *, block_size: int) -> None:
        self._layers = [cache.layer(layer) for layer in range(len(cache.k))]  # views, made once
        self._block_size = block_size
        self.plan: AttentionPlan | None = None

    def forward(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, *, scale: float) -> Tensor:
        """Return the output [T, H, D] of every row of the plan; heads in q's order, those of one KV head together."""
        plan, cache = self.plan, self._layers[layer]
        assert plan is not None
        _write(plan.slots_T, k_GTD.transpose(0, 1), v_GTD.transpose(0, 1), cache)
        if q_HTD.is_cuda and plan.mask_B11S is None:
            return self._attend_on_gpu(plan, cache, q_HTD.transpose(0, 1), scale=scale)

        outputs = []
        if plan.num_decoding:
            outputs.append(self._decode(plan, cache, q_HTD[:, : plan.num_decoding], scale=scale))
        assert not isinstance(plan.prompts, PromptTiles)
        for span in plan.prompts:
            rows = slice(span.first, span.last)
            if span.mask_TS is None and cache.scale_SG2 is None:  # the whole context is in this step
                k, v = k_GTD[:, rows], v_GTD[:, rows]
            else:
                end = span.last - span.first if span.mask_TS is None else None
                k, v = (
                    context[0, :end].transpose(0, 1)
                    for context in self._gather(cache, span.table_N[None], dtype=q_HTD.dtype)
                )
            out_1HTD = F.scaled_dot_product_attention(
                q_HTD[None, :, rows],
                k[None],
                v[None],
                attn_mask=span.mask_TS,
                is_causal=span.mask_TS is None,
                scale=scale,
                enable_gqa=True,
            )
            outputs.append(out_1HTD[0].transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_on_gpu(
        self, plan: AttentionPlan, cache: LayerCache, q_THD: Tensor, *, scale: float
    ) -> Tensor:
        """Return the output [T, H, D] by kernels of ours, without a copy of the contexts."""
        from router.kernels.decode_attention import decode_attention
        from router.kernels.prompt_attention import prompt_attention

        out_THD = q_THD.new_empty(q_THD.shape)
        if n := plan.num_decoding:
            context = (plan.table_BN, plan.length_B, self._block_size)
            decode_attention(q_THD[:n], cache, *context, scale, out_THD[:n])
        if isinstance(plan.prompts, PromptTiles):
            prompt_attention(q_THD, cache, plan.prompts, self._block_size, scale, out_THD)
        return out_THD

    def _decode(self, plan: AttentionPlan, cache: LayerCache, q_HBD: Tensor, *, scale: float) -> Tensor:
        """Return the decoding rows' output [B, H, D]. Queries that share a KV head are rows of one product: no head is repeated."""
        if plan.mask_B11S is None:
            return self._decode_in_place(plan, cache, q_HBD, scale=scale)
        num_kv_heads, head_dim = cache.k_SGD.shape[1:]
        q_BGQD = q_HBD.transpose(0, 1).reshape(plan.num_decoding, num_kv_heads, -1, head_dim)
        k_BGSD, v_BGSD = (x.transpose(1, 2) for x in self._gather(cache, plan.table_BN, dtype=q_HBD.dtype))
        out_BGQD = F.scaled_dot_product_attention(
            q_BGQD, k_BGSD, v_BGSD, attn_mask=plan.mask_B11S, scale=scale
        )
        return out_BGQD.flatten(1, 2)

    def _decode_in_place(
        self, plan: AttentionPlan, cache: LayerCache, q_HBD: Tensor, *, scale: float
    ) -> Tensor:
        """Return the decoding rows' output [B, H, D] by loops on a CPU, which copy contexts only if they are FP8."""
        k_SGD, v_SGD, table_BN = cache.k_SGD, cache.v_SGD, plan.table_BN
        if cache.scale_SG2 is not None:
            k_SGD, v_SGD = (x.flatten(0, 1) for x in self._gather(cache, table_BN, dtype=q_HBD.dtype))
            table_BN = torch.arange(table_BN.numel()).view(table_BN.shape)
        q_BHD = q_HBD.transpose(0, 1).contiguous()
        out_BHD = torch.empty_like(q_BHD)
        cpu_loops.decode_attention(
            q_BHD.numpy(),
            k_SGD.numpy(),
            v_SGD.numpy(),
            table_BN.numpy(),
            plan.length_B.numpy(),
            self._block_size,
            scale,
            out_BHD.numpy(),
        )
        return out_BHD

    def _gather(self, cache: LayerCache, table_BN: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return copies of the contexts' keys and values, [B, N * block_size, G, D].

        Whole blocks are copied, which is twelve times as quick as token by token on a CPU.
        """

        def gather(x_SGD: Tensor) -> Tensor:
            blocks = x_SGD.view(-1, self._block_size, *x_SGD.shape[1:])
            return blocks.index_select(0, table_BN.flatten()).view(len(table_BN), -1, *x_SGD.shape[1:])

        k_BSGD, v_BSGD = gather(cache.k_SGD), gather(cache.v_SGD)
        if cache.scale_SG2 is None:
            return k_BSGD, v_BSGD
        k_scale_BSG, v_scale_BSG = gather(cache.scale_SG2).unbind(-1)
        return dequantize(k_BSGD, k_scale_BSG, dtype), dequantize(v_BSGD, v_scale_BSG, dtype)


def _write(slots_T: Tensor, k_TGD: Tensor, v_TGD: Tensor, cache: LayerCache) -> None:
    """Write the step's keys and values into the cache."""
    k_SGD, v_SGD, scale_SG2 = cache
    if k_TGD.is_cuda and our_kernels_run(k_TGD.dtype, k_TGD.device):
        from router.kernels import rows

        rows.write_cache(k_TGD, v_TGD, slots_T, cache)
    elif scale_SG2 is not None:
        (k_SGD[slots_T], k_scale_TG), (v_SGD[slots_T], v_scale_TG) = quantize(k_TGD), quantize(v_TGD)
        scale_SG2[slots_T] = torch.stack([k_scale_TG, v_scale_TG], dim=-1)
    elif cpu_loops_run(k_SGD.dtype, k_SGD.device):
        new = (k_TGD.contiguous(), v_TGD.contiguous(), slots_T)
        cpu_loops.write_cache(*(tensor.numpy() for tensor in (*new, k_SGD, v_SGD)))
    else:
        k_SGD[slots_T] = k_TGD
        v_SGD[slots_T] = v_TGD


_current = threading.local()


def set_attention(attention: PagedAttention) -> None:
    """Let the modelling code of this thread attend with `attention` from now on."""
    _current.attention = attention


def current_attention() -> PagedAttention:
    """Return what the modelling code of this thread attends with."""
    return _current.attention


def _paged(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Any,  # the interface's: dropout, sliding_window, ... the trunk refuses models that need them
) -> tuple[Tensor, None]:
    """Implement transformers' attention interface: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    out_THD = _current.attention.forward(module.layer_idx, query[0], key[0], value[0], scale=scaling)
    return out_THD[None], None


ATTENTION = "sparkmoe"
AttentionInterface.register(ATTENTION, _paged)  # and no mask by this name: transformers then makes none
