"""An answer keeps to whatever schema is asked for, however silly its content."""

import asyncio
import json
import random

import jsonschema
import pytest

from tests.support.json_schemas import Schema, random_schema
from tests.support.server import Server

pytestmark = pytest.mark.cluster

AT_A_TIME = 24
PROMPT = "Describe this program in JSON."


@pytest.mark.parametrize("number", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_every_answer_is_of_its_schema(server: Server, number: int) -> None:
    rng = random.Random(number)
    schemas = [random_schema(rng) for _ in range(number)]
    answers = asyncio.run(answers_to(server, schemas))
    for schema, answer in zip(schemas, answers, strict=True):
        jsonschema.validate(json.loads(answer), schema)


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
