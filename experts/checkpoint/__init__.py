"""Checkpoints on disk: what is where, read and written."""
