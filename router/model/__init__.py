"""The dense part of the model: transformers' modelling code with our attention and kernels hooked in."""
