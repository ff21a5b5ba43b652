"""What runs on the device, a family a folder.

Each has the Triton kernel, the plain PyTorch reference that the tests hold it to, and the CPU's fast version where
there is one. Kernels import nothing of ours but each other.
"""
