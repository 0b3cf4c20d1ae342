"""Backend triton in Triton's interpreter, which needs no GPU: all but the assembly that dequantises.

    TRITON_INTERPRET=1 python -m tests.triton_interpreted

Prints the largest relative error of each call as JSON. Triton reads the variable when it is imported, so this is a process of
its own. In float32, since the interpreter multiplies bfloat16 as if they were integers.
"""

import json
from typing import Any
from unittest import mock

import torch
import triton.language as tl

from experts.backends import triton as backend_triton
from experts.backends import triton_kernels
from experts.placement import EMPTY
from experts.selftest import Layer, calls, dequantised, largest_error, random_experts, run

CPU = torch.device("cpu")
LAYERS = (
    Layer("squares of 64", 128, 256, num_slots=5, top_k=2, shards=2),
    Layer("squares of 32", 192, 64, num_slots=3, top_k=3, shards=1),
)
TOKENS = (1, 3, 40)


def main() -> None:
    in_python = mock.patch.object(triton_kernels, "dequantize", dequantize)
    with in_python, mock.patch.object(backend_triton, "complaint", return_value=None):
        print(json.dumps(errors_of_calls()))


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
