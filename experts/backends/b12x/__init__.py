"""Backends `b12x` and `b12x-w4a16`: FlashInfer's fused MoE kernels for SM12x, and their emulation."""
