"""A measure of how much of a decode step is not the model: planning, sampling, text, outputs.

    python -m tests.bench.host [--output FILE]

The demo model in float32 in one process, on one thread, without HTTP: 1, 16 and 64 requests that all decode. A step is
a turn of the engine's loop; the model is Trunk.forward, experts included; the host's share is the rest.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from router.model.trunk import Trunk
from router.request import Request, SamplingParams
from tests.bench.report import emit
from tests.support.in_process import in_process
from tests.support.places import DEMO_MODEL

NUM_REQUESTS = (1, 16, 64)
NUM_STEPS = 300
SKIPPED = 20
"""How many steps at the beginning have prompts in them and are not measured."""


class Stopwatch:
    """A stopwatch for the seconds spent in a trunk's forward."""

    def __init__(self, trunk: Trunk) -> None:
        self.seconds = 0.0
        self._forward = trunk.forward
        trunk.forward = self._timed

    def _timed(self, *args: Any, **kwargs: Any) -> Tensor:
        began = time.perf_counter()
        logits = self._forward(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        return logits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(num_requests) for num_requests in NUM_REQUESTS]
    for row in rows:
        print(
            f"{row['requests']:3} requests: step {row['step_us']} us, host {row['host_us']} us, {row['host_percent']} %"
        )
    emit("host", rows, config={"model": "demo", "dtype": "float32", "threads": 1}, output=options.output)


def measure(num_requests: int) -> dict[str, Any]:
    """Return medians over steps."""
    steps: list[tuple[float, float]] = []
    with in_process(DEMO_MODEL, num_shards=1) as server:
        server.engine.checked = False
        stopwatch = Stopwatch(server.engine._trunk)
        for n in range(num_requests):
            params = SamplingParams(max_tokens=NUM_STEPS + SKIPPED, temperature=0, ignore_eos=True)
            server.submit(Request(str(n), tuple(range(n, n + 20)), params))
        for _ in range(NUM_STEPS):
            stopwatch.seconds = 0.0
            began = time.perf_counter()
            server.engine.turn(wait_s=0)
            steps.append((time.perf_counter() - began, stopwatch.seconds))
    steps = steps[SKIPPED:]
    whole = [step for step, _ in steps]
    host = [step - forward for step, forward in steps]
    return {
        "requests": num_requests,
        "step_us": round(statistics.median(whole) * 1e6),
        "host_us": round(statistics.median(host) * 1e6),
        "host_percent": round(100 * statistics.median(h / s for h, s in zip(host, whole, strict=True)), 1),
    }


if __name__ == "__main__":
    main()
