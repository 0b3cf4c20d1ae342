"""The paged KV cache: who holds which block, and the tensors themselves."""
