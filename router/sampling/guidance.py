"""Guides: what a grammar allows next. The grammars' language, and the work, are llguidance's."""

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from router.text.tokenizer import Tokenizer


class Guide:
    """Follows one request's answer. Lives in the engine's thread."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """The text is complete and nothing may follow, or there is an error."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why it cannot go on, such as a limit of what a grammar may cost; else empty."""
        return self._matcher.get_error()

    def allowed(self) -> np.ndarray:
        """int32 [ceil(vocabulary / 32)]: bit i of word w stands for token 32 w + i; end tokens where the text may end."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.int32)

    def accept(self, token: int) -> None:
        """The answer goes on with it. One that is not allowed is an error."""
        self._matcher.consume_token(token)


class Grammars:
    """Makes guides. Any thread may; a large schema takes up to a second, in which others run."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos: frozenset[int]) -> None:
        """vocab_size: of the model, which may have more rows than the tokenizer has tokens."""
        self._tokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=sorted(eos) or None)

    def guide(self, grammar: str) -> Guide:
        """grammar: as router.grammar makes it. Raises ValueError for one that llguidance does not take."""
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if error := matcher.get_error():
            raise ValueError(f"grammar: {error}")
        return Guide(matcher)
