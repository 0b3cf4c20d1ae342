"""Our Triton kernels in Triton's interpreter, which needs no GPU: all but the assembly that dequantises.

    TRITON_INTERPRET=1 python -m tests.triton_interpreted

Prints the largest error of each call as JSON. Triton reads the variable when it is imported, so this is a process of
its own. In float32, since the interpreter multiplies bfloat16 as if they were integers.
"""

import json
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton.language as tl

from experts.backends import triton as backend_triton
from experts.backends import triton_kernels
from experts.local_pairs import PairsOnCpu
from experts.pairs_kernel import PairsInKernel
from experts.placement import EMPTY
from experts.selftest import Layer, calls, dequantised, largest_error, random_experts, run
from router import gpu_kernel
from router.fused import rope_on_cpu
from router.gpu_attention import decode_attention

CPU = torch.device("cpu")
LAYERS = (
    Layer("squares of 64", 128, 256, num_slots=5, top_k=2, shards=2),
    Layer("squares of 32", 192, 64, num_slots=3, top_k=3, shards=1),
)
TOKENS = (1, 3, 40)


def main() -> None:
    in_python = mock.patch.object(triton_kernels, "dequantize", dequantize)
    with in_python, mock.patch.object(backend_triton, "complaint", return_value=None):
        print(
            json.dumps(
                errors_of_calls()
                | errors_of_queries_and_keys()
                | errors_of_attention()
                | errors_of_pairs()
                | errors_of_gates()
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
"""Query heads, KV heads, their width, features that rotate."""


def errors_of_queries_and_keys() -> dict[str, float]:
    """Of norms, alone and with the rotary embedding, beside torch's and the loops for a CPU."""
    errors = {}
    for heads, kv_heads, head_dim, rotated in HEADS:
        q_THD, k_TGD = torch.randn(9, heads, head_dim), torch.randn(9, kv_heads, head_dim)
        cos_TR, sin_TR = torch.rand(2, 9, rotated)
        q_norm_D, k_norm_D = torch.rand(2, head_dim)
        norm_q = F.rms_norm(q_THD, (head_dim,), q_norm_D, 1e-3).transpose(0, 1)[None]
        norm_k = F.rms_norm(k_TGD, (head_dim,), k_norm_D, 1e-3).transpose(0, 1)[None]
        found = gpu_kernel.rms_norm(q_THD, q_norm_D, 1e-3)
        errors[f"norm, {heads} heads"] = distance(found, norm_q[0].transpose(0, 1))
        truth_q, truth_k = rope_on_cpu(norm_q, norm_k, cos_TR[None], sin_TR[None])
        q, k = gpu_kernel.rotate_halves(q_THD, k_TGD, cos_TR, sin_TR, norms=(q_norm_D, k_norm_D, 1e-3))
        errors[f"queries, {heads} heads"] = distance(q, truth_q[0].transpose(0, 1))
        errors[f"keys, {heads} heads"] = distance(k, truth_k[0].transpose(0, 1))
    return errors


def errors_of_attention() -> dict[str, float]:
    """Of contexts that are written to a cache, beside torch's attention. What nobody wrote is NaN."""
    errors, lengths, block_size = {}, [1, 5, 70], 4
    for heads, kv_heads, head_dim, _ in HEADS:
        table_BN = torch.randperm(len(lengths) * 40).reshape(len(lengths), 40)
        k_SGD, v_SGD = torch.full((2, table_BN.numel() * block_size, kv_heads, head_dim), float("nan"))
        q_BHD, out_BHD = torch.randn(2, heads, len(lengths), head_dim).transpose(1, 2)
        contexts = [torch.randn(2, kv_heads, length, head_dim).transpose(1, 2) for length in lengths]
        for table_N, (k_TGD, v_TGD) in zip(table_BN, contexts, strict=True):
            slot_T = (table_N[:, None] * block_size + torch.arange(block_size)).flatten()[: len(k_TGD)]
            gpu_kernel.write_cache(k_TGD, v_TGD, slot_T, k_SGD, v_SGD)
            gpu_kernel.write_cache(k_TGD[:1], v_TGD[:1], torch.tensor([-1]), k_SGD, v_SGD)  # nowhere
        context = (table_BN, torch.tensor(lengths), block_size)
        decode_attention(q_BHD, k_SGD, v_SGD, *context, 0.3, out_BHD)
        for row, (k_TGD, v_TGD) in enumerate(contexts):
            q, k, v = (x.transpose(0, 1)[None] for x in (q_BHD[row : row + 1], k_TGD, v_TGD))
            truth_1HTD = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
            errors[f"attention, {heads} heads, {lengths[row]} tokens"] = distance(
                out_BHD[row], truth_1HTD[0, :, 0]
            )
    return errors


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


def errors_of_pairs() -> dict[str, float]:
    """How many numbers differ from those of the loops for a CPU."""
    kernel, loops = PairsInKernel(4, 3, CPU), PairsOnCpu(4, 3, CPU)
    wrong = 0
    for num_tokens in (1, 2, 9):
        phys_TK = torch.randint(-1, 9, (num_tokens, 5), dtype=torch.int32)
        phys_TK[0, 0] = -(2**31)
        wrong += int((kernel.local(phys_TK) != loops.local(phys_TK)).sum())
        wrong += int((kernel.totals() != loops.totals()).sum())
    return {"pairs": wrong}


def errors_of_gates() -> dict[str, float]:
    errors = {}
    for num_experts, top_k, divided in ((8, 2, True), (50, 7, False)):
        logits_TE = torch.randn(5, num_experts)
        w_TK, id_TK = gpu_kernel.softmax_top_k(logits_TE, top_k, rounded_to=torch.float32, divided=divided)
        truth_TK, ids_TK = logits_TE.softmax(-1).topk(top_k)
        truth_TK /= truth_TK.sum(-1, keepdim=True) if divided else 1
        wrong_ids = float((id_TK != ids_TK).sum())
        errors[f"gate, {num_experts} experts"] = wrong_ids + float((w_TK - truth_TK).abs().max())
    return errors


def dequantize(packed: Any, low_scale: Any, high_scale: Any) -> tuple[Any, Any]:
    """As the kernels' own says: values times scales, too small by 2^8."""
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
    """Of codes whose sign is at one bit, whose largest bit of the magnitude at `high`, and the others from `low` on."""
    half = (((pairs >> high) & 1) * 4 + ((pairs >> low) & 3)).to(tl.float32) / 2
    value = tl.where(half < 2.5, half, tl.where(half < 3, 3.0, 4 * half - 8))
    return tl.where((pairs >> sign) & 1 == 1, -value, value)


if __name__ == "__main__":
    main()
