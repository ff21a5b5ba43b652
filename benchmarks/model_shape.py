"""The sizes of a model that decide what a step costs at least: weights, experts, and keys and values by window."""

import json
from collections import Counter
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.moe import Experts
from nanovllm.models.checkpoint_config import load_hf_config
from nanovllm.models.loader import build_outline


@dataclass(slots=True, frozen=True)
class ModelShape:
    """A decoder's sizes.

    Attributes:
        layer_params: of all layers, experts apart; each token multiplies every one.
        head_params: vocab_size * hidden_size, the LM head; each sampled token multiplies every one.
        windows: (tokens that a query sees at most or None for all, number of such layers), for each kind of layer.
        kv_elements_per_token: in one layer. attention_flops_per_pair: in one layer, for one query and one key.
        expert_params: of one expert in all layers that have experts. num_experts, experts_per_token: in a layer.
        experts_hit: (tokens of a step, experts that they hit in a layer on average), as counted, fewest tokens first.
    """

    layer_params: int
    head_params: int
    windows: tuple[tuple[int | None, int], ...]
    kv_elements_per_token: int
    attention_flops_per_pair: int
    bytes_per_element: int
    expert_params: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    experts_hit: tuple[tuple[int, float], ...] = ()

    @property
    def active_params(self) -> int:
        """Parameters of the layers that a token multiplies."""
        return self.layer_params + self.experts_per_token * self.expert_params

    def weight_bytes(self, num_tokens: float = 1) -> float:
        """Bytes of weights that a step of so many tokens reads.

        The embedding counts only if it is the LM head too: otherwise a step reads just rows of it. Of the experts those
        count that are hit. Without a count this is their expected number where all are equally likely; tokens that
        choose alike hit fewer. Between two counts the ratio of the two is interpolated, by the logarithm of tokens.
        """
        missed = 1 - self.experts_per_token / self.num_experts if self.num_experts else 1
        hit = self.num_experts * (1 - missed**num_tokens)
        if self.experts_hit:
            logs = [log(n) for n, _ in self.experts_hit]
            ratios = [counted / (self.num_experts * (1 - missed**n)) for n, counted in self.experts_hit]
            hit *= float(np.interp(log(max(num_tokens, 1)), logs, ratios))
        return (self.layer_params + self.head_params + hit * self.expert_params) * self.bytes_per_element

    @property
    def kv_bytes_per_token(self) -> int:
        """Of a token that all layers see."""
        return self.kv_elements_per_token * self.bytes_per_element * sum(count for _, count in self.windows)


def model_shape(model_dir: str | Path, bytes_per_element: int) -> ModelShape:
    """The shape of the model in a directory, or of its config.json alone. Raises as `load_hf_config`."""
    config, cls = load_hf_config(Path(model_dir))
    outline = build_outline(config, cls)
    experts = [module for module in outline.modules() if isinstance(module, Experts)]
    in_experts = {id(param) for module in experts for param in module.parameters()}
    matrices = [p.numel() for p in outline.model.layers.parameters() if p.dim() == 2 and id(p) not in in_experts]
    (embedding,) = (module for module in outline.modules() if isinstance(module, VocabParallelEmbedding))
    window_of = {"full_attention": None, "sliding_attention": config.sliding_window}
    return ModelShape(
        layer_params=sum(matrices),
        head_params=embedding.weight.numel(),
        windows=tuple(Counter(window_of[kind] for kind in config.layer_types).items()),
        kv_elements_per_token=2 * config.num_key_value_heads * config.head_dim,
        attention_flops_per_pair=4 * config.num_attention_heads * config.head_dim,
        bytes_per_element=bytes_per_element,
        expert_params=sum((m.gate_up.numel() + m.down.numel()) // m.num_experts for m in experts),
        num_experts=experts[0].num_experts if experts else 0,
        experts_per_token=config.num_experts_per_tok if experts else 0,
    )


def attention_heads(config: dict) -> tuple[int, int, int]:
    """(query heads, key/value heads, head dimension) of a `config.json`."""
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def read_config(model_dir: str | Path) -> dict:
    """A model directory's config.json. Raises FileNotFoundError if it has none."""
    return json.loads((Path(model_dir) / "config.json").read_text())
