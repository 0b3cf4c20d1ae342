"""From logits to the next token, and the grammars that bound the choice."""
