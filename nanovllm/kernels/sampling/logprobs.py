"""Log-probabilities of chosen tokens and of the likeliest, from logits as the model gave them.

One pass gives the normalizer and the chosen token's rank: on a GPU a kernel, which reads each logit once, 2 bytes of
bf16, and stores none. The likeliest are PyTorch's `topk` of the logits. Nothing waits for the device.
"""

import torch

from nanovllm.kernels.constants import LOG2_E
from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.triton_shim import tl, triton

TILE = 8192  # logits at a time


def token_logprobs(logits: torch.Tensor, chosen: torch.Tensor, num_top: int) -> torch.Tensor:
    """Ids, log-probabilities and ranks in one tensor, so that one copy brings them to the host.

    A rank is 1 plus the number of tokens that are likelier; of equally likely tokens any comes first in the top.

    Args:
        logits: `[entries, vocab]`, any floating dtype, the last dimension contiguous; computed with in float32.
        chosen: `[entries]` int32 or int64.
        num_top: how many of the likeliest are asked for besides, from 0 to the vocabulary.

    Returns:
        `[entries, 2 * (1 + num_top) + 1]` int32: ids (first the chosen token, then the likeliest in order), their
        log-probabilities (the bits of float32), and the chosen token's rank. For `unpack`.
    """
    largest, log_mass, rank = (summarize_triton if logits.is_cuda else summarize_reference)(logits, chosen)
    ids, values = chosen.long().unsqueeze(1), logits.gather(1, chosen.long().unsqueeze(1))
    if num_top:
        top = logits.topk(num_top, dim=1)
        ids, values = torch.cat([ids, top.indices], 1), torch.cat([values, top.values], 1)
    # The largest first, so that large logits do not cost the small differences their digits.
    logprobs = (values.float() - largest.unsqueeze(1)) - log_mass.unsqueeze(1)
    return torch.cat([ids.int(), logprobs.view(torch.int32), rank.unsqueeze(1)], 1)


def unpack(packed: torch.Tensor) -> list[tuple[list[int], list[float], list[int]]]:
    """Of each entry of `token_logprobs`, on the host: ids, log-probabilities, ranks."""
    width = packed.shape[1] // 2
    ids = packed[:, :width].tolist()
    logprobs = packed[:, width:-1].view(torch.float32).tolist()
    ranks = packed[:, -1].tolist()
    in_order = list(range(1, width))
    return [(i, x, [rank, *in_order]) for i, x, rank in zip(ids, logprobs, ranks, strict=True)]


def summarize_reference(logits: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each entry: the largest logit, the logarithm of the sum of exp(logit - largest), and the chosen token's rank.

    float32, float32 and int32, each `[entries]`.
    """
    x = logits.float()
    largest = x.amax(1)
    rank = 1 + (x > x.gather(1, chosen.long().unsqueeze(1))).sum(1)
    return largest, (x - largest.unsqueeze(1)).exp_().sum(1).log_(), rank.int()


def summarize_triton(logits: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`summarize_reference` as one launch: a program an entry."""
    num_entries, vocab_size = logits.shape
    largest, log_mass = torch.empty(2, num_entries, dtype=torch.float32, device=logits.device)
    rank = torch.empty(num_entries, dtype=torch.int32, device=logits.device)
    if num_entries:
        tile = min(TILE, max(16, triton.next_power_of_2(vocab_size)))
        _summary_kernel[(num_entries,)](
            logits, chosen, largest, log_mass, rank, logits.stride(0), vocab_size,
            LOG2_E=LOG2_E, TILE=tile, num_warps=16, **early_launch(logits),
        )  # fmt: skip
    return largest, log_mass, rank


@triton.jit
def _summary_kernel(
    logits_ptr,
    chosen_ptr,
    largest_ptr,
    log_mass_ptr,
    rank_ptr,
    logits_stride,
    vocab_size,
    LOG2_E: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    logits_ptr += entry * logits_stride
    wait_for_previous(EARLY)
    chosen = tl.load(logits_ptr + tl.load(chosen_ptr + entry)).to(tl.float32)
    largest = tl.full([TILE], float("-inf"), tl.float32)  # by lane, as are the next two
    mass = tl.zeros([TILE], tl.float32)
    num_likelier = tl.zeros([TILE], tl.int32)
    for start in range(0, vocab_size, TILE):
        index = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)
        num_likelier += (x > chosen).to(tl.int32)
        new_largest = tl.maximum(largest, x)
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # a lane that has seen nothing yet
        mass = mass * tl.exp2((largest - shift) * LOG2_E) + tl.exp2((x - shift) * LOG2_E)
        largest = new_largest
    of_all = tl.max(largest, axis=0)
    mass = tl.sum(mass * tl.exp2((largest - of_all) * LOG2_E), axis=0)
    tl.store(largest_ptr + entry, of_all)
    tl.store(log_mass_ptr + entry, tl.log(mass))
    tl.store(rank_ptr + entry, 1 + tl.sum(num_likelier, axis=0))
