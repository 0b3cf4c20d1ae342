"""Tokens per second over HTTP beside `transformers serve --continuous-batching`, in one run.

    python -m tests.bench.http [--output FILE]

All serve the demo model in float32 (theirs the dequantised weights, saved as an ordinary checkpoint) to the same
client: streamed greedy completions of 128 tokens. Either side may keep two cores busy, and shows two settings, of
which the better counts: theirs computes with 1 and with 2 torch threads; ours in one process with 1 torch thread, and
as configs/demo.yaml says, in a router and two shards. The servers run one at a time, in turns, and every number of
streams is measured in each turn; an untimed one of 16 streams comes first. Tokens are counted by encoding the text
that came, so both sides are counted alike.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from deploy.cli.server_process import free_port
from router.text.tokenizer import Tokenizer
from tests.bench.client import stream
from tests.bench.report import emit
from tests.support.oracle import Oracle
from tests.support.places import DEMO_MODEL
from tests.support.server import eventually, serving

STREAMS = (1, 4, 16, 64)
NUM_TOKENS = 128
NUM_TURNS = 3
PROMPT = "def read_file_{}(path):\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder)
        _save_dequantised(plain)
        sides = {
            "transformers, 2 threads": lambda: _transformers(plain, threads=2),
            "transformers, 1 thread": lambda: _transformers(plain, threads=1),
            "sparkmoe, one process": lambda: _sparkmoe("fabric.kind=local", "experts.shards=1"),
            "sparkmoe, router + 2 shards": lambda: _sparkmoe(),
        }
        rates = _measure(sides)
    rows = _table(rates)
    emit("http", rows, config={"tokens": NUM_TOKENS, "haproxy": True}, output=options.output)


class Target(NamedTuple):
    url: str
    model: str


def _measure(
    sides: Mapping[str, Callable[[], AbstractContextManager[Target]]],
) -> dict[str, list[list[float]]]:
    """Return each side's rates at each of STREAMS."""
    rates: dict[str, list[list[float]]] = {side: [[] for _ in STREAMS] for side in sides}
    for turn in range(NUM_TURNS):
        for side, serve in sides.items():
            with serve() as target:
                asyncio.run(_rate(target, 16))
                for streams, samples in zip(STREAMS, rates[side], strict=True):
                    samples.append(asyncio.run(_rate(target, streams)))
                    print(f"turn {turn}, {side}, {streams} streams: {samples[-1]:.0f} tokens/s", flush=True)
    return rates


def _table(rates: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """Print the table; the ratio is our better setting's median over their better setting's."""
    rows = []
    print(f"\n| streams | {' | '.join(rates)} | ratio |\n|{'---|' * (len(rates) + 2)}")
    for index, streams in enumerate(STREAMS):
        samples = {side: columns[index] for side, columns in rates.items()}
        best = [
            max(statistics.median(samples[side]) for side in samples if side.startswith(name))
            for name in ("sparkmoe", "transformers")
        ]
        ratio = round(best[0] / best[1], 2)
        rows.append(
            {
                "streams": streams,
                "tokens_per_s": {side: [round(rate) for rate in rates] for side, rates in samples.items()},
                "ratio": ratio,
            }
        )
        print(f"| {streams} | {' | '.join(_spread(rates) for rates in samples.values())} | {ratio} |")
    return rows


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


async def _rate(target: Target, streams: int) -> float:
    """Return tokens per second of all streams together, from the first request to the last token."""
    tokenizer = Tokenizer(DEMO_MODEL)
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=streams)) as client:
        began = time.perf_counter()
        texts = await asyncio.gather(*(_stream(client, target, PROMPT.format(i)) for i in range(streams)))
        elapsed = time.perf_counter() - began
    return sum(len(tokenizer.encode(text)) for text in texts) / elapsed


async def _stream(client: httpx.AsyncClient, target: Target, prompt: str) -> str:
    body = {"model": target.model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    streamed = await stream(client, target.url, body)
    assert streamed.status == 200, streamed
    return streamed.text


@contextlib.contextmanager
def _sparkmoe(*settings: str) -> Iterator[Target]:
    with serving(*settings, environment={"RAY_SERVE_ENABLE_HA_PROXY": "1"}) as server:
        yield Target(server.url, "demo")


@contextlib.contextmanager
def _transformers(path: Path, *, threads: int) -> Iterator[Target]:
    port = free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(path), "--continuous-batching", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(
            lambda: process.poll() is not None or _answers(f"{url}/health"),
            what="transformers serves",
            timeout_s=120,
        )
        assert process.poll() is None, f"transformers serve ended with {process.returncode}"
        yield Target(url, str(path))
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def _save_dequantised(path: Path) -> None:
    """Save the dequantised weights for a server that cannot read NVFP4."""
    Oracle(DEMO_MODEL).model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (path / name).write_bytes((DEMO_MODEL / name).read_bytes())


if __name__ == "__main__":
    main()
