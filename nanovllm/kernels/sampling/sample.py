"""One token for each sequence, from its logits and the parameters of its row.

Greedy is an argmax. Every other draw is an argmax too, of logit / temperature + Gumbel noise, so the common path sorts,
sums and normalizes nothing. min_p, top_k and top_p each keep an upper part of the logits; the draw is then the argmax
over the tokens from a threshold on. The noise is a function of the row's seed and the position alone, see
`gumbel_noise.py`.
"""

import torch

from nanovllm.kernels.sampling.cpu_sample import sample_cpu
from nanovllm.kernels.sampling.sample_kernel import sample_triton
from nanovllm.kernels.sampling.tensors import SamplingTensors, TokenBits


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    params: SamplingTensors,
    token_ids: torch.Tensor,
    out: torch.Tensor,
    masks: TokenBits | None = None,
) -> None:
    """Draw each sequence's next token into `out` and into its row.

    The steps, in this order: apply the masks; mask stop ids while `seq_lens < min_len`; divide by the temperature;
    min_p; top_k (ties with the k-th are kept); top_p (of what these left: the smallest set of likeliest tokens, and
    ties with its last).

    A padding entry (row -1) gets token 0 and touches no row. An entry with a NaN among its logits, masked or not, gets
    NAN_LOGITS, one whose logits are all -inf gets NO_TOKEN_LEFT; the rows of both get token 0. +inf is drawn before
    anything finite.

    Args:
        logits: `[entries, vocab]` bfloat16, float16 or float32, the last dimension contiguous; left as they are.
        rows: `[>= entries]` int32.
        seq_lens: `[>= entries]` int32, the position of the token to draw.
        params: by row.
        token_ids: `[rows, max_len]` int32, any strides; `token_ids[row, seq_len]` is written.
        out: `[entries]` int32, written.
        masks: then only the entries that have one draw, and all else stays as it is.
    """
    run = sample_triton if logits.is_cuda else sample_cpu
    run(logits, rows, seq_lens, params, token_ids, out, masks)
