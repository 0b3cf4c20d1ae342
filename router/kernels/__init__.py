"""Compiled kernels of the router: numba loops for a CPU, Triton for a GPU."""
