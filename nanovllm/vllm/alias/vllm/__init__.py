"""Makes `vllm` the package `nanovllm.vllm`, whose docstring explains it; the folder above is on Python's path."""

import sys

import nanovllm.vllm

sys.modules[__name__] = nanovllm.vllm
