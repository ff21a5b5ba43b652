"""Qwen3, dense (Qwen Team, 2025, arXiv:2505.09388): Llama's block, with an RMSNorm on each query and key head."""

from typing import Any

import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.attention import Attention, AttentionMetadata, AttentionSpec
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import MergedColumnParallelLinear, PartialSum, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import Rope, rope_parameters


class Qwen3Attention(nn.Module):
    def __init__(self, config: Any, tp: TensorParallel) -> None:
        super().__init__()
        hidden_size, num_heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(hidden_size, head_dim, num_heads, config.num_key_value_heads, tp, bias)
        self.o_proj = RowParallelLinear(num_heads * head_dim, hidden_size, tp, bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)
        spec = AttentionSpec(
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=Rope(head_dim, rope_parameters(config)),
            q_norm=self.q_norm,
            k_norm=self.k_norm,
        )
        self.attn = Attention(spec)

    def forward(self, hidden: torch.Tensor, meta: AttentionMetadata) -> PartialSum:
        return self.o_proj(self.attn(self.qkv_proj(hidden), meta))


class Qwen3MLP(nn.Module):
    def __init__(self, config: Any, tp: TensorParallel) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(config.hidden_size, [config.intermediate_size] * 2, tp)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, tp)

    def forward(self, hidden: torch.Tensor) -> PartialSum:
        return self.down_proj(self.gate_up_proj.silu_mul(hidden))


class Qwen3DecoderLayer(nn.Module):
    def __init__(self, config: Any, tp: TensorParallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config, tp)

    def forward(
        self, hidden: torch.Tensor | PartialSum, residual: torch.Tensor | None, meta: AttentionMetadata
    ) -> tuple[PartialSum, torch.Tensor]:
        """`hidden` is the embedding, or what the layer before has to add to `residual [tokens, hidden_size]`."""
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, meta)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Qwen3Model(nn.Module):
    def __init__(self, config: Any, tp: TensorParallel) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, tp) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, meta: AttentionMetadata) -> torch.Tensor:
        hidden, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, meta)
        return self.norm(hidden, residual)[0]


class Qwen3ForCausalLM(nn.Module):
    """`forward` gives hidden states `[tokens, hidden_size]`; `compute_logits`, `[n, vocab_size]` of those it gets."""

    model_type = "qwen3"
    required_config = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ]
    default_config = {  # of transformers' Qwen3Config, for keys that a config.json leaves out
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    }
    # Parameters that hold several of the checkpoint's tensors: name -> (the tensor's name, its shard)
    packed_modules = {
        "qkv_proj": [("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")],
        "gate_up_proj": [("gate_proj", 0), ("up_proj", 1)],
    }

    def __init__(self, config: Any, tp: TensorParallel) -> None:
        super().__init__()
        self.model = Qwen3Model(config, tp)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, tp)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.model.embed_tokens)

    def forward(self, input_ids: torch.Tensor, meta: AttentionMetadata) -> torch.Tensor:
        return self.model(input_ids, meta)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)
