"""Attention over a paged cache: ours, in bfloat16 and FP8, beside FlashInfer's and torch's, in one run.

    python -m tests.bench.attention [--output FILE]

Decoding: router.kernels.decode_attention beside BatchDecodeWithPagedKVCacheWrapper in its CUDA-graph mode, on its tensor cores. Floor: the
bytes of bfloat16 keys and values over the copy bandwidth measured here.

Prompts: one chunk of each request, whose keys and values are written to the cache first: PagedAttention beside
BatchPrefillWithPagedKVCacheWrapper, which is given a written cache, and beside torch's attention by whichever kernel it chooses,
chunk by chunk, of contexts that lie in one piece, which a paged cache would first have to copy. Floor: the products' FLOPs over
the rate of an 8192-cubed bfloat16 product.

One CUDA graph has a call for each of several layers; those of decoding have caches that together do not fit into the L2, and
blocks that lie in any order. Microseconds of a layer: the tenth percentile, the median and the ninetieth of the replays.

B requests, S context tokens, H query heads, G KV heads, D head dim, L layers.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flashinfer
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from router.cache.block_tables import BlockTables
from router.cache.fp8 import E4M3
from router.cache.kv_cache import KVCache
from router.kernels.decode_attention import decode_attention
from router.model.attention import Chunk, PagedAttention, plan_attention
from router.model_config import TrunkShape
from tests.bench.moe import GPU, Machine, measure_machine, spread_us, time_graph
from tests.bench.report import emit

HEAD_DIM = 128
BLOCK_SIZE = 16
HEADS = {"Qwen3-30B-A3B": (32, 4), "Qwen3-235B-A22B": (64, 4), "MiniMax-M2": (48, 8)}
CONTEXTS = (1024, 8192)
BATCHES = (1, 8, 64)
PROMPTS = (
    (1, 0, 2048),
    (1, 0, 8192),
    (1, 6144, 2048),
    (8, 0, 256),
    (8, 4096, 256),
    (1, 8000, 64),
)
"""The prompts' shapes: how many chunks, tokens before each, tokens of each."""

PROMPT_LAYERS = 4

L2_BYTES = 60e6
MAX_LAYERS = 48
WORKSPACE_BYTES = 256 << 20


class Paged(NamedTuple):
    """A paged cache [L, S, G, D] and the blocks of a batch's contexts. FlashInfer sees the same memory."""

    cache: KVCache
    tables: BlockTables
    shape: TrunkShape
    context: int

    @classmethod
    def of(
        cls, heads: tuple[int, int], *, rows: int, context: int, layers: int, dtype: torch.dtype
    ) -> "Paged":
        num_heads, kv_heads = heads
        shape = TrunkShape(layers, num_heads, kv_heads, HEAD_DIM, hidden=0, vocab_size=0, max_model_len=0)
        per_row = -(-context // BLOCK_SIZE)
        tables = BlockTables(
            num_blocks=rows * per_row, block_size=BLOCK_SIZE, max_requests=rows, max_tokens=context
        )
        tables.table_RN[:] = torch.randperm(rows * per_row).view(rows, -1).numpy()
        cache = KVCache(shape, num_slots=rows * per_row * BLOCK_SIZE, dtype=dtype, device=GPU)
        for kept in (cache.k, cache.v):
            kept.copy_(torch.randn(kept.shape[1:], device=GPU).expand_as(kept))
        if cache.scales is not None:
            cache.scales.fill_(1.0)
        return cls(cache, tables, shape, context)

    def as_pages(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = (cache[layer].unflatten(0, (-1, BLOCK_SIZE)) for cache in (self.cache.k, self.cache.v))
        return k, v

    def page_lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return FlashInfer's lists of every request's pages: where they begin in the list, the list, tokens
        on the last page."""
        rows, per_row = self.tables.table_RN.shape
        begin = torch.arange(rows + 1, dtype=torch.int32) * per_row
        pages = torch.from_numpy(self.tables.table_RN).int().flatten()
        last = self.context - (per_row - 1) * BLOCK_SIZE
        return begin.to(GPU), pages.to(GPU), torch.full((rows,), last, dtype=torch.int32, device=GPU)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    arguments = parser.parse_args()
    machine = measure_machine()
    results: list[dict[str, Any]] = []
    for model, heads in HEADS.items():
        for context in CONTEXTS:
            for rows in BATCHES:
                results.append({"model": model} | decoding(heads, rows, context, machine))
                print(results[-1], flush=True)
        for rows, before, count in PROMPTS:
            results.append({"model": model} | prompts(heads, rows, before, count, machine))
            print(results[-1], flush=True)
    config = {"head_dim": HEAD_DIM, "block_size": BLOCK_SIZE, "heads": HEADS, "machine": machine._asdict()}
    emit("attention", results, config=config, output=arguments.output)


def decoding(heads: tuple[int, int], rows: int, context: int, machine: Machine) -> dict[str, Any]:
    num_heads, kv_heads = heads
    bytes_a_layer = rows * context * kv_heads * HEAD_DIM * 2 * 2
    layers = min(MAX_LAYERS, max(4, math.ceil(5 * L2_BYTES / bytes_a_layer)))
    q_LBHD = torch.randn(layers, rows, num_heads, HEAD_DIM, device=GPU).to(torch.bfloat16)
    ours, theirs = torch.empty_like(q_LBHD), torch.empty_like(q_LBHD)
    in_fp8, paged = (
        Paged.of(heads, rows=rows, context=context, layers=layers, dtype=dtype)
        for dtype in (E4M3, torch.bfloat16)
    )
    times = {
        "ours_fp8": time_graph(_our_decoding(in_fp8, q_LBHD, ours)),
        "ours": time_graph(_our_decoding(paged, q_LBHD, ours)),
        "flashinfer": time_graph(_their_decoding(paged, q_LBHD, theirs)),
    }
    return {
        "context": context,
        "batch": rows,
        "layers": layers,
        "floor_us": round(bytes_a_layer / machine.bandwidth * 1e6, 1),
        "difference": relative(ours, theirs),
        **{name: spread_us([each / layers for each in of]) for name, of in times.items()},
    }


def _our_decoding(paged: Paged, q_LBHD: Tensor, out_LBHD: Tensor) -> Callable[[], None]:
    chunks = [Chunk(row, paged.context - 1, 1) for row in range(q_LBHD.shape[1])]
    plan = plan_attention(chunks, paged.tables, shape=paged.shape, dtype=torch.bfloat16, device=GPU)

    def all_layers() -> None:
        for layer, (q_BHD, out_BHD) in enumerate(zip(q_LBHD, out_LBHD, strict=True)):
            context = (plan.table_BN, plan.length_B, BLOCK_SIZE)
            decode_attention(q_BHD, paged.cache.layer(layer), *context, HEAD_DIM**-0.5, out_BHD)

    return all_layers


def _their_decoding(paged: Paged, q_LBHD: Tensor, out_LBHD: Tensor) -> Callable[[], None]:
    begin, pages, last = paged.page_lists()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=GPU),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=begin.clone(),
        paged_kv_indices_buffer=pages.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )
    sizes = (paged.shape.num_heads, paged.shape.num_kv_heads, HEAD_DIM, BLOCK_SIZE)
    wrapper.plan(begin, pages, last, *sizes, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)

    def all_layers() -> None:
        for layer, (q_BHD, out_BHD) in enumerate(zip(q_LBHD, out_LBHD, strict=True)):
            wrapper.run(q_BHD, paged.as_pages(layer), out=out_BHD)

    return all_layers


def prompts(heads: tuple[int, int], rows: int, before: int, count: int, machine: Machine) -> dict[str, Any]:
    num_heads, kv_heads = heads
    q_HTD, k_GTD, v_GTD = (
        torch.randn(rows * count, of, HEAD_DIM, device=GPU).to(torch.bfloat16).transpose(0, 1)
        for of in (num_heads, kv_heads, kv_heads)
    )
    in_fp8, paged = (
        Paged.of(heads, rows=rows, context=before + count, layers=PROMPT_LAYERS, dtype=dtype)
        for dtype in (E4M3, torch.bfloat16)
    )
    ways = {
        "ours_fp8": _our_prompts(in_fp8, before, q_HTD, k_GTD, v_GTD),
        "ours": _our_prompts(paged, before, q_HTD, k_GTD, v_GTD),
        "flashinfer": _their_prompts(paged, count, q_HTD),
        "torch": _torch_prompts(heads, rows, before, count),
    }
    ours, theirs = (ways[name](0) for name in ("ours", "flashinfer"))  # ours first: it writes what both read
    times = {
        name: time_graph(lambda way=way: [way(n) for n in range(PROMPT_LAYERS)]) for name, way in ways.items()
    }
    seen = rows * (count * before + count * (count + 1) / 2)
    return {
        "chunks": rows,
        "context": before + count,
        "chunk": count,
        "floor_us": round(4 * seen * num_heads * HEAD_DIM / machine.flops * 1e6, 1),
        "difference": relative(ours, theirs),
        **{name: spread_us([each / PROMPT_LAYERS for each in of]) for name, of in times.items()},
    }


def _our_prompts(
    paged: Paged, before: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor
) -> Callable[[int], Tensor]:
    chunks = [Chunk(row, before, paged.context - before) for row in range(len(paged.tables.table_RN))]
    attention = PagedAttention(paged.cache, block_size=BLOCK_SIZE)
    attention.plan = plan_attention(chunks, paged.tables, shape=paged.shape, dtype=torch.bfloat16, device=GPU)
    return lambda layer: attention.forward(layer, q_HTD, k_GTD, v_GTD, scale=HEAD_DIM**-0.5)


def _their_prompts(paged: Paged, count: int, q_HTD: Tensor) -> Callable[[int], Tensor]:
    begin, pages, last = paged.page_lists()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=GPU), "NHD"
    )
    wrapper.plan(
        torch.arange(len(last) + 1, dtype=torch.int32, device=GPU) * count,
        *(begin, pages, last, paged.shape.num_heads, paged.shape.num_kv_heads, HEAD_DIM, BLOCK_SIZE),
        causal=True,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    q_THD = q_HTD.transpose(0, 1).contiguous()
    return lambda layer: wrapper.run(q_THD, paged.as_pages(layer))


def _torch_prompts(heads: tuple[int, int], rows: int, before: int, count: int) -> Callable[[int], Tensor]:
    num_heads, kv_heads = heads
    q, k, v = (
        torch.randn(PROMPT_LAYERS, rows, of, tokens, HEAD_DIM, device=GPU).to(torch.bfloat16)
        for of, tokens in ((num_heads, count), (kv_heads, before + count), (kv_heads, before + count))
    )
    causal: dict[str, Any] = (
        {"attn_mask": causal_lower_right(count, before + count)} if before else {"is_causal": True}
    )

    def layer_of(layer: int) -> Tensor:
        one_by_one = zip(*(x[layer].split(1) for x in (q, k, v)), strict=True)
        outs = [
            F.scaled_dot_product_attention(q1, k1, v1, enable_gqa=True, **causal) for q1, k1, v1 in one_by_one
        ]
        return outs[-1]

    return layer_of


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the norm."""
    return round(float((found.float() - expected.float()).norm() / expected.float().norm()), 5)


if __name__ == "__main__":
    main()
