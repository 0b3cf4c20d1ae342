"""The Serve deployment that holds the engine, and the ingress's way to it."""
