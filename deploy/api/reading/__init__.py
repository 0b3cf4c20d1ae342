"""From the text of an answer to its parts: thoughts, tool calls, structured values."""
