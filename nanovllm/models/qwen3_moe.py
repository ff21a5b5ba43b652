"""Qwen3's mixtures of experts (Qwen Team, 2025, arXiv:2505.09388): Qwen3's attention, and experts in most layers."""

from dataclasses import replace
from typing import Any

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.moe import SparseMoE
from nanovllm.models.blocks import LayerSpec
from nanovllm.models.layer_types import same_everywhere
from nanovllm.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    model_type = "qwen3_moe"
    known_as = "Qwen3 30B-A3B, 235B-A22B, Qwen3-Coder"
    features = "routed experts, dense layers between"
    activations = ("silu",)
    also_called = {"num_experts": "num_local_experts"}
    default_config = {
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    }

    @classmethod
    def complete(cls, config: Any) -> None:
        config.sliding_window = config.sliding_window if config.use_sliding_window else None
        config.layer_types = same_everywhere(config)

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        spec = super().layer_spec(config, index)
        is_sparse = index not in (config.mlp_only_layers or []) and (index + 1) % config.decoder_sparse_step == 0
        return replace(spec, mlp=_experts) if is_sparse else spec


def _experts(config: Any, tp: TensorParallel) -> SparseMoE:
    sizes = (config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok)
    return SparseMoE(*sizes, tp, renormalize=config.norm_topk_prob)
