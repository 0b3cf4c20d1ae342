"""Arithmetic that the compiled loops of experts and router share."""

import numpy as np
from numba import njit


@njit(inline="always", error_model="numpy", fastmath={"contract"})
def exp(x: np.float32) -> np.float32:
    """Return e to the x in float32, within a relative 1e-7; a NaN stays one. x below -87 or above 88 counts as that limit.

    The C library's exp would be called for one number at a time; this is plain arithmetic, which LLVM vectorises: ten
    times as fast. The method: x = n ln 2 + r, and Cephes' polynomial (expf.c) of r in [-ln 2 / 2, ln 2 / 2]; ln 2 is
    subtracted in two parts, of which the first has few enough bits for n times it to be exact.
    """
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    bits = np.int32((np.int32(n) + 127) << 23)  # the bits of the float 2^n
    return p * bits.view(np.float32)
