"""What `benchmarks/gpu.py` runs, one module per part.

device       the accelerator, or the CPU in its place: clocks, cold caches, bandwidth
subjects     fastclip's backends and the peers they are compared with
workloads    what is clipped
correctness  every case against float64            capture   CUDA graphs, replayed with changing gradients
launches     kernels and synchronizations counted  large     more than 2^31 elements
timing       device and host times of every peer   targets   what is to be reached, and whether it was
steps        times of clip and optimizer step      step_checks  their results, graphs and launches
"""
