"""A router and two shards in three processes, asked by the openai client."""

import asyncio
import re

import httpx
import openai
import pytest

from tests.cluster.server import Server, eventually

pytestmark = pytest.mark.cluster

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
        client = server.async_client()
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model="demo", prompt=prompt, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
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
        stream = await server.async_client().completions.create(
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
        client = server.async_client()
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model="demo", prompt="x", max_tokens=200, temperature=0, extra_body={"ignore_eos": True}
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
        ({"prompt": "x", "model": "another"}, 404, "another"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ],
    ids=["negative max_tokens", "too long", "unknown model", "empty", "wrong type"],
)
def test_bad_input_is_refused_in_openai_shape(
    server: Server, body: dict[str, object], status: int, says: str
) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "demo", **body})
    error = answer.json()["error"]
    assert answer.status_code == status
    assert says in error["message"]
    assert error["type"]
    assert greedy(server, "x", max_tokens=2), "and nobody else is harmed"


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


def test_metrics_reach_rays_endpoint(server: Server) -> None:
    greedy(server, PROMPTS[3])
    port = server.detail()["metrics_port"]

    def scraped() -> bool:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        return re.search(r"^ray_sparkmoe_generation_tokens_total\{.*\} [1-9]", text, re.MULTILINE) is not None

    eventually(scraped, what="the counter of generated tokens is above 0", timeout_s=30)
