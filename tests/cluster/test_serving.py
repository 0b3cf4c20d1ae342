"""Tests of a router and two shards in three processes, asked by the openai client."""

import asyncio
import os
import re
import signal
import time
from collections import defaultdict

import httpx
import openai
import pytest

from tests.support.dashboard import metrics_shown
from tests.support.server import Server, eventually, is_ready

pytestmark = pytest.mark.cluster

EXPORT_S = 3.0
"""Seconds to wait for metrics; the shared server's Ray collects them every second."""

READY_WITHIN_S = 4.0
"""The shared server's router.ready_within_s."""

PROMPTS = [f"def function_{i}(x, y):\n" + "    # a comment\n" * (i % 5) for i in range(32)]


def greedy(server: Server, prompt: str, *, max_tokens: int = 24) -> str:
    answer = server.client().completions.create(
        model="demo", prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text


def test_a_plain_answer_and_its_usage(server: Server) -> None:
    answer = server.client().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Write a Python function: Add."}], max_tokens=16
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 16


def test_a_streamed_answer_is_the_plain_one(server: Server) -> None:
    stream = server.client().completions.create(
        model="demo",
        prompt=PROMPTS[0],
        max_tokens=24,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces = [chunk.choices[0].text for chunk in stream]
    assert len(pieces) > 5, "text must come as it is made"
    assert "".join(pieces) == greedy(server, PROMPTS[0])


def test_32_at_once_are_what_each_is_alone(server: Server) -> None:
    alone = [greedy(server, prompt) for prompt in PROMPTS[:4]]

    async def together() -> list[str]:
        async with server.async_client() as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model="demo",
                        prompt=prompt,
                        max_tokens=24,
                        temperature=0,
                        extra_body={"ignore_eos": True},
                    )
                    for prompt in PROMPTS
                )
            )
            return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(together())
    assert texts[:4] == alone
    assert all(texts)


def test_a_client_that_leaves_frees_its_slot_and_blocks(server: Server) -> None:
    free = server.detail()["num_free_blocks"]

    async def leave_early() -> None:
        async with server.async_client() as client:
            stream = await client.completions.create(
                model="demo", prompt=PROMPTS[1], max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in stream:
                assert server.detail()["num_running"] == 1
                break
            await stream.close()

    asyncio.run(leave_early())
    eventually(lambda: server.detail()["num_running"] == 0, what="the slot is free", timeout_s=5)
    assert server.detail()["num_free_blocks"] == free


def test_a_full_queue_is_a_429_with_retry_after(server: Server) -> None:
    async def flood() -> list[openai.APIStatusError]:
        async with server.async_client() as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model="demo",
                        prompt="x",
                        max_tokens=60,
                        temperature=0,
                        extra_body={"ignore_eos": True},
                    )
                    for _ in range(60)
                ),
                return_exceptions=True,
            )
            return [answer for answer in answers if isinstance(answer, openai.APIStatusError)]

    refused = asyncio.run(flood())
    assert refused, "60 requests must not fit into 32 rows and a queue of 4"
    assert all(isinstance(error, openai.RateLimitError) for error in refused)
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ({"prompt": "x " * 5000}, 400, "context"),
        ({"prompt": ["x"] * 37}, 400, "at most 36"),
        ({"prompt": [4096]}, 400, "vocabulary of 4096"),
        ({"prompt": "x", "model": "another"}, 404, "another"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ],
    ids=["negative max_tokens", "too long", "too many", "unknown id", "unknown model", "empty", "wrong type"],
)
def test_bad_input_is_refused_and_harms_nobody_else(
    server: Server, body: dict[str, object], status: int, says: str
) -> None:
    async def beside_a_stream() -> tuple[httpx.Response, str]:
        async with server.async_client() as client:
            stream = await client.completions.create(
                model="demo",
                prompt=PROMPTS[4],
                max_tokens=48,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            text, refused = "", None
            async for chunk in stream:
                text += chunk.choices[0].text
                if refused is None:
                    async with httpx.AsyncClient() as http:
                        refused = await http.post(
                            f"{server.url}/v1/completions", json={"model": "demo", **body}
                        )
                    assert chunk.choices[0].finish_reason is None, "the stream must still run"
            assert refused is not None
            return refused, text

    answer, text = asyncio.run(beside_a_stream())
    error = answer.json()["error"]
    assert answer.status_code == status
    assert says in error["message"]
    assert error["type"]
    assert text == greedy(server, PROMPTS[4], max_tokens=48)


def test_json_that_is_none_is_refused(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=b"{'model':")
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]


def test_every_shard_computed_something(server: Server) -> None:
    greedy(server, PROMPTS[2])
    shards = server.detail()["shards"]
    assert [shard["rank"] for shard in shards] == [0, 1]
    assert all(shard["num_pairs"] > 0 for shard in shards)
    assert len({shard["pid"] for shard in shards} | {server.detail()["router_pid"]}) == 3


def test_every_metric_of_the_dashboard_can_be_scraped(server: Server) -> None:
    greedy(server, PROMPTS[2])
    port = server.detail()["metrics_port"]

    def missing() -> set[str]:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        return metrics_shown() - set(re.findall(r"^(ray_sparkmoe_\w+)", text, re.MULTILINE))

    eventually(lambda: not missing(), what="every metric is exported", timeout_s=3 * EXPORT_S)


@pytest.mark.slow
def test_metrics_count_what_users_asked_for_and_nothing_else(server: Server) -> None:
    port = server.detail()["metrics_port"]

    def counted() -> dict[str, float]:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        lines = re.findall(r"^ray_sparkmoe_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        found: dict[str, float] = defaultdict(float)
        for name, labels, value in lines:
            if not name.endswith(("_total", "_count")):
                continue
            reason = re.search(r'reason="(\w+)"', labels)
            found[f"{name} {reason[1]}" if reason else name] += float(value)
        return found

    def settled() -> dict[str, float]:
        before = counted()
        time.sleep(EXPORT_S)
        return before if counted() == before else {}

    answer = server.client().completions.create(
        model="demo", prompt=PROMPTS[3], max_tokens=30, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    expected = {
        "prompt_tokens_total": answer.usage.prompt_tokens,
        "generation_tokens_total": 30,
        "request_success_total length": 1,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 29,
        "e2e_request_latency_seconds_count": 1,
    }
    before = eventually(settled, what="nothing is counted that was asked for before", timeout_s=60)
    time.sleep(READY_WITHIN_S)
    server.wait_until_ready()  # by a step of its own
    greedy(server, PROMPTS[3], max_tokens=30)
    eventually(
        lambda: counted()["request_success_total length"] > before["request_success_total length"],
        what="the request is counted",
        timeout_s=30,
    )
    after = counted()
    assert {name: after[name] - before[name] for name in expected} == expected


def test_a_killed_ingress_leaves_no_request_behind(server: Server) -> None:
    """Serve does not tell the router that nobody reads its outputs any more."""
    expected, router_pid = greedy(server, PROMPTS[5]), server.detail()["router_pid"]

    async def be_cut_off() -> None:
        async with server.async_client() as client:
            stream = await client.completions.create(
                model="demo",
                prompt=PROMPTS[1],
                n=8,
                max_tokens=3000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            await anext(aiter(stream))
            detail = server.detail()
            assert detail["num_running"] > 0
            os.kill(detail["ingress_pid"], signal.SIGKILL)
            async for _ in stream:  # what was on its way, then an error
                pass

    with pytest.raises((openai.APIError, httpx.HTTPError)):
        asyncio.run(be_cut_off())
    eventually(
        lambda: is_ready(server.url) and server.detail().get("num_running") == 0,
        what="its requests are cancelled",
        timeout_s=20,
    )
    assert server.detail()["router_pid"] == router_pid
    assert greedy(server, PROMPTS[5]) == expected
