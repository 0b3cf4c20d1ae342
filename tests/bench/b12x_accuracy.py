"""A measure of what W4A4 costs, by the emulation of the kernels.

    python -m tests.bench.b12x_accuracy --bf16 DIR [--windows N] [--output FILE]

First, relative errors of random layers of real sizes, to float32 on the unquantised weights: BF16 weights and
activations, W4A16, which is the quantised weights alone, then FP4 activations with the checkpoint's own multipliers
(exact) and with vLLM's convention (baked). Then the perplexity of the demo model on held-out text: DIR is the
checkpoint it was made from, computed by transformers in float32; the others are our engine's in float32.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.backends import ExpertBackend, Scales
from experts.backends.b12x.emulated import B12xEmulatedBackend
from experts.backends.registry import BACKENDS
from experts.nvfp4 import dequantize, quantize, scale_2_of
from experts.weights import ExpertWeights, MoEShape
from router.config import RouterConfig
from router.request import Request, SamplingParams
from tests.bench import report
from tests.bench.perplexity import (
    load_dense,
    perplexity,
    score_by_transformers,
    windows_of,
)
from tests.support.in_process import in_process
from tests.support.places import DEMO_MODEL, HELDOUT

SHAPES = {"Qwen3-30B-A3B": (2048, 768), "MiniMax-M2": (3072, 1536), "GLM-4.6": (5120, 1536)}
STDS = (0.01, 0.02, 0.04)
TOKENS = 64
SCALES: tuple[Scales, ...] = ("exact", "baked")


def errors_of_layer(hidden: int, intermediate: int, std: float) -> dict[str, float]:
    """Return the errors of one expert with normal weights of this deviation and normal activations of
    deviation 1, calibrated on themselves."""
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(intermediate, hidden, generator=random) * std for _ in range(2))
    down = torch.randn(hidden, intermediate, generator=random) * std
    x_TD = torch.randn(TOKENS, hidden, generator=random).bfloat16().float()
    a_TI = F.silu(x_TD @ gate.T) * (x_TD @ up.T)
    truth_TD = a_TI @ down.T
    shared = scale_2_of(torch.maximum(gate.abs().max(), up.abs().max()))
    expert = ExpertWeights(
        quantize(gate, scale_2=shared),
        quantize(up, scale_2=shared),
        quantize(down),
        scale_2_of(x_TD.abs().max()),
        scale_2_of(a_TI.abs().max()),
    )
    gate_q, up_q, down_q = (dequantize(w, torch.float32) for w in (expert.gate, expert.up, expert.down))
    x_bf, gate_bf, up_bf, down_bf = (tensor.bfloat16() for tensor in (x_TD, gate, up, down))
    found = {"BF16": ((F.silu(x_bf @ gate_bf.T) * (x_bf @ up_bf.T)) @ down_bf.T).float()}
    found["W4A16"] = (F.silu(x_TD @ gate_q.T) * (x_TD @ up_q.T)) @ down_q.T
    shape = MoEShape(1, (0,), 1, hidden, intermediate)
    for scales in SCALES:
        backend = B12xEmulatedBackend(shape, 1, torch.float32, torch.device("cpu"), scales=scales)
        backend.write_slot(0, 0, expert)
        out_TD = torch.empty_like(x_TD)
        backend.forward(
            0, x_TD, torch.zeros(TOKENS, 1, dtype=torch.int32), torch.ones(TOKENS, 1), out_TD=out_TD
        )
        found[f"W4A4 {scales}"] = out_TD
    return {
        name: round(((y_TD - truth_TD).norm() / truth_TD.norm()).item(), 4) for name, y_TD in found.items()
    }


def score(backend: str, windows: list[list[int]]) -> Tensor:
    """Return log-probabilities by our engine in float32 with two shards, as float64 [windows, tokens]."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    requests = [Request(str(n), tuple(window), params) for n, window in enumerate(windows)]
    with in_process(
        DEMO_MODEL, num_shards=2, backend=backend, config=RouterConfig(max_queue=len(windows))
    ) as server:
        answers = server.run(requests, deadline_s=3600)
    scores = [[one.logprob for one in answers[request.id].prompt_logprobs] for request in requests]
    return torch.tensor(scores, dtype=torch.float64)


def _emulated(
    scales: Scales, shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device, _: object
) -> ExpertBackend:
    """A BackendFactory with a setting of its own."""
    return B12xEmulatedBackend(shape, num_slots, dtype, device, scales=scales)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens, evenly spread over the text")
    parser.add_argument("--output", metavar="FILE")
    parser.add_argument("--bf16", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name, sizes in SHAPES.items():
        for std in STDS:
            results.append({"layer": name, "std": std, **errors_of_layer(*sizes, std)})
            print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    windows = windows_of(DEMO_MODEL, HELDOUT)
    windows = windows[:: max(1, len(windows) // options.windows)]
    backends = {"W4A16": "torch"} | {f"W4A4 {scales}": f"b12x-emulated {scales}" for scales in SCALES}
    made = {f"b12x-emulated {scales}": partial(_emulated, scales) for scales in SCALES}
    rows = {"BF16": partial(score_by_transformers, load_dense(options.bf16), windows)}
    rows |= {name: partial(score, backend, windows) for name, backend in backends.items()}
    with patch.dict(BACKENDS, made):
        for name, scores in rows.items():
            results.append({"model": "demo", "weights": name, "perplexity": round(perplexity(scores()), 4)})
            print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    report.emit("b12x_accuracy", results, config={"windows": len(windows)}, output=options.output)


if __name__ == "__main__":
    main()
