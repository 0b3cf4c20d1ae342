"""Backend `triton`: NVFP4 W4A16 experts on any CUDA GPU of SM80 or newer."""
