"""Backend `cpu`: NVFP4 experts computed by compiled loops."""
