"""Decoder layers whose norms stand elsewhere than before attention and MLP. A family names one as `LayerSpec.layer`."""

from nanovllm.layers.attention import AttentionMetadata
from nanovllm.layers.layernorm import NormedSum
from nanovllm.models.blocks import DecoderLayer, Hidden, Residual


class PostNormLayer(DecoderLayer):
    """Norms after attention and MLP, before the residual is added: OLMo 2's layer."""

    norm_names = ("post_attention_layernorm", "post_feedforward_layernorm")

    def forward(self, hidden: Hidden, residual: Residual, meta: AttentionMetadata) -> tuple[Hidden, Residual]:
        hidden = self.post_attention_layernorm.add_normed(self.self_attn(hidden, meta), hidden)
        hidden = self.post_feedforward_layernorm.add_normed(self.mlp(hidden), hidden)
        return hidden, None


class SandwichLayer(DecoderLayer):
    """Norms before and after both: Gemma 2's layer."""

    norm_names = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )

    def forward(self, hidden: Hidden, residual: Residual, meta: AttentionMetadata) -> tuple[Hidden, Residual]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = NormedSum(self.self_attn(hidden, meta), self.post_attention_layernorm)
        hidden, residual = self.pre_feedforward_layernorm(hidden, residual)
        return NormedSum(self.mlp(hidden), self.post_feedforward_layernorm), residual
