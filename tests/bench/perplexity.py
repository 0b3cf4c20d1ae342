"""Perplexity on held-out text: python -m tests.bench.perplexity [--bf16 DIR] [--output FILE]

The text is cut into windows of 512 tokens. Each is scored alone, so its first token is context only; a shorter rest is
left out. Perplexity is exp of the mean of -log p over all scored tokens of all windows, natural logarithm.

Our engine scores the windows as requests that share its batches, over two expert shards; transformers' own model,
with the same NVFP4 weights dequantised, scores them beside it in float32. The two float32 numbers must agree within
0.1 %. --bf16 also scores the checkpoint that the NVFP4 one was made from: the gap is the price of quantising.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from experts.checkpoint.tensor_files import TensorFiles
from router.config import KVCacheConfig, RouterConfig
from router.model.trunk import Trunk
from router.request import Request, SamplingParams
from router.text.tokenizer import Tokenizer
from tests.bench import report
from tests.support.in_process import CPU, in_process
from tests.support.oracle import Oracle, load_model
from tests.support.places import DEMO_MODEL, HELDOUT

WINDOW = 512
NUM_SHARDS = 2
AGREEMENT = 1e-3
"""The largest relative difference between our perplexity in float32 and transformers'."""

FP8 = KVCacheConfig(dtype="fp8_e4m3")


def windows_of(path: Path, text: Path) -> list[list[int]]:
    tokens = Tokenizer(path).encode(text.read_text(encoding="utf-8"))
    return [tokens[start : start + WINDOW] for start in range(0, len(tokens) - WINDOW + 1, WINDOW)]


def score_by_engine(
    path: Path,
    windows: Sequence[Sequence[int]],
    dtype: torch.dtype,
    *,
    kv_cache: KVCacheConfig | None = None,
) -> Tensor:
    """Return the log-probability of every token but the first, float64 [windows, WINDOW - 1].

    dtype: of trunk and wire.
    """
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    requests = [Request(str(n), tuple(window), params) for n, window in enumerate(windows)]
    config = RouterConfig(max_queue=len(windows), kv_cache=kv_cache or KVCacheConfig())
    with in_process(path, num_shards=NUM_SHARDS, dtype=dtype, config=config) as server:
        answers = server.run(requests, deadline_s=3600)
    scores = [[one.logprob for one in answers[request.id].prompt_logprobs] for request in requests]
    return torch.tensor(scores, dtype=torch.float64)


@torch.inference_mode()
def score_by_transformers(model: Any, windows: Iterable[Sequence[int]]) -> Tensor:
    """Return what score_by_engine does, by transformers, one window at a time."""
    scores = []
    for window in windows:
        token_1T = torch.tensor([window])
        logprob_TV = model(token_1T, use_cache=False).logits[0, :-1].log_softmax(dim=-1)
        scores.append(logprob_TV.gather(1, token_1T[0, 1:, None])[:, 0].double())
    return torch.stack(scores)


def logits_of_engine(
    path: Path,
    windows: Iterable[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device = CPU,
    *,
    kv_cache: KVCacheConfig | None = None,
) -> Iterator[Tensor]:
    """Yield the logits [WINDOW, V] of each window. dtype: of trunk, wire and experts."""
    kept: list[Tensor] = []
    forward = Trunk.forward

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        kept.append(forward(*args, **kwargs))
        return kept[-1]

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    config = RouterConfig(kv_cache=kv_cache or KVCacheConfig())
    with (
        patch.object(Trunk, "forward", keep),
        in_process(path, num_shards=NUM_SHARDS, dtype=dtype, device=device, config=config) as server,
    ):
        for n, window in enumerate(windows):
            server.run([Request(str(n), tuple(window), params)])
            yield kept.pop()


def closeness(ours_TV: Tensor, theirs_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Compare logits row by row [T]: whether the likeliest token is the same, and KL(theirs || ours) in nat."""
    ours_TV, theirs_TV = ours_TV.float().log_softmax(-1), theirs_TV.float().log_softmax(-1)
    same_T = ours_TV.argmax(-1) == theirs_TV.argmax(-1)
    return same_T.float(), (theirs_TV.exp() * (theirs_TV - ours_TV)).sum(-1)


def measure_bfloat16(path: Path, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Compare the engine in bfloat16 with transformers in float32, on every 5th window."""
    oracle = Oracle(path)
    pairs = zip(logits_of_engine(path, windows[::5], torch.bfloat16), windows[::5], strict=True)
    same, divergence = zip(*(closeness(ours, oracle.logits(window)) for ours, window in pairs), strict=True)
    return {
        "tokens": sum(len(one) for one in same),
        "same_top_1": round(torch.cat(same).mean().item(), 4),
        "mean_kl_nat": round(torch.cat(divergence).mean().item(), 6),
    }


def perplexity(scores: Tensor) -> float:
    return math.exp(-scores.mean().item())


def measure(path: Path, windows: Sequence[Sequence[int]], bf16: Path | None) -> list[dict[str, Any]]:
    """Return each model's perplexity, and how it differs from transformers' on the NVFP4 weights, which comes
    first."""
    contenders: dict[str, Callable[[], Tensor]] = {
        "transformers, NVFP4 dequantised, float32": lambda: score_by_transformers(
            Oracle(path).model, windows
        ),
        "engine, float32": lambda: score_by_engine(path, windows, torch.float32),
        "engine, float32, FP8 keys and values": lambda: score_by_engine(
            path, windows, torch.float32, kv_cache=FP8
        ),
        "engine, bfloat16": lambda: score_by_engine(path, windows, torch.bfloat16),
    }
    if bf16 is not None:
        contenders["transformers, BF16 checkpoint, float32"] = lambda: score_by_transformers(
            load_dense(bf16), windows
        )
    results: list[dict[str, Any]] = []
    truth = torch.empty(0)
    for name, score in contenders.items():
        began = time.monotonic()
        scores = score()
        truth = scores if not results else truth
        results.append(
            {
                "model": name,
                "perplexity": round(perplexity(scores), 5),
                "relative_to_first": round(perplexity(scores) / perplexity(truth) - 1, 6),
                "largest_logprob_difference": round((scores - truth).abs().max().item(), 6),
                "seconds": round(time.monotonic() - began, 1),
            }
        )
        print_row(*results[-1].values())
    return results


def load_dense(path: Path) -> Any:
    with TensorFiles(path) as files:
        return load_model(path, {name: files.read(name) for name in files})


def print_row(*cells: object) -> None:
    print(f"{cells[0]:<42} {cells[1]:>10} {cells[2]:>10} {cells[3]:>15} {cells[4]:>8}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="NVFP4 checkpoint")
    parser.add_argument("--bf16", type=Path, metavar="DIR", help="the checkpoint that it was made from")
    parser.add_argument("--windows", type=int, help="score only so many, evenly spread over the text")
    parser.add_argument(
        "--output", metavar="FILE", help="also write the JSON line to tests/bench/results/FILE"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the demo model is too small for two
    windows = windows_of(arguments.model, HELDOUT)
    windows = windows[:: max(1, len(windows) // (arguments.windows or len(windows)))]
    print_row("model", "perplexity", "relative", "max |dlogprob|", "seconds")
    results = measure(arguments.model, windows, arguments.bf16)
    config = {"windows": len(windows), "tokens_scored": len(windows) * (WINDOW - 1), "shards": NUM_SHARDS}
    close = measure_bfloat16(arguments.model, windows)
    print(
        f"bfloat16 engine, float32 transformers, {close['tokens']} tokens: "
        f"same top-1 {close['same_top_1']:.2%}, mean KL {close['mean_kl_nat']:.1e} nat"
    )
    report.emit("perplexity", [*results, close], config=config, output=arguments.output)
    difference = results[1]["relative_to_first"]
    if not abs(difference) <= AGREEMENT:  # also when it is not a number
        sys.exit(f"the engine's perplexity differs from transformers' by {difference:.2%}")


if __name__ == "__main__":
    main()
