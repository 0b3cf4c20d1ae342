"""The router: from requests to tokens and back. It knows nothing of Ray, HTTP or YAML."""
