"""Tokenizer: between whole texts and token ids of one checkpoint; also its sampling defaults and end-of-sequence tokens."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from router.request import SamplingParams
from router.text.control_tokens import ControlTokens
from router.text.too_long import TooLong

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # sentencepiece's name for a single byte


class Tokenizer:
    """The tokenizer of a checkpoint directory. It never uses the network; any thread may call it."""

    def __init__(self, checkpoint: Path, *, special_tokens_in_content: bool = False) -> None:
        """Read the tokenizer. Raises ValueError if the directory does not exist or holds only one written in Python.

        special_tokens_in_content: whether a special token that somebody writes in a chat is that token, and not
        its text. Errors of a broken tokenizer are transformers' own.
        """
        self._hf = _load(checkpoint)
        # It is used directly: transformers' wrapper sets truncation and padding on each call, which is not thread safe.
        self._fast = self._hf.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()
        self.decode: Callable[..., str] = self._fast.decode
        """(token ids, skip_special_tokens=True) -> text. Unknown ids add no text; broken UTF-8 becomes U+FFFD."""
        added = self._fast.get_added_tokens_decoder()
        self._added = {id_: token.content for id_, token in added.items()}
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        decoder = self._fast.decoder
        self._control = None if special_tokens_in_content else self._control_tokens()
        self._is_byte_level = decoder is not None and decoder.decode(["Ġ"]) == " "

    def to_json(self) -> str:
        """Return the content of tokenizer.json, from which another implementation can be made."""
        return self._fast.to_str()

    @cached_property
    def max_token_bytes(self) -> int:
        """The bytes of the longest token: a text of n tokens has at most n times as many.

        A tokenizer that makes texts shorter first (NFC, stripped blanks) may hold a little more.
        """
        pieces = self._fast.get_vocab()  # added tokens among them
        return max(len(piece) if self._is_byte_level else len(piece.encode()) for piece in pieces)

    def encode(self, text: str, *, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        """Return the token ids of a text. While it is encoded, other threads run.

        add_special_tokens: with those that the checkpoint puts around a text, such as a beginning-of-sequence token.
        at_most: raises TooLong for a text of more tokens; if its bytes alone say so, at once.
        """
        return self._encode([text], add_special_tokens=add_special_tokens, at_most=at_most)

    def _encode(
        self, pieces: Sequence[str | Sequence[int]], *, add_special_tokens: bool, at_most: int | None
    ) -> list[int]:
        """Return the token ids of a text in pieces, of which some are tokens already."""
        texts = [piece for piece in pieces if isinstance(piece, str)]
        if at_most is not None:
            num_bytes, max_bytes = sum(len(text.encode()) for text in texts), at_most * self.max_token_bytes
            if num_bytes > max_bytes:
                raise TooLong.in_bytes(num_bytes, max_tokens=at_most, max_bytes=max_bytes)
        # `encode` would hold the GIL, for a second a megabyte; a batch gives the same ids without it.
        encodings = iter(self._fast.encode_batch_fast(texts, add_special_tokens=add_special_tokens))
        encoded = [next(encodings) if isinstance(piece, str) else piece for piece in pieces]
        if at_most is not None and (num_tokens := sum(map(len, encoded))) > at_most:
            raise TooLong.in_tokens(num_tokens, max_tokens=at_most)
        ids = [piece if isinstance(piece, Sequence) else piece.ids for piece in encoded]
        return [*chain.from_iterable(ids)]

    def decode_long(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return what `decode` does. While they are decoded, other threads run."""
        return self._fast.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of what `render_chat` returns."""
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs
        )
        return self.encode_rendered(text)

    def encode_rendered(self, text: str, *, at_most: int | None = None) -> list[int]:
        """Return the token ids of what `render_chat` returns: the template itself has written the special tokens.

        at_most: as in `encode`.
        """
        pieces = self._control.pieces(text) if self._control else [text]
        return self._encode(pieces, add_special_tokens=False, at_most=at_most)

    @property
    def chat_template(self) -> str:
        """The text of the checkpoint's chat template, of all of them if it has several; "" if it has none."""
        template = self._hf.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else template

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the chat as the checkpoint's template writes it, rendered in transformers' jinja sandbox.

        messages: OpenAI's, with "role" and "content"; the arguments of tool calls among them are mappings. tools: OpenAI's
        tools that the model may call. add_generation_prompt: end where the assistant begins to speak. template_kwargs:
        further variables of the template, such as enable_thinking.
        Special tokens in any of them are marks in the result, from which `encode_rendered` makes plain text.
        Raises ValueError if the model has no template, or the template refuses what it is given, or makes special
        tokens from parts of it.
        """
        if not self._hf.chat_template:
            raise ValueError("this model has no chat template: use a text completion instead of a chat")
        variables = dict(template_kwargs or {})
        reserved = sorted(
            variables.keys() & inspect.signature(self._hf.apply_chat_template).parameters.keys()
        )
        if reserved:
            raise ValueError(f"chat template variables {reserved} are reserved")
        given = {"messages": [*messages], "tools": [*tools] or None, "variables": variables}
        if self._control is None:
            return self._render(given, add_generation_prompt=add_generation_prompt)
        hidden = self._control.hide(given)
        try:
            text = self._render(hidden, add_generation_prompt=add_generation_prompt)
            if self._control.may_be_spelled(hidden):
                # A template that takes something out of a text may leave a special token behind.
                cut = self._control.without_edges(hidden)
                others = self._render(cut, add_generation_prompt=add_generation_prompt)
                if self._control.found_in(text) != self._control.found_in(others):
                    raise ValueError(
                        "parts of the messages make special tokens when the template writes them"
                    )
        except ValueError as error:
            raise ValueError(self._control.reveal(str(error))) from error
        return text

    def _render(self, given: Mapping[str, Any], *, add_generation_prompt: bool) -> str:
        try:
            text = self._hf.apply_chat_template(
                given["messages"],
                tools=given["tools"],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **given["variables"],
            )
        except Exception as error:  # a template may raise anything on messages that it does not expect
            raise ValueError(f"the chat template failed: {error}") from error
        assert isinstance(text, str)
        return text

    def _control_tokens(self) -> ControlTokens:
        """Return the special tokens of this tokenizer, which nobody else uses yet."""

        def plain(text: str) -> list[int]:
            return self._fast.encode(text, add_special_tokens=False).ids

        self._fast.encode_special_tokens = True  # which means: do not find them
        try:
            return ControlTokens({id_: self._added[id_] for id_ in self.special_ids}, encode_plain=plain)
        finally:
            self._fast.encode_special_tokens = False

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the vocabulary's own names of tokens, such as `Ġthe`; "" for an unknown id."""
        return [self._fast.id_to_token(token_id) or "" for token_id in token_ids]

    def token_text(self, token_id: int) -> str:
        """Return the text of one token, special or not, with its leading space; part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text, perhaps part of a character. Empty for an unknown id."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._fast.id_to_token(token_id)
        if piece is None:
            return b""
        if self._is_byte_level and _BYTE_OF.keys() >= set(piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        decoder = self._fast.decoder
        # It is decoded behind another piece, since a decoder may strip the space that begins a text.
        return (piece if decoder is None else decoder.decode(["x", piece])[1:]).encode()


_MODELS_OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(checkpoint: Path) -> SamplingParams:
    """Return the sampling parameters of generation_config.json, for whatever a request does not say, as in vLLM.

    Raises ValueError naming the file for a value that no request could ask for.
    """
    file = checkpoint / "generation_config.json"
    given = json.loads(file.read_text()) if file.exists() else {}
    own = {name: given[name] for name in _MODELS_OWN if given.get(name) is not None}
    try:
        return SamplingParams(**own)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def eos_token_ids(checkpoint: Path) -> frozenset[int]:
    """Return the tokens that end a text: those of generation_config.json, else of config.json, else of the tokenizer.

    Empty if the model has none. Raises ValueError as Tokenizer does, if it has to be read.
    """
    for name in ("generation_config.json", "config.json"):
        file = checkpoint / name
        eos = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    eos = _load(checkpoint).eos_token_id
    return frozenset([eos]) if isinstance(eos, int) else frozenset()


def _load(checkpoint: Path) -> PreTrainedTokenizerFast:
    if not checkpoint.is_dir():  # transformers would take the path for a name on the hub
        raise ValueError(f"{checkpoint} is not a directory")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{checkpoint}: {type(tokenizer).__name__} has no tokenizer.json that tokenizers can read"
        )
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's names for bytes: printable Latin-1 characters are themselves, the others U+0100 onwards, in order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
