"""Tensor parallelism: the group that layers talk through, how ranks connect, and how rank 0 runs the other ranks."""
