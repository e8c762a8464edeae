"""Triton kernels for CUDA and ROCm devices, and the host code that launches them.

    tiles                   a chunk as 16-byte vectors; the one place that tells dtypes apart
    accumulate, norm        a chunk's part of a norm; combine and finalize
    scale, elementwise, nonfinite, thresholds     an operation each
    coefficients, step      the decision on an optimizer's step, and its update
    table, step_table       lists of tensors as tables of chunks, with the parameters and state of a step
    columns, blocks         what tables and kernels agree on; how kernels are laid out on a device

Beneath a kernel is the function that launches it, above it the numbers of its layout.

Importing a module of this package imports triton, except `table` and `step_table`.
"""
