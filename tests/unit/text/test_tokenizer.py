"""Tokenizer and Detokenizer, on the demo model's byte-level tokenizer and on a sentencepiece-like one."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from router.request import SamplingParams
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import Tokenizer, eos_token_ids, sampling_defaults
from router.text.too_long import TooLong
from tests.support.places import DEMO_MODEL

UNFINISHED = "\ufffd"


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer like Llama 2's: a space is ▁, the first is stripped, unknown characters are byte
    tokens."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdeht",
        "▁t",
        "he",
        "▁the",
    ]
    fast = FastTokenizer(
        models.BPE(
            vocab={piece: id_ for id_, piece in enumerate(pieces)},
            merges=[("▁", "t"), ("h", "e"), ("▁t", "he")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    folder = tmp_path_factory.mktemp("metaspace")
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder
    )
    return Tokenizer(folder)


def stream(
    tokenizer: Tokenizer, token_ids: Sequence[int], *, prompt: Sequence[int] = (), stop: Sequence[str] = ()
) -> tuple[list[str], bool]:
    """Return the pieces of text, the flushed one last, and whether a stop string ended them."""
    detokenizer = Detokenizer(tokenizer, prompt, stop=stop)
    pieces = [detokenizer.push([token]) for token in token_ids]
    return [*pieces, detokenizer.flush()], detokenizer.stopped is not None


emoji = st.sampled_from(["👩‍👩‍👧‍👦", "🇪🇺", "👍🏽", "é", "한글", "  ", "\n", "\ufffd", "€", " the", "עברית"])
texts = st.lists(emoji | st.text(max_size=8), max_size=6).map("".join)


@settings(deadline=None)
@given(text=texts)
def test_pieces_join_to_the_text(demo: Tokenizer, text: str) -> None:
    pieces, stopped = stream(demo, demo.encode(text))
    assert "".join(pieces) == text.rstrip(UNFINISHED)
    assert not stopped
    assert UNFINISHED in text or not any(UNFINISHED in piece for piece in pieces)


@settings(deadline=None)
@given(token_ids=st.lists(st.integers(0, 4095), max_size=30), size=st.integers(1, 5))
def test_any_tokens_join_to_their_decoding(demo: Tokenizer, token_ids: list[int], size: int) -> None:
    """Even those that are no UTF-8, alone and several at a time."""
    expected = demo.decode(token_ids).rstrip(UNFINISHED)
    assert "".join(stream(demo, token_ids)[0]) == expected
    several = Detokenizer(demo, [], stop=[])
    pieces = [several.push(token_ids[start : start + size]) for start in range(0, len(token_ids), size)]
    assert "".join(pieces) + several.flush() == expected


@settings(deadline=None)
@given(prompt=texts, text=texts)
def test_a_prompt_is_context_and_not_output(metaspace: Tokenizer, prompt: str, text: str) -> None:
    context, whole = metaspace.encode("the" + prompt), metaspace.encode("the" + prompt + text)
    pieces, _ = stream(metaspace, whole[len(context) :], prompt=context)
    assert "".join(pieces) == text.rstrip(UNFINISHED)


def test_leading_spaces_of_a_metaspace_tokenizer(metaspace: Tokenizer) -> None:
    the = metaspace.encode("the")
    assert stream(metaspace, the * 3)[0] == ["the", " the", " the", ""]
    assert stream(metaspace, the * 2, prompt=the)[0] == [" the", " the", ""]
    assert stream(metaspace, the, prompt=[1])[0] == ["the", ""], "behind special tokens a text begins"


def test_a_character_appears_with_its_last_byte(demo: Tokenizer, metaspace: Tokenizer) -> None:
    assert stream(metaspace, metaspace.encode("€")[1:])[0] == ["", "", "€", ""]
    token_ids = demo.encode("🦩")
    assert len(token_ids) > 1
    assert stream(demo, token_ids)[0] == [""] * (len(token_ids) - 1) + ["🦩", ""]


def test_an_unfinished_character_is_dropped_at_the_end(demo: Tokenizer) -> None:
    token_ids = demo.encode("a🦩")
    assert "".join(stream(demo, token_ids[:-1])[0]) == "a"


def test_a_prompt_may_end_within_a_character(demo: Tokenizer) -> None:
    before, token_ids = demo.encode("a🦩b"), demo.encode("a🦩")
    assert stream(demo, before[len(token_ids) - 1 :], prompt=token_ids[:-1])[0] == ["🦩", "b", ""]
    assert stream(demo, demo.encode("b"), prompt=token_ids[:-1])[0] == ["b", ""], "never completed"


def test_bytes_that_are_no_text_raise_nothing(metaspace: Tokenizer) -> None:
    """A byte-fallback decoder takes back a good byte when a bad one follows; what was given stays."""
    letter, bad = 2 + ord("A"), 2 + 0xC3
    assert "".join(stream(metaspace, [letter, bad, *metaspace.encode("the")])[0]) == "A\ufffd the"


def test_special_tokens_are_no_text(demo: Tokenizer) -> None:
    hello = demo.encode("hello")
    assert demo.special_ids == {0, 1, 2}
    assert "".join(stream(demo, [1, *hello, 2, 0, *hello, 2])[0]) == "hellohello"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(["lo wo"], "hel"), (["zzz", "d!"], "hello worl"), (["h"], ""), (["hello worlds"], "hello world! 🦩")],
    ids=["several tokens", "second", "first character", "only begun"],
)
def test_stop_strings(demo: Tokenizer, stop: list[str], expected: str) -> None:
    pieces, stopped = stream(demo, demo.encode("hello world! 🦩"), stop=stop)
    assert "".join(pieces) == expected
    assert stopped == (expected != "hello world! 🦩")


def test_a_stop_string_in_the_prompt_does_not_count(demo: Tokenizer) -> None:
    prompt, text = demo.encode("hello STO"), demo.encode("P here")
    assert stream(demo, text, prompt=prompt, stop=["STOP", "hello"]) == (stream(demo, text)[0], False)


marked = st.lists(emoji | st.sampled_from(["<|im_end|>", "<|im_start|>", "a", " "]) | st.text(max_size=8))


@settings(deadline=None)
@given(text=marked.map("".join), special=st.booleans())
def test_encoding_without_the_gil_gives_the_same_tokens(
    demo: Tokenizer, metaspace: Tokenizer, text: str, special: bool
) -> None:
    for tokenizer in (demo, metaspace):
        expected = tokenizer._fast.encode(text, add_special_tokens=special).ids
        assert tokenizer.encode(text, add_special_tokens=special) == expected
        assert tokenizer.encode(text, add_special_tokens=special, at_most=len(expected)) == expected
        for skip in (True, False):
            decoded = tokenizer.decode(expected, skip_special_tokens=skip)
            assert tokenizer.decode_long(expected, skip_special_tokens=skip) == decoded
        if expected:
            with pytest.raises(TooLong):
                tokenizer.encode(text, add_special_tokens=special, at_most=len(expected) - 1)


def test_other_threads_run_while_a_text_is_encoded_or_decoded(demo: Tokenizer) -> None:
    text = "def add(a, b):\n    return a + b\n" * 8_000
    tokens = demo.encode(text)
    for work in (lambda: demo.encode(text), lambda: demo.decode_long(tokens * 20)):
        turns = 0
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            while not future.done():
                turns += 1
                time.sleep(0)  # offers the GIL, which `encode` would keep until it is done
        assert turns > 20


def test_a_text_that_no_tokens_can_make_fit_is_not_encoded(
    demo: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.max_token_bytes == max(len(demo.token_bytes(token)) for token in range(4096))
    monkeypatch.setattr(demo, "_fast", None)
    with pytest.raises(
        TooLong, match=f"10 tokens, which hold at most {10 * demo.max_token_bytes} bytes, .* 10000"
    ):
        demo.encode("é" * 5000, at_most=10)


@settings(deadline=None)
@given(text=texts)
def test_bytes_of_tokens_join_to_the_text(demo: Tokenizer, metaspace: Tokenizer, text: str) -> None:
    assert b"".join(map(demo.token_bytes, demo.encode(text))) == text.encode()
    spaced = f" {text}" if text else ""  # the normalizer begins a text with a space
    assert b"".join(map(metaspace.token_bytes, metaspace.encode(text))) == spaced.encode()


def test_text_of_tokens(demo: Tokenizer, metaspace: Tokenizer) -> None:
    assert demo.token_text(2) == "<|im_end|>"
    assert demo.token_text(10**6) == ""
    assert metaspace.token_text(metaspace.encode("the")[0]) == " the"
    assert metaspace.token_bytes(2 + 0xE2) == b"\xe2"
    assert metaspace.token_text(2 + 0xE2) == UNFINISHED
    assert [demo.decode([id_]) for id_ in range(3, 4096)] == [demo.token_text(id_) for id_ in range(3, 4096)]


def test_chat(demo: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat = "<|im_start|>user\nhi<|im_end|>\n"
    assert demo.render_chat(messages, add_generation_prompt=False) == chat
    assert demo.render_chat(messages) == chat + "<|im_start|>assistant\n"
    token_ids = demo.encode_chat(messages)
    assert token_ids == demo.encode(demo.render_chat(messages))
    assert token_ids[0] == 1


def with_template(folder: Path, template: str) -> Tokenizer:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((DEMO_MODEL / file).read_text())
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


def test_chat_templates_get_variables(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ enable_thinking }}")
    messages = [{"role": "user", "content": ""}]
    assert tokenizer.render_chat(messages, template_kwargs={"enable_thinking": False}) == "False"


def test_chat_templates_get_tools_and_the_arguments_of_calls(tmp_path: Path) -> None:
    template = (
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
        "{% for call in messages[0].tool_calls %}{{ call.function.name }}"
        "{% for k, v in call.function.arguments.items() %}({{ k }}={{ v }}){% endfor %}{% endfor %}"
    )
    tokenizer = with_template(tmp_path, template)
    assert tokenizer.chat_template == template
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert tokenizer.render_chat(messages) == "f(a=1)"
    tool = {"type": "function", "function": {"name": "f"}}
    written = '{"type": "function", "function": {"name": "f"}}f(a=1)'
    assert tokenizer.render_chat(messages, tools=[tool]) == written
    assert tokenizer.encode_rendered(written) == tokenizer.encode(written)


def test_a_checkpoint_without_a_template_has_an_empty_one(metaspace: Tokenizer) -> None:
    assert metaspace.chat_template == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "chat template failed"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "chat template failed"),
    ],
    ids=["refused", "type error", "sandbox", "syntax"],
)
def test_a_failing_template_is_a_value_error(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(ValueError, match=message):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_chats_that_are_refused(demo: Tokenizer, metaspace: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        metaspace.render_chat([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match=r"\['chat_template', 'tokenize'\] are reserved"):
        demo.render_chat([], template_kwargs={"tokenize": True, "chat_template": "{{ 1 }}", "fine": 1})
    with pytest.raises(ValueError, match="empty"):
        demo.render_chat([])


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {5, 6}),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, {5}),
        ({"eos_token_id": None}, {"eos_token_id": 0}, {0}),
        (None, {"eos_token_id": [7]}, {7}),
        ({}, {"eos_token_id": None}, {2}),
    ],
    ids=["list", "int", "null", "no file", "tokenizer"],
)
def test_eos_token_ids(tmp_path: Path, generation: dict | None, config: dict, expected: set[int]) -> None:
    with_template(tmp_path, "")
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **config}))
    assert eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, SamplingParams()),
        ({"eos_token_id": 5, "do_sample": True, "top_p": None}, SamplingParams()),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05},
            SamplingParams(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.05),
        ),
    ],
    ids=["no file", "none given", "all"],
)
def test_sampling_defaults_are_the_models_own(
    tmp_path: Path, generation: dict | None, expected: SamplingParams
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert sampling_defaults(tmp_path) == expected


@pytest.mark.parametrize("top_p", [1.5, "high"])
def test_sampling_defaults_that_cannot_be_are_refused(tmp_path: Path, top_p: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": top_p}))
    with pytest.raises(ValueError, match=r"generation_config\.json: "):
        sampling_defaults(tmp_path)


def test_a_missing_checkpoint_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        Tokenizer(tmp_path / "gpt2")
