"""Checks of a body that need more than its own fields: its size, its model's limits. They raise ApiError 400."""

import logging
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from deploy.api.engine_client import Limits
from deploy.api.http.errors import ApiError, invalid_body
from deploy.api.openai.fields import ignored_fields
from deploy.api.openai.limits import MAX_SCORES, named_fields, num_scores, too_many_items
from router.request import Request
from router.text.too_long import TooLong

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], sent: bytes, limits: Limits) -> Body:
    """Return the body that was sent, and log the fields of it that nobody knows."""
    if why := too_many_items(sent, max_model_len=limits.max_model_len):
        raise ApiError(400, why)
    try:
        body = kind.model_validate_json(sent)
    except ValidationError as error:
        raise invalid_body(error, sent) from error
    if ignored := sorted(set(ignored_fields(body))):
        logger.warning("ignored fields: %s", named_fields(ignored))
    return body


def check_count(num_choices: int, limits: Limits, *, param: str) -> None:
    """Raise ApiError for more choices than the engine holds."""
    if num_choices > limits.max_requests:
        message = f"{num_choices} answers were asked for; this server holds at most {limits.max_requests} at a time."
        raise ApiError(400, message, param=param)


def check_scores(requests: Sequence[Request]) -> None:
    """Raise ApiError for more logprobs of prompts than a reply may hold."""
    asked = sum(num_scores(len(one.prompt), one.params.prompt_logprobs) for one in requests)
    if asked > MAX_SCORES:
        raise too_many_scores(asked, param="prompt_logprobs", instead="ask for fewer alternatives")


def too_many_scores(asked: int, *, param: str, instead: str) -> ApiError:
    """Return the answer to a body that asks for more logprobs than a reply holds. instead: what to do."""
    message = f"{asked} logprobs were asked for; a reply holds at most {MAX_SCORES}: {instead}."
    return ApiError(400, message, param=param)


def too_long(error: TooLong, *, param: str) -> ApiError:
    """Return the answer to a text of more tokens than the model's context."""
    return ApiError(400, str(error), param=param, code="context_length_exceeded")
