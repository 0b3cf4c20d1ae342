"""Backend `cpu`: NVFP4 experts in compiled loops."""
