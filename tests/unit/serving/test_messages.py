"""What crosses between ingress and router: its sizes are never more than estimated, and parts join to the whole."""

import pickle

from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.engine import messages
from deploy.engine.messages import Joiner, Part, cut, output_bytes, request_bytes
from router.request import Request, RequestOutput, SamplingParams, TokenLogprob

tokens = st.integers(0, 2**31 - 1)
logprobs = st.floats(allow_nan=False)
scores = st.builds(
    TokenLogprob, tokens, logprobs, st.lists(st.tuples(tokens, logprobs), max_size=20).map(tuple)
)
many_scores = st.tuples(st.lists(scores, max_size=4), st.integers(0, 400)).map(lambda t: tuple(t[0] * t[1]))
outputs = st.builds(
    RequestOutput,
    id=st.sampled_from(["chatcmpl-" + "0" * 32 + "-127"]),
    text=st.text(max_size=50),
    tokens=st.lists(tokens, max_size=5).map(tuple),
    logprobs=many_scores,
    prompt_logprobs=many_scores,
    num_cached=tokens,
    queued_s=st.floats(0, 1e6),
    finish=st.sampled_from([None, "stop", "error"]),
    stop_reason=st.none() | tokens | st.text(max_size=50),
    error=st.none() | st.text(max_size=50),
)


@settings(max_examples=50)
@given(output=outputs)
def test_an_output_is_cut_and_joined_again(output: RequestOutput) -> None:
    assert len(pickle.dumps([output])) <= output_bytes(output)
    most = messages.MAX_BATCH_BYTES
    messages.MAX_BATCH_BYTES = 4096
    try:
        items = list(cut(output))
    finally:
        messages.MAX_BATCH_BYTES = most
    for item, size in items:
        assert len(pickle.dumps([item])) <= size <= 4096
    assert [isinstance(item, Part) for item, _ in items] == [True] * (len(items) - 1) + [False]
    joiner = Joiner()
    joined = [joiner.take(item) for item, _ in items]
    assert joined == [None] * (len(items) - 1) + [output]


@given(
    prompt=st.lists(tokens, max_size=50),
    stop=st.lists(st.text(min_size=1, max_size=50), max_size=16),
    biases=st.dictionaries(tokens, st.floats(-100, 100), max_size=50),
    grammar=st.none() | st.text(max_size=100),
)
def test_a_request_is_never_larger_than_estimated(
    prompt: list[int], stop: list[str], biases: dict[int, float], grammar: str | None
) -> None:
    params = SamplingParams(
        stop=tuple(stop), logit_bias=tuple(biases.items()), stop_token_ids=tuple(prompt), grammar=grammar
    )
    request = Request("chatcmpl-" + "0" * 32 + "-127", tuple(prompt), params, timeout_s=3.5)
    assert len(pickle.dumps(request)) <= request_bytes(request)
