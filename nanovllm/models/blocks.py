"""What decoder models are made of. Where families differ is data: a family's file says what each of its layers is.

`hidden` travels between layers as what has to be added to `residual`, not added yet: the next norm's kernel adds it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.linear.gate_mul import Gate
from nanovllm.layers.attention import Attention, AttentionMetadata, AttentionSinks, AttentionSpec
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.heads_norm import HeadsNorm
from nanovllm.layers.layernorm import NormedSum, RMSNorm
from nanovllm.layers.linear import MergedColumnParallelLinear, PartialSum, RowParallelLinear
from nanovllm.layers.pointwise import cap, grow_queries
from nanovllm.layers.qkv_linear import QKVParallelLinear
from nanovllm.layers.rotary_embedding import Rope, rope_parameters

Hidden = torch.Tensor | PartialSum | NormedSum  # [tokens, hidden_size]
Residual = torch.Tensor | None  # [tokens, hidden_size]; None before the first layer


@dataclass(slots=True, kw_only=True)
class LayerSpec:
    """A decoder layer, as far as families differ in it. The defaults are those of most."""

    layer: type[nn.Module] | None = None  # None: `DecoderLayer`; or one of `norm_placements.py`
    one_plus: bool = False  # norms multiply by 1 + weight
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_norm: str | None = None  # of queries and keys: "each" head by itself, or "all" heads as one vector
    has_rope: bool = True
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    soft_cap: float | None = None  # of the scores
    query_growth: tuple[float, int] | None = None  # with the position: the last two arguments of `grow_queries`
    has_sinks: bool = False
    activation: Gate = "silu"
    mlp: Callable[[Any, TensorParallel], nn.Module] | None = None  # None: the gated MLP


class SelfAttention(nn.Module):
    chains = ("grow_queries",)

    def __init__(self, config: Any, tp: TensorParallel, spec: LayerSpec, layer_type: str) -> None:
        super().__init__()
        hidden_size, num_heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        heads = (head_dim, num_heads, config.num_key_value_heads)
        self.qkv_proj = QKVParallelLinear(hidden_size, *heads, tp, spec.qkv_bias)
        self.o_proj = RowParallelLinear(num_heads * head_dim, hidden_size, tp, spec.o_bias)
        attention = AttentionSpec(
            num_heads=self.qkv_proj.num_heads,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5 if spec.scale is None else spec.scale,
            rope=Rope(config.rotary_dim, rope_parameters(config, layer_type)) if spec.has_rope else None,
            window=config.sliding_window if layer_type == "sliding_attention" else None,
            soft_cap=spec.soft_cap,
        )
        if spec.head_norm == "each":
            self.q_norm = attention.q_norm = RMSNorm(head_dim, config.rms_norm_eps, spec.one_plus)
            self.k_norm = attention.k_norm = RMSNorm(head_dim, config.rms_norm_eps, spec.one_plus)
        elif spec.head_norm == "all":
            self.qk_norm = HeadsNorm(self.qkv_proj, config.rms_norm_eps)
        if spec.has_sinks:
            self.sinks = attention.sinks = AttentionSinks(self.qkv_proj.num_heads, tp)
        self.norms_all_heads = spec.head_norm == "all"
        self.query_growth, self.grow_queries = spec.query_growth, grow_queries
        self.attn = Attention(attention)

    def forward(self, hidden: torch.Tensor, meta: AttentionMetadata) -> PartialSum:
        qkv = self.qkv_proj(hidden)
        if self.norms_all_heads:
            qkv = self.qk_norm(qkv)
        if self.query_growth is not None:  # before the rotation, with which it commutes
            qkv = self.grow_queries(qkv, meta.positions, self.qkv_proj.shard_sizes["q"], *self.query_growth)
        return self.o_proj(self.attn(qkv, meta))


class GatedMLP(nn.Module):
    def __init__(self, config: Any, tp: TensorParallel, spec: LayerSpec) -> None:
        super().__init__()
        hidden_size, size = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(hidden_size, [size] * 2, tp, spec.mlp_bias)
        self.down_proj = RowParallelLinear(size, hidden_size, tp, spec.mlp_bias)
        self.activation = spec.activation

    def forward(self, hidden: torch.Tensor) -> PartialSum:
        return self.down_proj(self.gate_up_proj.gate_mul(hidden, self.activation))


class DecoderLayer(nn.Module):
    """Norms before attention and MLP: Llama's layer, and most others'."""

    norm_names = ("input_layernorm", "post_attention_layernorm")

    def __init__(self, config: Any, tp: TensorParallel, spec: LayerSpec, layer_type: str) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, tp, spec, layer_type)
        self.mlp = GatedMLP(config, tp, spec) if spec.mlp is None else spec.mlp(config, tp)
        for name in self.norm_names:
            setattr(self, name, RMSNorm(config.hidden_size, config.rms_norm_eps, spec.one_plus))

    def forward(self, hidden: Hidden, residual: Residual, meta: AttentionMetadata) -> tuple[Hidden, Residual]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, meta)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Decoder(nn.Module):
    def __init__(self, config: Any, tp: TensorParallel, specs: list[LayerSpec], embedding_scale: float) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleList(
            (spec.layer or DecoderLayer)(config, tp, spec, layer_type)
            for spec, layer_type in zip(specs, config.layer_types, strict=True)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, specs[-1].one_plus)
        self.embedding_scale = embedding_scale

    def forward(self, input_ids: torch.Tensor, meta: AttentionMetadata) -> torch.Tensor:
        hidden, residual = self.embed_tokens(input_ids), None
        if self.embedding_scale != 1.0:  # rounded to the model's dtype, as the models were trained
            hidden = hidden * torch.tensor(self.embedding_scale, dtype=hidden.dtype).item()
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, meta)
        return self.norm(hidden, residual)[0]


class CausalLM(nn.Module):
    """`forward` gives hidden states `[tokens, hidden_size]`; `compute_logits`, `[n, vocab_size]` of those it gets.

    A family is a class of these: what its config.json may leave out, and what its layers are.

    Attributes:
        model_type: config.json's. known_as, features: models that users know, and what theirs differ in: for the
            table of `python -m nanovllm.models`.
        required_config: keys that config.json must have. default_config: values for keys that it leaves out, those of
            transformers' config class.
        has_rope_by_layer_type: whether types of layers have RoPE settings of their own.
        activations: that the layers have, of "silu" and "gelu".
        also_called: keys that config.json may have under another name: key -> the name.
        renamed: modules with another name in the checkpoint: name -> the checkpoint's.
        packed_modules: parameters that hold several of the checkpoint's tensors: name -> (tensor's name, shard).
    """

    chains = ("cap",)
    model_type: str
    known_as: str
    features: str
    has_rope_by_layer_type = False
    activations: tuple[str, ...] = ("silu", "gelu")
    also_called: dict[str, str] = {}
    renamed: dict[str, str] = {}
    required_config = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    default_config: dict[str, Any]
    packed_modules = {
        "qkv_proj": [("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")],
        "gate_up_proj": [("gate_proj", 0), ("up_proj", 1)],
        "qk_norm": [("q_norm", "q"), ("k_norm", "k")],
    }

    def __init__(self, config: Any, tp: TensorParallel) -> None:
        super().__init__()
        specs = [self.layer_spec(config, index) for index in range(config.num_hidden_layers)]
        self.model = Decoder(config, tp, specs, self.embedding_scale(config))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, tp)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.model.embed_tokens)
        self.logit_cap, self.cap = self.soft_cap_of_logits(config), cap

    @classmethod
    def complete(cls, config: Any) -> None:
        """Fill in what the config leaves to be derived. Raises ValueError for what the family does not allow."""
        if config.layer_types is None:
            config.layer_types = ["full_attention"] * config.num_hidden_layers

    @classmethod
    def layer_spec(cls, config: Any, index: int) -> LayerSpec:
        """What layer `index` is. Raises ValueError for what we lack."""
        raise NotImplementedError

    @classmethod
    def embedding_scale(cls, config: Any) -> float:
        return 1.0

    @classmethod
    def soft_cap_of_logits(cls, config: Any) -> float | None:
        return None

    def forward(self, input_ids: torch.Tensor, meta: AttentionMetadata) -> torch.Tensor:
        return self.model(input_ids, meta)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden)
        return logits if self.logit_cap is None else self.cap(logits, self.logit_cap)
