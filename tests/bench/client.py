"""A client of /v1/completions for benchmarks: one streamed answer, and when its pieces came."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Streamed:
    """A streamed answer.

    arrivals: when its pieces of text came, on time.perf_counter. retry_after_s: where the status is 429.
    """

    status: int
    began: float
    retry_after_s: float = 0.0
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def first_s(self) -> float:
        """Return the seconds to the first token."""
        return self.arrivals[0] - self.began

    @property
    def gaps_s(self) -> list[float]:
        """Return the seconds between tokens."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Streamed:
    """Return the answer to one request. Raises httpx.HTTPError where the connection breaks."""
    began = time.perf_counter()
    async with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as answer:
        streamed = Streamed(answer.status_code, began, float(answer.headers.get("retry-after", 0)))
        if answer.status_code != 200:
            await answer.aread()
            return streamed
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                streamed.usage = event.get("usage") or streamed.usage
                if text := "".join(choice["text"] for choice in event["choices"]):
                    streamed.text += text
                    streamed.arrivals.append(time.perf_counter())
    return streamed
