"""The reading of an answer's text into its parts: content, reasoning and tool calls."""
