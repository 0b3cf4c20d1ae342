"""The HTTP layer around the routes: guards, streams, access log, API keys and errors."""
