"""The roofline: the least time in which an engine can run a workload on this device, by the bytes and FLOPs it needs.

A decode step reads every weight once, whatever the batch, and every running sequence's keys and values once; it
computes 2 FLOPs per weight and sequence. At the measured ceilings it takes at least the longer of the two times:

    step >= max((weight_bytes + context_tokens * kv_bytes) / read_bytes_per_s, flops / matmul_flops_per_s)

Prefill takes 2 FLOPs per weight and token and 4 * head_dim per head and pair of query and earlier key, and at least
one read of the weights. Activations, the stores of keys and values, and sampling count as free. (Williams, Waterman,
Patterson: "Roofline", CACM 52(4), 2009.)

The lengths are the workload's own. All sequences run from the first step on; if `max_num_seqs` allows fewer, the others
start in order, each when a running sequence ends.
"""

import heapq
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ceilings import Ceilings


@dataclass(slots=True, frozen=True)
class ModelShape:
    """The sizes that decide a step's cost, for a dense decoder with grouped-query attention and a gated MLP."""

    layer_params: int  # of all layers; each token multiplies every one
    head_params: int  # vocab_size * hidden_size, the LM head; each sampled token multiplies every one
    kv_elements_per_token: int  # over all layers
    attention_flops_per_pair: int  # over all layers and heads, for one query and one key
    bytes_per_element: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that every step reads. The embedding counts only if it is the LM head too: otherwise a step
        reads just rows of it.
        """
        return (self.layer_params + self.head_params) * self.bytes_per_element

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv_elements_per_token * self.bytes_per_element


def model_shape(config: dict, bytes_per_element: int) -> ModelShape:
    """The shape of a model of the Llama and Qwen family, from its Hugging Face `config.json`."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads, head_dim = attention_heads(config)
    attention = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden
    mlp = 3 * hidden * config["intermediate_size"]
    return ModelShape(
        layer_params=layers * (attention + mlp),
        head_params=config["vocab_size"] * hidden,
        kv_elements_per_token=layers * 2 * kv_heads * head_dim,
        attention_flops_per_pair=layers * heads * 4 * head_dim,
        bytes_per_element=bytes_per_element,
    )


def attention_heads(config: dict) -> tuple[int, int, int]:
    """(query heads, key/value heads, head dimension) of a `config.json`."""
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def read_config(model_dir: str | Path) -> dict:
    """A model directory's config.json. Raises FileNotFoundError if it has none."""
    return json.loads((Path(model_dir) / "config.json").read_text())


@dataclass(slots=True, frozen=True)
class Roofline:
    """The least seconds. `total_s = prefill_s + decode_s`; the two read times are what decoding takes to read bytes."""

    total_s: float
    prefill_s: float
    decode_s: float
    weight_read_s: float
    kv_read_s: float
    num_decode_steps: int


def roofline(
    shape: ModelShape,
    input_lens: list[int],
    output_lens: list[int],
    ceilings: Ceilings,
    max_num_seqs: int | None = None,
) -> Roofline:
    """The roofline of requests with these lengths. Prefill gives a request's first token, each decode one more."""
    num_seqs, context = decode_load(input_lens, output_lens, max_num_seqs)  # [steps] each
    flops_per_token = 2 * (shape.layer_params + shape.head_params)
    kv_bytes = context * shape.kv_bytes_per_token
    weight_bytes = (num_seqs > 0) * shape.weight_bytes
    flops = num_seqs * flops_per_token + context * shape.attention_flops_per_pair
    step_s = np.maximum((weight_bytes + kv_bytes) / ceilings.read_bytes_per_s, flops / ceilings.matmul_flops_per_s)
    pairs = sum(n * (n + 1) // 2 for n in input_lens)
    prefill_flops = (
        2 * shape.layer_params * sum(input_lens)
        + 2 * shape.head_params * len(input_lens)
        + shape.attention_flops_per_pair * pairs
    )
    prefill_s = max(prefill_flops / ceilings.matmul_flops_per_s, shape.weight_bytes / ceilings.read_bytes_per_s)
    decode_s = float(step_s.sum())
    return Roofline(
        total_s=prefill_s + decode_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
        weight_read_s=float(weight_bytes.sum()) / ceilings.read_bytes_per_s,
        kv_read_s=float(kv_bytes.sum()) / ceilings.read_bytes_per_s,
        num_decode_steps=int((num_seqs > 0).sum()),
    )


def decode_load(
    input_lens: list[int], output_lens: list[int], max_num_seqs: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(sequences that decode, tokens of keys and values that they read together), each `[steps]`.

    A sequence with `n` output tokens decodes in `n - 1` steps and reads `input + 1`, `input + 2`, … tokens in them.
    """
    num_rows = min(max_num_seqs or len(input_lens), len(input_lens))
    ends = [0] * num_rows  # the step from which each row is free, as a heap
    starts = []
    for num_outputs in output_lens:
        starts.append(heapq.heappop(ends))
        heapq.heappush(ends, starts[-1] + num_outputs)
    num_seqs = np.zeros(max(ends), dtype=np.int64)
    context = np.zeros(max(ends), dtype=np.int64)
    for start, num_inputs, num_outputs in zip(starts, input_lens, output_lens, strict=True):
        steps = slice(start + 1, start + num_outputs)  # step `start` computes the prompt
        num_seqs[steps] += 1
        context[steps] += np.arange(num_inputs + 1, num_inputs + num_outputs)
    return num_seqs, context
