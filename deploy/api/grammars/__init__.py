"""Clients' grammars: bounded, then compiled in child processes before anything else may read them."""
