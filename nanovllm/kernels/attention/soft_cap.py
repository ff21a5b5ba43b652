"""The soft cap of attention scores: cap * tanh(score / cap) (Gemma 2, arXiv:2408.00118), inside the kernels' softmax.

An online softmax multiplies each score by one factor, `scale * log2(e)`, and takes exp2. With a cap the tanh comes
first, and `cap * log2(e)` is the factor. Per score that is one more exp2, a division and three simple operations.
"""

from nanovllm.kernels.constants import LOG2_E
from nanovllm.kernels.triton_shim import tl, triton


def score_factors(scale: float, soft_cap: float | None) -> tuple[float | None, float]:
    """What a kernel gives to `cap_score`, and what makes the result an exponent of 2."""
    if soft_cap is None:
        return None, scale * LOG2_E
    return 2 * LOG2_E * scale / soft_cap, soft_cap * LOG2_E


@triton.jit
def cap_score(products, cap_rate):
    """tanh of the products of queries and keys, scaled; without a cap, `cap_rate=None`, the products themselves.

    tanh(x) is 1 - 2 / (exp(2x) + 1): where the exponential overflows that is 1, and where it vanishes -1.
    """
    if cap_rate is None:
        return products
    else:
        return 1.0 - 2.0 / (tl.exp2(products * cap_rate) + 1.0)
