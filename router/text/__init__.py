"""Between text and tokens: tokenizer, detokenizer, stop strings."""
