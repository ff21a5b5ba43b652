"""With the folder above on Python's path, `vllm` is `nanovllm.vllm`: see there."""

import sys

import nanovllm.vllm

sys.modules[__name__] = nanovllm.vllm
