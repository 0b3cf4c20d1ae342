"""Attention over a paged cache: ours beside FlashInfer's, in one run.

    python -m tests.bench.attention [--output FILE]

Decoding: router.gpu_attention beside BatchDecodeWithPagedKVCacheWrapper in its CUDA-graph mode, on its tensor cores. One graph
has a call for each of several layers, whose caches together do not fit into the L2; blocks lie in any order. Floor: the bytes of
keys and values over the copy bandwidth measured here. Microseconds of a layer: the median of the replays, with the tenth and the
ninetieth percentile.

Prompts: a chunk of one request, whose keys and values are written to the cache first: PagedAttention (torch's attention, on a copy
of the context where the chunk does not begin it) beside BatchPrefillWithPagedKVCacheWrapper. Call by call. Floor: the products' FLOPs
over the rate of an 8192-cubed bfloat16 product.

B requests, S context tokens, H query heads, G KV heads, D head dim, L layers.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flashinfer
import torch
from torch import Tensor

from router.attention import AttentionPlan, Chunk, PagedAttention, plan_attention
from router.gpu_attention import decode_attention
from router.kv_cache import BlockTables, KVCache
from router.model_config import TrunkShape
from tests.bench.moe import GPU, Machine, measure_machine, spread_us, time_calls, time_graph
from tests.bench.report import emit

HEAD_DIM = 128
BLOCK_SIZE = 16
HEADS = {"Qwen3-30B-A3B": (32, 4), "Qwen3-235B-A22B": (64, 4), "MiniMax-M2": (48, 8)}
CONTEXTS = (1024, 8192)
BATCHES = (1, 8, 64)
CHUNKS = ((0, 2048), (0, 8192), (6144, 2048))
"""Of prompts: tokens before, and in, the chunk."""

L2_BYTES = 60e6
MAX_LAYERS = 48
WORKSPACE_BYTES = 256 << 20


class Paged(NamedTuple):
    """Caches [L, S, G, D] and the blocks of a batch's contexts. FlashInfer sees the same memory."""

    cache: KVCache
    tables: BlockTables
    context: int

    @classmethod
    def of(cls, *, kv_heads: int, rows: int, context: int) -> "Paged":
        bytes_a_layer = rows * context * kv_heads * HEAD_DIM * 2 * 2
        layers = min(MAX_LAYERS, max(4, math.ceil(5 * L2_BYTES / bytes_a_layer)))
        shape = TrunkShape(layers, kv_heads, HEAD_DIM, hidden=0, vocab_size=0, max_model_len=0)
        blocks = rows * context // BLOCK_SIZE
        tables = BlockTables(num_blocks=blocks, block_size=BLOCK_SIZE, max_requests=rows, max_tokens=context)
        tables.table_RN[:] = torch.randperm(blocks).view(rows, -1).numpy()
        cache = KVCache(shape, num_slots=blocks * BLOCK_SIZE, dtype=torch.bfloat16, device=GPU)
        cache.k.normal_()
        cache.v.normal_()
        return cls(cache, tables, context)

    @property
    def num_layers(self) -> int:
        return len(self.cache.k)

    def as_pages(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = (cache[layer].unflatten(0, (-1, BLOCK_SIZE)) for cache in (self.cache.k, self.cache.v))
        return k, v

    def page_lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every request: where its pages begin in the list, the list, tokens on its last page."""
        rows, per_row = self.tables.table_RN.shape
        begin = torch.arange(rows + 1, dtype=torch.int32) * per_row
        pages = torch.from_numpy(self.tables.table_RN).int().flatten()
        return begin.to(GPU), pages.to(GPU), torch.full((rows,), BLOCK_SIZE, dtype=torch.int32, device=GPU)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    arguments = parser.parse_args()
    machine = measure_machine()
    results: list[dict[str, Any]] = []
    for model, (heads, kv_heads) in HEADS.items():
        for context in CONTEXTS:
            for rows in BATCHES:
                paged = Paged.of(kv_heads=kv_heads, rows=rows, context=context)
                results.append({"model": model} | decoding(paged, heads, rows, machine))
                print(results[-1], flush=True)
                del paged
        for before, count in CHUNKS:
            paged = Paged.of(kv_heads=kv_heads, rows=1, context=before + count)
            results.append({"model": model} | prompt(paged, heads, before, count, machine))
            print(results[-1], flush=True)
            del paged
    config = {"head_dim": HEAD_DIM, "block_size": BLOCK_SIZE, "heads": HEADS, "machine": machine._asdict()}
    emit("attention", results, config=config, output=arguments.output)


def decoding(paged: Paged, heads: int, rows: int, machine: Machine) -> dict[str, Any]:
    kv_heads, scale = paged.cache.k.shape[2], HEAD_DIM**-0.5
    q_LBHD = torch.randn(paged.num_layers, rows, heads, HEAD_DIM, device=GPU).to(torch.bfloat16)
    chunks = [Chunk(row, paged.context - 1, 1) for row in range(rows)]
    plan = plan_attention(chunks, paged.tables, dtype=torch.bfloat16, device=GPU)
    our_LBHD, their_LBHD = torch.empty_like(q_LBHD), torch.empty_like(q_LBHD)

    def ours() -> None:
        for layer, (q_BHD, out_BHD) in enumerate(zip(q_LBHD, our_LBHD, strict=True)):
            k_SGD, v_SGD = paged.cache.k[layer], paged.cache.v[layer]
            lists = (plan.table_BN, plan.length_B, BLOCK_SIZE)
            decode_attention(q_BHD, k_SGD, v_SGD, *lists, scale, out_BHD)

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
    sizes = (heads, kv_heads, HEAD_DIM, BLOCK_SIZE)
    wrapper.plan(begin, pages, last, *sizes, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)

    def theirs() -> None:
        for layer, (q_BHD, out_BHD) in enumerate(zip(q_LBHD, their_LBHD, strict=True)):
            wrapper.run(q_BHD, paged.as_pages(layer), out=out_BHD)

    times = {"ours": time_graph(ours), "flashinfer": time_graph(theirs)}
    floor_s = rows * paged.context * kv_heads * HEAD_DIM * 2 * 2 / machine.bandwidth
    return {
        "context": paged.context,
        "batch": rows,
        "layers": paged.num_layers,
        "floor_us": round(floor_s * 1e6, 1),
        "difference": relative(our_LBHD, their_LBHD),
        **{name: spread_us([each / paged.num_layers for each in of]) for name, of in times.items()},
    }


def prompt(paged: Paged, heads: int, before: int, count: int, machine: Machine) -> dict[str, Any]:
    kv_heads, scale = paged.cache.k.shape[2], HEAD_DIM**-0.5
    q_HTD, k_GTD, v_GTD = (
        torch.randn(count, of, HEAD_DIM, device=GPU).to(torch.bfloat16).transpose(0, 1)
        for of in (heads, kv_heads, kv_heads)
    )
    attention = PagedAttention(paged.cache, block_size=BLOCK_SIZE)
    chunk = Chunk(0, before, count)
    plan: AttentionPlan = plan_attention([chunk], paged.tables, dtype=torch.bfloat16, device=GPU)
    attention.plan = plan
    begin, pages, last = paged.page_lists()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=GPU), "NHD"
    )
    wrapper.plan(
        torch.tensor([0, count], dtype=torch.int32, device=GPU),
        *(begin, pages, last, heads, kv_heads, HEAD_DIM, BLOCK_SIZE),
        causal=True,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    q_THD = q_HTD.transpose(0, 1).contiguous()
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: attention.forward(0, q_HTD, k_GTD, v_GTD, scale=scale),
        "flashinfer": lambda: wrapper.run(q_THD, paged.as_pages(0)),
    }
    outputs = [way() for way in ways.values()]  # ours first: it writes what both then read
    seen = count * before + count * (count + 1) / 2
    return {
        "context": before + count,
        "chunk": count,
        "floor_us": round(4 * seen * heads * HEAD_DIM / machine.flops * 1e6, 1),
        "difference": relative(*outputs),
        **{name: spread_us(time_calls(way)) for name, way in ways.items()},
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """Of the norms."""
    return round(float((found.float() - expected.float()).norm() / expected.float().norm()), 5)


if __name__ == "__main__":
    main()
