"""From requests to tokens and back. Knows nothing of Ray, HTTP or YAML."""
