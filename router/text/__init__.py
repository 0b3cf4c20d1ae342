"""Text and tokens: tokenizer, detokenizer and stop strings."""
