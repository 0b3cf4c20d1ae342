"""An answer keeps to whatever schema is asked for, however silly its content."""

import asyncio
import json
import random

import httpx
import jsonschema
import pytest

from tests.support.grammar_attacks import AMBIGUOUS, BEYOND_BOUNDS, WITHIN_BOUNDS
from tests.support.json_schemas import Schema, random_schema
from tests.support.server import Server

pytestmark = pytest.mark.cluster

AT_A_TIME = 24
NO_END = {"0": -100, "2": -100}
"""A bias against the demo model's end tokens."""

PROMPT = "Describe this program in JSON."


@pytest.mark.parametrize("number", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_every_answer_is_of_its_schema(server: Server, number: int) -> None:
    rng = random.Random(number)
    schemas = [random_schema(rng) for _ in range(number)]
    answers = asyncio.run(answers_to(server, schemas))
    for schema, answer in zip(schemas, answers, strict=True):
        jsonschema.validate(json.loads(answer), schema)


@pytest.mark.parametrize("attack", [*WITHIN_BOUNDS, *BEYOND_BOUNDS])
def test_a_hostile_grammar_is_refused_and_everybody_lives(server: Server, attack: str) -> None:
    fields = WITHIN_BOUNDS.get(attack) or BEYOND_BOUNDS[attack][0]
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}
    before = pids(server)
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=body | fields, timeout=60)
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"
    good = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"guided_regex": "a{3}"}, timeout=60)
    assert good.json()["choices"][0]["message"]["content"] == "aaa"
    assert pids(server) == before


def test_a_grammar_that_proves_costly_is_no_503(server: Server) -> None:
    body = {
        "model": "demo",
        "prompt": "a",
        "max_tokens": 500,
        "ignore_eos": True,
        "guided_grammar": AMBIGUOUS,
    }
    refused = httpx.post(f"{server.url}/v1/completions", json=body | {"logit_bias": NO_END}, timeout=60)
    assert refused.status_code == 400, refused.text
    assert "the grammar cannot go on" in refused.json()["error"]["message"]


def pids(server: Server) -> tuple[int, int]:
    """The processes of ingress and router."""
    detail = server.detail()
    return detail["ingress_pid"], detail["router_pid"]


async def answers_to(server: Server, schemas: list[Schema]) -> list[str]:
    seats = asyncio.Semaphore(AT_A_TIME)
    async with server.async_client() as client:

        async def ask(number: int, schema: Schema) -> str:
            async with (
                seats,
                client.chat.completions.stream(
                    model="demo",
                    messages=[{"role": "user", "content": PROMPT}],
                    response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
                    seed=number,
                    temperature=1.0,
                ) as stream,
            ):
                answer = await stream.get_final_completion()
            assert answer.choices[0].finish_reason == "stop", schema
            return answer.choices[0].message.content or ""

        return await asyncio.gather(*(ask(*pair) for pair in enumerate(schemas)))
