"""Our Triton kernels in Triton's interpreter, which needs no GPU: all but the assembly that dequantises.

    TRITON_INTERPRET=1 python -m tests.support.triton_interpreted

Prints the largest error of each call as JSON. Triton reads the variable when it is imported, so this is a process of
its own. In float32, since the interpreter multiplies bfloat16 as if they were integers.
"""

import json
from collections.abc import Callable
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from experts.backends.pairs import PairsOnCpu
from experts.backends.triton import backend as backend_triton
from experts.backends.triton import kernels
from experts.backends.triton.pairs import PairsInKernel
from experts.placement import EMPTY
from experts.selftest import Layer, calls, dequantised, largest_error, random_experts, run
from router.cache import fp8
from router.cache.fp8 import E4M3
from router.cache.kv_cache import LayerCache
from router.kernels import linear, rows
from router.kernels.decode_attention import decode_attention
from router.kernels.prompt_attention import prompt_attention
from router.kernels.prompt_tiles import PromptTiles, cut_into_tiles, tokens_per_tile
from router.model import fuse_gpu
from router.model.fuse_cpu import rope_on_cpu
from router.model.trunk import Trunk
from router.model_config import FAMILIES
from tests.support.families import config_of

CPU = torch.device("cpu")
LAYERS = (
    Layer("squares of 64", 128, 256, num_slots=5, top_k=2, shards=2),
    Layer("squares of 32", 192, 64, num_slots=3, top_k=3, shards=1),
)
TOKENS = (1, 3, 40)


def main() -> None:
    in_python = mock.patch.object(kernels, "dequantize", dequantize)
    rounds = mock.patch.object(interpreter, "_convert_float", convert)
    with in_python, rounds, mock.patch.object(backend_triton, "why_not", return_value=None):
        print(
            json.dumps(
                errors_of_calls()
                | errors_of_queries_and_keys()
                | errors_of_attention()
                | errors_of_prompts()
                | errors_of_fp8()
                | errors_of_pairs()
                | errors_of_gates()
                | errors_of_sums()
                | errors_of_products()
                | errors_of_layers()
            )
        )


def errors_of_calls() -> dict[str, float]:
    errors = {}
    for layer in LAYERS:
        experts = random_experts(layer, CPU)
        backend = backend_triton.TritonBackend(layer.shape, layer.num_slots, torch.float32, CPU)
        for slot, expert in enumerate(experts):
            backend.write_slot(0, slot, expert)
        for num_tokens in TOKENS:
            for call in calls(layer, num_tokens, dtype=torch.float32, device=CPU):
                nobody = call._replace(name="nobody", local_TK=torch.full_like(call.local_TK, EMPTY))
                for each in (call, nobody):
                    error = largest_error(run(backend, each), dequantised(experts, each))
                    errors[f"{layer.name}, {num_tokens} tokens, {each.name}"] = error
    return errors


HEADS = ((4, 2, 32, 32), (6, 2, 48, 16), (5, 5, 16, 8))
"""The shapes of attention: query heads, KV heads, their width, features that rotate."""


def errors_of_queries_and_keys() -> dict[str, float]:
    """Return the errors of norms, alone and with the rotary embedding, beside torch's and the loops for a
    CPU."""
    errors = {}
    for heads, kv_heads, head_dim, rotated in HEADS:
        q_THD, k_TGD = torch.randn(9, heads, head_dim), torch.randn(9, kv_heads, head_dim)
        cos_TR, sin_TR = torch.rand(2, 9, rotated)
        q_norm_D, k_norm_D = torch.rand(2, head_dim)
        norm_q = F.rms_norm(q_THD, (head_dim,), q_norm_D, 1e-3).transpose(0, 1)[None]
        norm_k = F.rms_norm(k_TGD, (head_dim,), k_norm_D, 1e-3).transpose(0, 1)[None]
        found = rows.rms_norm(q_THD, q_norm_D, 1e-3)
        errors[f"norm, {heads} heads"] = distance(found, norm_q[0].transpose(0, 1))
        truth_q, truth_k = rope_on_cpu(norm_q, norm_k, cos_TR[None], sin_TR[None])
        q, k = rows.rotate_halves(q_THD, k_TGD, cos_TR, sin_TR, norms=(q_norm_D, k_norm_D, 1e-3))
        errors[f"queries, {heads} heads"] = distance(q, truth_q[0].transpose(0, 1))
        errors[f"keys, {heads} heads"] = distance(k, truth_k[0].transpose(0, 1))
    return errors


def empty_cache(num_slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> LayerCache:
    """Return a cache full of NaN, so that it shows if a slot is read that nobody wrote."""
    k_SGD, v_SGD = torch.full((2, num_slots, kv_heads, head_dim), float("nan")).to(dtype)
    scale_SG2 = torch.full((num_slots, kv_heads, 2), float("nan")) if dtype == E4M3 else None
    return LayerCache(k_SGD, v_SGD, scale_SG2)


ROWS_BY_KERNEL = 9


def write(cache: LayerCache, slot_T: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> tuple[Tensor, Tensor]:
    """Write keys and values to the cache and return what is then kept of them, as torch has it.

    The kernel writes the first rows, each by a program of its own, which takes the interpreter milliseconds; torch the others.
    """
    first = slice(ROWS_BY_KERNEL)
    rows.write_cache(k_TGD[first], v_TGD[first], slot_T[first], cache)
    rows.write_cache(k_TGD[:1], v_TGD[:1], torch.tensor([-1]), cache)  # nowhere
    rest, others_T = slice(ROWS_BY_KERNEL, None), slot_T[ROWS_BY_KERNEL:]
    if cache.scale_SG2 is None:
        cache.k_SGD[others_T], cache.v_SGD[others_T] = k_TGD[rest], v_TGD[rest]
        return k_TGD, v_TGD
    kept = []
    for n, (x_TGD, held_SGD) in enumerate(((k_TGD, cache.k_SGD), (v_TGD, cache.v_SGD))):
        code_TGD, scale_TG = fp8.quantize(x_TGD)
        held_SGD.view(torch.uint8)[others_T] = code_TGD[rest].view(torch.uint8)
        cache.scale_SG2[others_T, :, n] = scale_TG[rest]
        kept.append(fp8.dequantize(code_TGD, scale_TG, torch.float32))
    return kept[0], kept[1]


def errors_of_attention() -> dict[str, float]:
    """Return the errors of decoding's attention to contexts in a cache, beside torch's attention."""
    errors, lengths, block_size = {}, [1, 5, 70], 4
    for (heads, kv_heads, head_dim, _), dtype in product(HEADS, (torch.float32, E4M3)):
        table_BN = torch.randperm(len(lengths) * 40).reshape(len(lengths), 40)
        cache = empty_cache(table_BN.numel() * block_size, kv_heads, head_dim, dtype)
        q_BHD, out_BHD = torch.randn(2, heads, len(lengths), head_dim).transpose(1, 2)
        contexts = []
        for table_N, length in zip(table_BN, lengths, strict=True):
            slot_T = (table_N[:, None] * block_size + torch.arange(block_size)).flatten()[:length]
            contexts.append(write(cache, slot_T, *torch.randn(2, kv_heads, length, head_dim).transpose(1, 2)))
        decode_attention(q_BHD, cache, table_BN, torch.tensor(lengths), block_size, 0.3, out_BHD)
        for row, (k_TGD, v_TGD) in enumerate(contexts):
            truth_THD = causal(q_BHD[row : row + 1], k_TGD, v_TGD, start=lengths[row] - 1)
            name = f"attention, {dtype}, {heads} heads, {lengths[row]} tokens"
            errors[name] = distance(out_BHD[row], truth_THD[0])
    return errors


def errors_of_prompts() -> dict[str, float]:
    """Return the errors for chunks that begin their prompt, go on with it, or are one token of it, beside
    torch's attention."""
    errors, spans, block_size, first = {}, [(0, 75), (130, 40), (64, 1), (7, 2), (63, 65), (0, 1)], 4, 3
    counts = [count for _, count in spans]
    for (heads, kv_heads, head_dim, _), dtype in product((*HEADS, (7, 1, 80, 0)), (torch.float32, E4M3)):
        table_PN = torch.randperm(len(spans) * 50).reshape(len(spans), 50)
        cache = empty_cache(table_PN.numel() * block_size, kv_heads, head_dim, dtype)
        q_THD, out_THD = torch.randn(2, heads, first + sum(counts), head_dim).transpose(1, 2)
        contexts = []
        for table_N, (start, count) in zip(table_PN, spans, strict=True):
            slot_T = (table_N[:, None] * block_size + torch.arange(block_size)).flatten()[: start + count]
            contexts.append(
                write(cache, slot_T, *torch.randn(2, kv_heads, len(slot_T), head_dim).transpose(1, 2))
            )
        sized_for = (
            torch.float32 if dtype == torch.float32 else torch.bfloat16
        )  # so that tiles of either size run
        tokens = tokens_per_tile(heads // kv_heads, sized_for)
        tile_X4 = torch.from_numpy(cut_into_tiles(spans, first=first, tokens=tokens))
        before_THD = out_THD[:first].clone()
        prompt_attention(q_THD, cache, PromptTiles(tile_X4, table_PN, tokens), block_size, 0.3, out_THD)
        name = f"prompts, {dtype}, {heads} heads"
        errors[f"{name}, other rows"] = distance(out_THD[:first], before_THD)
        parts = zip(q_THD[first:].split(counts), out_THD[first:].split(counts), spans, contexts, strict=True)
        errors[name] = max(distance(out, causal(q, *kv, start=start)) for q, out, (start, _), kv in parts)
    return errors


def errors_of_fp8() -> dict[str, float]:
    """Return the errors for values that are far from one, and for those that are not finite."""
    errors = {}
    for size in (1e-20, 1e-3, 1.0, 1e6, float("nan"), float("inf"), 0.0):
        x_TGD = torch.randn(6, 3, 16) * (size if 0 < size < float("inf") else 1)
        if not 0 < size < float("inf"):
            x_TGD[2, 1, 5:] = size
        cache = empty_cache(8, 3, 16, E4M3)
        assert cache.scale_SG2 is not None
        rows.write_cache(x_TGD, -x_TGD, torch.arange(6), cache)
        for n, (found, truth) in enumerate(((cache.k_SGD, x_TGD), (cache.v_SGD, -x_TGD))):
            found = fp8.dequantize(found[:6], cache.scale_SG2[:6, :, n], torch.float32)
            truth = fp8.dequantize(*fp8.quantize(truth), torch.float32)
            finite_TG, truly_TG = (x.isfinite().all(-1) for x in (found, truth))
            name = f"FP8, {size} in {'kv'[n]}"
            errors[f"{name}, not finite"] = float((finite_TG != truly_TG).sum())
            errors[name] = distance(found[finite_TG], truth[finite_TG]) / max(
                1e-30, float(truth[finite_TG].abs().max())
            )
    return errors


def causal(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, *, start: int) -> Tensor:
    mask_TS = torch.arange(len(k_SGD)) <= start + torch.arange(len(q_THD))[:, None]
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_SGD, v_SGD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, scale=0.3, enable_gqa=True)[
        0
    ].transpose(0, 1)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def errors_of_pairs() -> dict[str, float]:
    """Return how many numbers differ from those of the loops for a CPU."""
    kernel, loops = PairsInKernel(4, 3, CPU), PairsOnCpu(4, 3, CPU)
    wrong = 0
    for num_tokens in (1, 2, 9):
        phys_TK = torch.randint(-1, 9, (num_tokens, 5), dtype=torch.int32)
        phys_TK[0, 0] = -(2**31)
        wrong += int((kernel.local(phys_TK) != loops.local(phys_TK)).sum())
        wrong += int((kernel.totals() != loops.totals()).sum())
    return {"pairs": wrong, "physical ids": error_of_physical_ids(LAYERS[0])}


def error_of_physical_ids(layer: Layer) -> float:
    """Return the largest error of a row, beside the same call by local slots; infinite if pairs are counted
    wrongly."""
    first_slot, experts = 4, random_experts(layer, CPU)
    backend = backend_triton.TritonBackend(layer.shape, layer.num_slots, torch.float32, CPU)
    for slot, expert in enumerate(experts):
        backend.write_slot(0, slot, expert)
    totals = backend.take_physical(first_slot)
    loops = PairsOnCpu(first_slot, layer.num_slots, CPU)
    error = 0.0
    for call in calls(layer, 9, dtype=torch.float32, device=CPU):
        phys_TK = torch.where(call.local_TK == EMPTY, EMPTY, call.local_TK + first_slot)
        phys_TK[0, 0], phys_TK[1, 0] = -(2**31), 2**31 - 1
        local = call._replace(local_TK=loops.local(phys_TK))
        found_TD = run(backend, call._replace(local_TK=phys_TK))
        error = max(error, largest_error(found_TD, dequantised(experts, local)))
    return error if torch.equal(totals(), loops.totals()) else float("inf")


def errors_of_gates() -> dict[str, float]:
    errors = {}
    for num_experts, top_k, divided in ((8, 2, True), (50, 7, False)):
        logits_TE = torch.randn(5, num_experts)
        w_TK, id_TK = rows.softmax_top_k(logits_TE, top_k, rounded_to=torch.float32, divided=divided)
        truth_TK, ids_TK = logits_TE.softmax(-1).topk(top_k)
        truth_TK /= truth_TK.sum(-1, keepdim=True) if divided else 1
        wrong_ids = float((id_TK != ids_TK).sum())
        errors[f"gate, {num_experts} experts"] = wrong_ids + float((w_TK - truth_TK).abs().max())
    logits_TE = torch.stack([torch.full((6,), bad) for bad in (torch.nan, -torch.inf)])
    w_TK, id_TK = rows.softmax_top_k(logits_TE, 3, rounded_to=torch.float32, divided=True)
    errors["gate, no finite logit"] = float((id_TK >= 6).sum() + w_TK.isfinite().sum())
    return errors


_CONVERT = interpreter._convert_float


def convert(values: Any, of: Any, to: Any, rounding: Any) -> Any:
    """Convert as the interpreter does, but FP8 as GPUs do: the interpreter would round towards zero, and know
    no NaN."""
    if tl.float8e4nv not in (of, to):
        return _CONVERT(values, of, to, rounding)
    kept = torch.from_numpy(values.copy())
    if to == tl.float8e4nv:
        return kept.to(E4M3).view(torch.uint8).numpy()
    return kept.view(E4M3).float().numpy()


def errors_of_sums() -> dict[str, float]:
    errors = {}
    for width in (48, 64):
        x, more, weight_D = torch.randn(3, width), torch.randn(3, width), torch.rand(width)
        sum_, normed = rows.add_rms_norm(x, more, weight_D, 1e-3)
        errors[f"sum, {width}"] = distance(sum_, x + more)
        errors[f"norm of a sum, {width}"] = distance(normed, F.rms_norm(x + more, (width,), weight_D, 1e-3))
    return errors


def errors_of_products() -> dict[str, float]:
    errors = {}
    for num_rows, num_outputs, num_inputs in ((1, 7, 2048 + 16), (3, 8, 48)):
        weight_NK, x_TK, bias_N = (
            torch.randn(num_outputs, num_inputs) / num_inputs**0.5,
            torch.randn(num_rows, num_inputs),
            torch.randn(num_outputs),
        )
        assert linear.is_ours(num_rows, weight_NK)
        for bias in (None, bias_N):
            found_TN = linear.linear(weight_NK, bias, x_TK)
            name = f"{num_rows} rows by {num_inputs} x {num_outputs}, {bias is not None}"
            errors[name] = distance(found_TN, F.linear(x_TK, weight_NK, bias))
    return errors


def errors_of_layers() -> dict[str, float]:
    """Return how many layers are not fused that may be, or are fused though they do more than add."""
    errors = {}
    for family in FAMILIES:
        for scale in (1.0, 1.5):
            model = Trunk.random(config_of(family), dtype=torch.float32, device=CPU)._model
            layers = model.model.layers
            with mock.patch.object(type(layers[0]), "forward", scaled(type(layers[0]).forward, scale)):
                fuse_gpu.fuse_layers(model)
            fused = sum("forward" in vars(layer) for layer in layers)
            errors[f"layers, {family}, times {scale}"] = float(fused != (len(layers) if scale == 1.0 else 0))
    return errors


def scaled(forward: Callable[..., torch.Tensor], scale: float) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: scale * forward(*args, **kwargs)


def dequantize(packed: Any, low_scale: Any, high_scale: Any) -> tuple[Any, Any]:
    """Dequantise as the kernels' own function says: values times scales, too small by 2^8."""
    num_rows, num_bytes = packed.shape
    even, odd = tl.split(tl.reshape(packed.to(tl.int32), (num_rows, num_bytes // 2, 2)))
    pairs = tl.reshape(even | odd << 8, (num_rows, num_bytes // 4, 2))
    low = tl.join(_value(pairs, 15, 8, 6), _value(pairs, 12, 5, 3))
    high = tl.join(_value(pairs, 9, 2, 0), _value(pairs, 14, 13, 10))
    low, high = (tl.reshape(tl.trans(codes, (0, 1, 3, 2)), packed.shape) for codes in (low, high))
    small = 2.0**-118, 2.0**-8  # one after the other: scales * 2^118 are near the largest float32
    return low * (low_scale.to(tl.float32) * small[0]) * small[1], high * (
        high_scale.to(tl.float32) * small[0]
    ) * small[1]


def _value(pairs: Any, sign: int, high: int, low: int) -> Any:
    """Return the values of codes whose sign is at one bit, whose largest bit of the magnitude is at `high`,
    and the others from `low` on."""
    half = (((pairs >> high) & 1) * 4 + ((pairs >> low) & 3)).to(tl.float32) / 2
    value = tl.where(half < 2.5, half, tl.where(half < 3, 3.0, 4 * half - 8))
    return tl.where((pairs >> sign) & 1 == 1, -value, value)


if __name__ == "__main__":
    main()
