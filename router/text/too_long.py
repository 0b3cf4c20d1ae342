"""TooLong: what is raised for a text that has more tokens than may be, before anybody holds them."""


class TooLong(ValueError):
    """A text of more than max_tokens tokens; str() is a sentence for the user with what it has and what may be."""

    @classmethod
    def in_tokens(cls, num_tokens: int, *, max_tokens: int) -> "TooLong":
        """Return the error of a text that was encoded."""
        return cls(
            f"This model's maximum context length is {max_tokens} tokens, but the text has {num_tokens}."
        )

    @classmethod
    def in_bytes(cls, num_bytes: int, *, max_tokens: int, max_bytes: int) -> "TooLong":
        """Return the error of a text that no tokens can make fit, known without encoding it."""
        return cls(
            f"This model's maximum context length is {max_tokens} tokens, which hold at most {max_bytes} bytes, "
            f"but the text has {num_bytes}."
        )
