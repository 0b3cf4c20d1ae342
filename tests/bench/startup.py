"""How long a server takes from its command to its first token, part by part, and how fast its experts are read.

    python -m tests.bench.startup --checkpoint DIR [--shards N] [--set KEY=VALUE]... [--output FILE]
    python -m tests.bench.startup --shape qwen3-30b-a3b --layers 12 --alone

A checkpoint is given, or one of a real shape is written, with random weights, and deleted at the end. The server is
started twice: the second start finds the kernels that the first one compiled. Parts of router and shards overlap, and what
is none of theirs is Ray's and Serve's. --alone loads all experts into this process instead, without Ray.

The disk: the same files read by one thread from their beginning to their end, in pieces of 16 MiB, past the page cache (cold)
and, a second time, through it (warm); and by ByteReader, which reads as the shards do.
"""

import argparse
import asyncio
import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experts.checkpoint.byte_reader import ByteReader, Extent, group_of
from experts.checkpoint.reader import ExpertCheckpoint
from experts.device import default_device, resolve_dtype
from experts.placement import place_evenly
from experts.progress import show, took
from experts.shard import load_shard
from tests.bench.random_model import SHAPES, write_checkpoint
from tests.bench.report import emit

NUM_STARTS = 2
PIECE = 16 * 2**20
MOST_BYTES = 8 * 10**9
"""The most bytes of the files over which the disk is measured."""


def main() -> None:
    parser = argparse.ArgumentParser()
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path)
    source.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="of the shape, the first ones; all of them if not given")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is written; on the disk that is meant"
    )
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as for sparkmoe serve"
    )
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--output")
    options = parser.parse_args()
    with _checkpoint(options) as path:
        starts = [
            _alone(path) if options.alone else _server(path, options.shards, options.set)
            for _ in range(NUM_STARTS)
        ]
        disk = _disk(path)
    rows = [{"start": number, **row} for number, start in enumerate(starts, 1) for row in start]
    _print_table(rows, disk)
    config = {
        "checkpoint": str(options.checkpoint or options.shape),
        "layers": options.layers,
        "shards": 1 if options.alone else options.shards,
        "server": not options.alone,
        "disk": disk,
    }
    emit("startup", rows, config=config, output=options.output)


@contextlib.contextmanager
def _checkpoint(options: argparse.Namespace) -> Iterator[Path]:
    if options.checkpoint is not None:
        yield options.checkpoint.resolve()
        return
    config = SHAPES[options.shape]
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_checkpoint(config, Path(folder) / "checkpoint")
        yield Path(folder) / "checkpoint"


def _server(path: Path, num_shards: int, settings: Sequence[str]) -> list[dict[str, Any]]:
    """Start a server and ask it for a token."""
    from tests.support.server import serving  # --alone needs neither Ray nor a client

    began = time.perf_counter()
    settings = [f"model.path={path}", f"experts.shards={num_shards}", *settings]
    with serving(*settings) as server:
        ready_s = time.perf_counter() - began
        first_s = asyncio.run(_first_token(server.url))
        detail = server.detail()
    parts = dict(detail["took"])
    for shard in detail["shards"]:
        parts |= shard["took"]
    return [
        *_rows({work: (one["seconds"], one["num_bytes"]) for work, one in parts.items()}),
        {"work": "ready", "seconds": round(ready_s, 2)},
        {"work": "first token", "seconds": round(first_s, 3)},
    ]


async def _first_token(url: str) -> float:
    import httpx

    from tests.bench.client import stream

    body = {"model": "demo", "prompt": [1, 2, 3], "max_tokens": 1, "ignore_eos": True, "temperature": 0}
    began = time.perf_counter()
    async with httpx.AsyncClient(timeout=120) as client:
        streamed = await stream(client, url, body)
    assert streamed.status == 200, streamed
    return time.perf_counter() - began


def _alone(path: Path) -> list[dict[str, Any]]:
    device = default_device()
    began = time.perf_counter()
    with ExpertCheckpoint(path) as checkpoint:
        shard = load_shard(
            checkpoint,
            place_evenly(checkpoint.shape, num_ranks=1),
            rank=0,
            backend="auto",
            dtype=resolve_dtype("auto", device=device),
            device=device,
            report=show("shard 0"),
        )
    if device.type == "cuda":
        torch.cuda.synchronize()
    ready_s = time.perf_counter() - began
    del shard
    return [
        *_rows({work: (one.seconds, one.num_bytes) for work, one in took().items()}),
        {"work": "ready", "seconds": round(ready_s, 2)},
    ]


def _rows(parts: Mapping[str, tuple[float, int]]) -> list[dict[str, Any]]:
    return [
        {
            "work": work,
            "seconds": round(seconds, 2),
            **(
                {"gb": round(size / 1e9, 3), "gb_per_s": round(size / 1e9 / max(seconds, 1e-9), 3)}
                if size
                else {}
            ),
        }
        for work, (seconds, size) in parts.items()
    ]


def _disk(path: Path) -> dict[str, float]:
    """GB/s of the checkpoint's files, as this module says."""
    files, size = [], 0
    for file in sorted(path.glob("*.safetensors")):
        if size < MOST_BYTES:
            files.append(file)
            size += file.stat().st_size

    def rate(read: Callable[[], None]) -> float:
        began = time.perf_counter()
        read()
        return round(size / 1e9 / (time.perf_counter() - began), 3)

    def sequentially(flags: int) -> None:
        for file in files:
            _read_sequentially(file, flags)

    found = {"reader_gb_per_s": rate(lambda: _read_ahead(files))}
    with contextlib.suppress(OSError):  # a file system without O_DIRECT
        found["cold_gb_per_s"] = rate(lambda: sequentially(os.O_DIRECT))
    sequentially(0)
    found["warm_gb_per_s"] = rate(lambda: sequentially(0))
    return found


def _read_sequentially(file: Path, flags: int) -> None:
    descriptor = os.open(file, os.O_RDONLY | flags)
    try:
        with mmap.mmap(-1, PIECE) as buffer:  # which begins with a page, as O_DIRECT wants it
            offset = 0
            while count := os.preadv(descriptor, [buffer], offset):
                offset += count
                if count % mmap.PAGESIZE:
                    break  # the end of the file
    finally:
        os.close(descriptor)


def _read_ahead(files: Sequence[Path]) -> None:
    groups = [
        group_of([Extent(file, begin, min(PIECE, file.stat().st_size - begin))])
        for file in files
        for begin in range(0, file.stat().st_size, PIECE)
    ]
    with ByteReader(groups) as reader:
        for _ in reader:
            reader.release()


def _print_table(rows: Sequence[dict[str, Any]], disk: Mapping[str, float]) -> None:
    print(f"{'start':>5}  {'work':<24} {'seconds':>8} {'GB':>8} {'GB/s':>7}")
    for row in rows:
        gb, rate = (row.get(key, "") for key in ("gb", "gb_per_s"))
        print(f"{row['start']:>5}  {row['work']:<24} {row['seconds']:>8} {gb:>8} {rate:>7}")
    print(
        "disk: " + ", ".join(f"{name.removesuffix('_gb_per_s')} {rate} GB/s" for name, rate in disk.items())
    )


if __name__ == "__main__":
    main()
