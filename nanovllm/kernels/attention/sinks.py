"""Attention sinks in the kernels' softmax: a head has one more score, a parameter, whose value is zero (gpt-oss, 2025).

So a sink adds to the softmax's denominator and to nothing else. A kernel adds it once a query and head, at the end,
when `top`, the largest score, is known.
"""

from nanovllm.kernels.constants import LOG2_E
from nanovllm.kernels.triton_shim import tl, triton

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def sink_mass(sink_ptrs, top):
    """What the sinks add to a sum of exp2(score - top). One far above all scores adds infinity: the output is 0."""
    return tl.exp2(tl.load(sink_ptrs).to(tl.float32) * _LOG2_E - top)
