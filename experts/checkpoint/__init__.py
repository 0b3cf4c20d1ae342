"""Checkpoints on disk: finding, reading and writing their tensors."""
