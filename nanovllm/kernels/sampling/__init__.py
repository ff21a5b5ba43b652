"""From logits to a token: the logits are edited, truncated and drawn from; and their log-probabilities.

`sample.py` is the front. Behind it are the GPU's kernels (`sample_kernel.py`, with `sample_row.py` and
`sample_threshold.py`) and the CPU's version (`cpu_sample.py`), which both take their noise from `gumbel_noise.py`.
`reference.py` says plainly what all of them compute.
"""
