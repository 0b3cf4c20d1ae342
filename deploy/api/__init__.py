"""The OpenAI-compatible endpoint over any engine: knows HTTP, and no Ray."""
