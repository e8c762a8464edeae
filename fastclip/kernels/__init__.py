"""Triton kernels for CUDA and ROCm devices, and the host code that launches them.

    tiles       a chunk as 16-byte vectors            accumulate  a chunk's part of a norm
    norm        combine and finalize                  scale, clamp, nonfinite
    coefficients, step      the decision on an optimizer's step, and its update
    table, step_table       lists of tensors as tables of chunks, with the parameters and state of a step
    launch, step_launch     block sizes, one function per operation

Importing a module of this package imports triton, except `table` and `step_table`.
"""
