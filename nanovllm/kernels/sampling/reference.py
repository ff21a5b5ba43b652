"""What sampling means, written the plain way: dense, in float64, one row at a time.

Three steps: `edited_logits` changes the logits, `distribution` turns them into probabilities, `sample_reference` draws.
The tests hold the fast versions (`logit_edits.py`, `sample_kernel.py`, `cpu_sample.py`) to these functions.
"""

import math
from collections.abc import Sequence

import torch

from nanovllm.kernels.sampling.gumbel_noise import MAX_TEMPERATURE, gumbel, noise_bits, noise_keys, spread_indices
from nanovllm.kernels.sampling.tensors import SamplingTensors, TokenBits
from nanovllm.sampling_params import MIN_TEMPERATURE, NAN_LOGITS, NO_TOKEN_LEFT, SamplingParams


def edited_logits(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    bad_words: tuple[tuple[int, ...], ...] = (),
    stop_ids: Sequence[int] = (),
) -> torch.Tensor:
    """`[vocab]` float64: what temperature and truncation are applied to. The order of the edits is vLLM's.

    `bad_words` are the token ids of `params.bad_words`; `stop_ids` may not be drawn before `params.min_tokens`.
    """
    x = logits.cpu().double().clone()
    if params.allowed_token_ids is not None:
        banned = torch.ones(len(x), dtype=torch.bool)
        banned[list(params.allowed_token_ids)] = False
        x[banned] = -math.inf
    for *start, last in bad_words:
        if output[len(output) - len(start) :] == start and len(start) <= len(output):
            x[last] = -math.inf
    if len(output) < params.min_tokens:
        x[list(stop_ids)] = -math.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(prompt + output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return x


def distribution(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Probabilities `[vocab]` float64 that temperature, min_p, top_k and top_p make of `logits [vocab]`, by sorting."""
    p = torch.softmax(logits.detach().cpu().double() / temperature, dim=0)
    p[p < min_p * p.max() * (1 - 1e-9)] = 0  # a token exactly at the limit is kept
    if top_k > 0:
        p[p < p.sort(descending=True).values[min(top_k, len(p)) - 1]] = 0
    p /= p.sum()
    if top_p < 1:
        in_order = p.sort(descending=True).values
        last = int((in_order.cumsum(0) < top_p).sum())
        p[p < in_order[last]] = 0
    return p / p.sum()


def sample_reference(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    params: SamplingTensors,
    token_ids: torch.Tensor,
    out: torch.Tensor,
    masks: TokenBits | None = None,
) -> None:
    """`sample`, with all probabilities and all noise of every entry."""
    mask_of = dict(zip(masks.entries.tolist(), masks.bits, strict=True)) if masks is not None else {}
    entries = zip(rows[: len(logits)].tolist(), seq_lens[: len(logits)].tolist(), strict=True)
    for i, (row, position) in enumerate(entries):
        if masks is not None and i not in mask_of:
            continue
        if row < 0:
            out[i] = 0
            continue
        x = logits[i].cpu().double().clone()
        token = NAN_LOGITS
        if not x.isnan().any():
            if i in mask_of:
                token = torch.arange(len(x))
                x[mask_of[i].cpu()[token // 32] >> token % 32 & 1 == 0] = -math.inf
            if position < int(params.min_len[row]):
                stop_ids = params.stop_ids[row].cpu()
                x[stop_ids[stop_ids >= 0].long()] = -math.inf
            token = _draw(x, params, row, position)
        out[i] = token
        token_ids[row, position] = max(token, 0)


def _draw(x: torch.Tensor, params: SamplingTensors, row: int, position: int) -> int:
    """The row's token at this position, from its masked logits `x [vocab]` float64."""
    temperature, top_p, min_p = (float(field[row]) for field in (params.temperature, params.top_p, params.min_p))
    if x.max() == -math.inf:
        return NO_TOKEN_LEFT
    if temperature < MIN_TEMPERATURE or x.max() == math.inf:
        return int(x.argmax())
    temperature = min(temperature, MAX_TEMPERATURE)
    probabilities = distribution(x, temperature, int(params.top_k[row]), top_p, min_p)
    seed = (params.seed_lo[row].cpu(), params.seed_hi[row].cpu())
    keys = noise_keys(*seed, torch.tensor(position, dtype=torch.int32))
    noise = gumbel(noise_bits(spread_indices(len(x), x.device), *keys))
    scores = x / temperature + noise
    scores[probabilities == 0] = -math.inf
    return int(scores.argmax())
