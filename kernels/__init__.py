"""INT8 GEMMs with block fallback: the quantized operands, their PyTorch reference, the kernels and the ops on top.

Needs torch alone; Triton kernels load when a CUDA device asks for them.
"""
