"""Tokens per second over HTTP beside `transformers serve --continuous-batching`, in one run.

    python -m tests.bench.http [--output FILE]

Both serve the demo model in float32 (theirs the dequantised weights, saved as an ordinary checkpoint), with the same
number of torch threads, to the same client: streamed greedy completions of 128 tokens. The servers run one at a time,
in the order theirs, ours, theirs, ours, and every number of streams is measured in each turn; an untimed turn of 16
streams comes first. Tokens are counted by encoding the text that came, so both sides are counted alike.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx

from router.tokenizer import Tokenizer
from tests.bench.report import emit
from tests.cluster.server import eventually, free_port, serving
from tests.oracle import Oracle

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs" / "demo-model"
STREAMS = (1, 4, 16, 64)
NUM_TOKENS = 128
NUM_TURNS = 2
REPEATS = 2
PROMPT = "def read_file_{}(path):\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", action="append", default=[], help="of our server, as of `sparkmoe serve`")
    parser.add_argument("--haproxy", action="store_true", help="our server with Ray Serve's HAProxy")
    options = parser.parse_args()

    settings = options.set or ["fabric.kind=local", "experts.shards=1", f"router.threads={options.threads}"]
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "1"} if options.haproxy else {}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        _save_dequantised(plain)
        sides: dict[str, tuple[str, Callable[[], AbstractContextManager[str]]]] = {
            "transformers": (str(plain), lambda: _transformers(plain, threads=options.threads)),
            "sparkmoe": ("demo", lambda: _sparkmoe(settings, environment)),
        }
        rates = _measure(sides)
    rows = _table(rates)
    config = {
        "settings": settings,
        "haproxy": options.haproxy,
        "threads": options.threads,
        "tokens": NUM_TOKENS,
    }
    emit("http", rows, config=config, output=options.output)


def _measure(
    sides: dict[str, tuple[str, Callable[[], AbstractContextManager[str]]]],
) -> dict[tuple[str, int], list[float]]:
    rates: dict[tuple[str, int], list[float]] = {}
    for turn in range(NUM_TURNS):
        for side, (model, serve) in sides.items():
            with serve() as url:
                asyncio.run(_rate(url, model, 16))
                for streams in STREAMS:
                    for _ in range(REPEATS):
                        rate = asyncio.run(_rate(url, model, streams))
                        rates.setdefault((side, streams), []).append(rate)
                        print(
                            f"turn {turn} {side:12s} {streams:3d} streams: {rate:7.0f} tokens/s", flush=True
                        )
    return rates


def _table(rates: dict[tuple[str, int], list[float]]) -> list[dict[str, Any]]:
    rows = []
    print("\n| streams | transformers | sparkmoe | ratio |\n|---|---|---|---|")
    for streams in STREAMS:
        theirs, ours = (rates[side, streams] for side in ("transformers", "sparkmoe"))
        ratio = statistics.median(ours) / statistics.median(theirs)
        rows.append({"streams": streams, "transformers": theirs, "sparkmoe": ours, "ratio": round(ratio, 2)})
        print(f"| {streams} | {_spread(theirs)} | {_spread(ours)} | {ratio:.2f} |")
    return rows


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


async def _rate(url: str, model: str, streams: int) -> float:
    """Tokens per second of all streams together, from the first request to the last token."""
    tokenizer = Tokenizer(MODEL)
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=streams)) as client:
        began = time.perf_counter()
        texts = await asyncio.gather(*(_stream(client, url, model, PROMPT.format(i)) for i in range(streams)))
        elapsed = time.perf_counter() - began
    return sum(len(tokenizer.encode(text)) for text in texts) / elapsed


async def _stream(client: httpx.AsyncClient, url: str, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
    text = ""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    return text


@contextlib.contextmanager
def _sparkmoe(settings: list[str], environment: dict[str, str]) -> Iterator[str]:
    with serving(*settings, environment=environment) as server:
        yield server.url


@contextlib.contextmanager
def _transformers(path: Path, *, threads: int) -> Iterator[str]:
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
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def _save_dequantised(path: Path) -> None:
    """The same weights for a server that cannot read NVFP4."""
    Oracle(MODEL).model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (path / name).write_bytes((MODEL / name).read_bytes())


if __name__ == "__main__":
    main()
