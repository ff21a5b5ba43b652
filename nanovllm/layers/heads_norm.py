"""RMSNorm of all query heads as one vector, and of all key heads (OLMo 2: Team OLMo, 2025, arXiv:2501.00656).

The ranks have some heads each, so they add up their mean squares: two numbers a token.
"""

import torch
from torch import nn

from nanovllm.layers.linear import PartialSum
from nanovllm.layers.pointwise import mean_squares, scale_heads
from nanovllm.layers.qkv_linear import QKVParallelLinear


class HeadsNorm(nn.Module):
    """Normalizes the queries and the keys of a QKV projection's output. The weight is of this rank's heads, q then k.

    The checkpoint has two tensors for it, whose shards are "q" and "k".
    """

    chains = ("mean_squares", "scale_heads")

    def __init__(self, qkv_proj: QKVParallelLinear, eps: float) -> None:
        super().__init__()
        self.eps, self.tp = eps, qkv_proj.tp
        self.q_size, self.k_size = qkv_proj.shard_sizes["q"], qkv_proj.shard_sizes["k"]
        self.weight = nn.Parameter(torch.empty(self.q_size + self.k_size), requires_grad=False)
        self.mean_squares, self.scale_heads = mean_squares, scale_heads
        self._qkv_proj = [qkv_proj]  # in a list: it is no part of this module
        self._shares: torch.Tensor | None = None

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """`qkv [tokens, (heads + 2 * kv_heads) * head_dim]`, the same with its queries and keys normalized."""
        means = self.mean_squares(qkv, self._share_of_each(qkv.device), self.q_size)
        if self.tp.size > 1:
            means = PartialSum(means, means.dtype, self.tp).total()
        return self.scale_heads(qkv, means, self.weight, self.q_size, self.eps)

    def load_shard(self, param: nn.Parameter, loaded: torch.Tensor, shard: str) -> None:
        """Copy the weights of this rank's heads. Raises ValueError on a wrong shape."""
        own = param[: self.q_size] if shard == "q" else param[self.q_size :]
        self._qkv_proj[0].copy_heads(own, loaded, shard)

    def _share_of_each(self, device: torch.device) -> torch.Tensor:
        """Each element's share in its mean, `[q_size + k_size]`: a key head that several ranks keep counts once."""
        if self._shares is None or self._shares.device != device:
            proj = self._qkv_proj[0]
            head_dim = self.q_size // proj.num_heads
            q = torch.full((self.q_size,), 1 / (self.q_size * self.tp.size))
            k = 1 / torch.tensor(proj.kv_copies).repeat_interleave(head_dim) / (proj.total_kv_heads * head_dim)
            self._shares = torch.cat([q, k]).to(device)
        return self._shares
