"""Grammars of structured answers: made from what a request asks for, and followed while its answer is sampled.

The language and the work are llguidance's. The functions that make a grammar return its text in llguidance's
serialisation, which is what SamplingParams.grammar holds; of a grammar that llguidance refuses, too: Grammars.guide
says so. A client's grammar may take any time and memory to compile and may overflow the stack, so only a child process
(deploy.api.grammars) may be the first to do it. A Guide then says, token by token, what the grammar allows next, within
LIMITS.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

LIMITS = LLParserLimits(
    max_items_in_row=300,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=10_000,
    max_grammar_size=50_000,
    precompute_large_lexemes=True,
    verbose_errors=False,
)
"""The most that a grammar may cost: to compile, at each token, and in memory as its answer grows.

Ordinary schemas, of a hundred alternatives or properties, need less than half of each over 150,000 tokens. Work at a
token is a few milliseconds at most, states of the lexer 10 MB a request.
"""


def of_json_schema(schema: Mapping[str, Any] | str) -> str:
    """Return the grammar of JSON that a schema (an object, or its text) describes, without blanks.

    A small model might go on with blanks for ever. Raises ValueError for a text that is no JSON.
    """
    given = schema if isinstance(schema, str) else dict(schema)
    return LLMatcher.grammar_from_json_schema(given, overrides={"whitespace_flexible": False})


def of_regex(regex: str) -> str:
    """Return the grammar of the texts that a regular expression matches as a whole."""
    return LLMatcher.grammar_from_regex(regex)


def of_choice(choices: Sequence[str]) -> str:
    """Return the grammar of exactly these texts."""
    if not choices:
        raise ValueError("there must be a choice")
    return of_lark(f"start: {' | '.join(map(literal, choices))}")


def of_lark(grammar: str) -> str:
    """Return the grammar that a text in llguidance's variant of Lark describes."""
    return LLMatcher.grammar_from_lark(grammar)


def either(lark: str, name: str, grammar: str) -> str:
    """Return the grammar of texts of the Lark rule `name`, or of another grammar that a function above made."""
    first, *rest = json.loads(grammar)["grammars"] if _is_json(grammar) else [{"lark_grammar": grammar}]
    rules = f"start: {name} | @other\n{lark}"
    return json.dumps({"grammars": [{"lark_grammar": rules}, {**first, "name": "other"}, *rest]})


def literal(text: str) -> str:
    """Return a text as a Lark grammar quotes it."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any], *, item_separator: str, key_separator: str) -> str:
    """Return the right side of a Lark rule that is JSON of a schema, with these separators."""
    form = {"whitespace_flexible": False, "item_separator": item_separator, "key_separator": key_separator}
    return f"%json {json.dumps({**schema, 'x-guidance': form}, ensure_ascii=False)}"


def _is_json(grammar: str) -> bool:
    return grammar.startswith("{")  # no Lark grammar does


def sentence(message: str) -> str:
    """Return of llguidance's message what a client may read: its beginning and end, and never a panic's text."""
    if "panic" in message.lower():
        return "it is too complex"
    message = message.partition("\n<")[0].strip()  # the state of its parser
    return message if len(message) <= 300 else f"{message[:150]} ... {message[-100:]}"


class Guide:
    """A matcher that follows one request's answer token by token. Lives in the engine's thread, see start_masks."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self._masks: Future[np.ndarray] | None = None  # of a whole step
        self._row = 0  # ours in it

    @property
    def finished(self) -> bool:
        """True once the text is complete and nothing may follow, or there is an error."""
        return self.matcher.is_stopped()

    @property
    def error(self) -> str:
        """The reason why the grammar cannot go on, such as a limit of its cost; empty if it can."""
        return sentence(self.matcher.get_error())

    def allowed(self) -> np.ndarray:
        """Return the mask of tokens that may come next: int32 [ceil(V / 32)], bit i of word w for token 32 w + i.

        End tokens are among them where the text may end; they alone are where there is an error. Waits for the mask,
        which start_masks must have begun.
        """
        assert self._masks is not None
        return self._masks.result()[self._row]

    def expect(self, masks: Future[np.ndarray], row: int) -> None:
        """Note where the mask of the next token is to be: in this row of what `masks` gives."""
        self._masks, self._row = masks, row


class Grammars:
    """Makes the guides of requests, in any thread without the GIL, and their masks beside the engine's thread."""

    def __init__(self, tokenizer_json: str, *, vocab_size: int, eos: frozenset[int]) -> None:
        """Prepare llguidance's view of a vocabulary, which takes a second if it is large.

        tokenizer_json: as Tokenizer.to_json writes it. vocab_size: rows of the model's head, which may be more than the
        tokenizer has tokens. eos: the tokens that may end a text.
        """
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos) or None)
        self._num_words = -(-vocab_size // 32)
        self._executor = LLExecutor()
        self._thread = ThreadPoolExecutor(1, "masks")

    def guide(self, grammar: str) -> Guide:
        """Return a new guide for a grammar that a function of this module made.

        Its first mask, the dearest, has been computed once. Raises ValueError for a grammar that llguidance does not
        take, or not within LIMITS.
        """
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if not matcher.get_error():
            matcher.compute_bitmask()
        if error := matcher.get_error():
            raise ValueError(f"grammar: {sentence(error)}")
        return Guide(matcher)

    def start_masks(self, guides: Sequence[Guide]) -> None:
        """Begin to compute the next masks of these guides in threads; each one's `allowed` waits for them.

        A mask depends only on the tokens so far, so it may be begun as soon as a step is planned, and again if the step
        is. An earlier start is done before this one begins.
        """
        masks = self._thread.submit(self._masks, [guide.matcher for guide in guides])
        for row, guide in enumerate(guides):
            guide.expect(masks, row)

    def accept(self, chosen: Sequence[tuple[Guide, int]]) -> None:
        """Advance each guide by a sampled token, in threads. One that the grammar does not allow sets its `error`.

        Their masks must have been waited for: a matcher serves one thread at a time.
        """
        self._executor.consume_token_par([(guide.matcher, token) for guide, token in chosen])

    def _masks(self, matchers: list[LLMatcher]) -> np.ndarray:
        """Return the masks int32 [len(matchers), ceil(V / 32)]."""
        masks_NW = np.zeros((len(matchers), self._num_words), np.int32)
        places = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(
            places, masks_NW.ctypes.data, masks_NW.shape[1] * masks_NW.itemsize, len(matchers)
        )
        return masks_NW
