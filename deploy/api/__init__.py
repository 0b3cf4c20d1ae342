"""The OpenAI-compatible HTTP endpoint over any engine. It knows no Ray."""
