"""Log-probabilities of chosen tokens and of the likeliest, from logits as the model gave them.

One pass for the normalizer, one for the chosen token's rank, and a selection: no softmax of the vocabulary is stored.
Few requests ask, so this is plain PyTorch on GPU and CPU alike; nothing waits for the device.
"""

import torch


def token_logprobs(logits: torch.Tensor, chosen: torch.Tensor, num_top: int) -> torch.Tensor:
    """Ids, log-probabilities and ranks in one tensor, so that one copy brings them to the host.

    A rank is 1 plus the number of tokens that are likelier; of equally likely tokens any comes first in the top.

    Args:
        logits: `[entries, vocab]`, any floating dtype; computed with in float32.
        chosen: `[entries]` int32 or int64.
        num_top: how many of the likeliest are asked for besides, from 0 to the vocabulary.

    Returns:
        `[entries, 2 * (1 + num_top) + 1]` int32: ids (first the chosen token, then the likeliest in order), their
        log-probabilities (the bits of float32), and the chosen token's rank. For `unpack`.
    """
    x = logits.float()
    x = x - x.amax(1, keepdim=True)  # first, so that large logits do not cost the small differences their digits
    chosen = chosen.long().unsqueeze(1)
    x_chosen = x.gather(1, chosen)
    rank = 1 + (x > x_chosen).sum(1, keepdim=True)
    top = x.topk(num_top, dim=1)
    ids = torch.cat([chosen, top.indices], 1).int()
    logprobs = torch.cat([x_chosen, top.values], 1) - x.exp().sum(1, keepdim=True).log()
    return torch.cat([ids, logprobs.view(torch.int32), rank.int()], 1)


def unpack(packed: torch.Tensor) -> list[tuple[list[int], list[float], list[int]]]:
    """Of each entry of `token_logprobs`, on the host: ids, log-probabilities, ranks."""
    width = packed.shape[1] // 2
    ids = packed[:, :width].tolist()
    logprobs = packed[:, width:-1].view(torch.float32).tolist()
    ranks = packed[:, -1].tolist()
    in_order = list(range(1, width))
    return [(i, x, [rank, *in_order]) for i, x, rank in zip(ids, logprobs, ranks, strict=True)]
