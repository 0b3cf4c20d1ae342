"""The shapes of OpenAI's API: requests in, replies out."""
