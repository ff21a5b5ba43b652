"""What runs on the device, a family of kernels in each folder.

A function `f` picks the version for its tensors' device: `f_triton` is the Triton kernel, `f_cpu` a fast CPU version,
and `f_reference` the plain PyTorch that says what both compute. The tests hold the others to the reference. Where it is
fast enough, it serves the CPU too, and there is no `f_cpu`. Of our own code, kernels import only each other and plain
data.
"""
