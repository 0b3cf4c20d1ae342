"""Sampling: from logits to the next token, and the grammars that structured answers must follow."""
