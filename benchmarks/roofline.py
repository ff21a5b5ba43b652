"""The roofline: the least time in which an engine can run a workload on this device, by the bytes and FLOPs it needs.

A decode step reads every weight once, whatever the batch, and every running sequence's keys and values once; it
computes 2 FLOPs per weight and sequence. At the measured ceilings it takes at least the longer of the two times:

    step >= max((weight_bytes + context_tokens * kv_bytes) / read_bytes_per_s, flops / matmul_flops_per_s)

Of a mixture of experts a step reads the experts that its tokens hit, and a layer with a sliding window reads no more of
a sequence than the window (`ModelShape`).

Prefill takes 2 FLOPs per weight and token and 4 * head_dim per head and pair of query and earlier key, and at least
one read of the weights. Activations, the stores of keys and values, and sampling count as free. (Williams, Waterman,
Patterson: "Roofline", CACM 52(4), 2009.)

The lengths are the workload's own. All sequences run from the first step on; if `max_num_seqs` allows fewer, the others
start in order, each when a running sequence ends.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from benchmarks.ceilings import Ceilings
from benchmarks.model_shape import ModelShape


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
    num_seqs, _ = decode_load(input_lens, output_lens, max_num_seqs)  # [steps]
    tokens_seen = sum(  # by all layers
        count * decode_load(input_lens, output_lens, max_num_seqs, window)[1] for window, count in shape.windows
    )
    kv_bytes = tokens_seen * shape.kv_elements_per_token * shape.bytes_per_element
    weight_bytes = (num_seqs > 0) * np.array([shape.weight_bytes(n) for n in num_seqs])
    flops = num_seqs * 2 * (shape.active_params + shape.head_params) + tokens_seen * shape.attention_flops_per_pair
    step_s = np.maximum((weight_bytes + kv_bytes) / ceilings.read_bytes_per_s, flops / ceilings.matmul_flops_per_s)
    pairs = sum(count * sum(_pairs(n, window) for n in input_lens) for window, count in shape.windows)
    prefill_flops = (
        2 * shape.active_params * sum(input_lens)
        + 2 * shape.head_params * len(input_lens)
        + shape.attention_flops_per_pair * pairs
    )
    prefill_bytes = shape.weight_bytes(sum(input_lens))
    prefill_s = max(prefill_flops / ceilings.matmul_flops_per_s, prefill_bytes / ceilings.read_bytes_per_s)
    decode_s = float(step_s.sum())
    return Roofline(
        total_s=prefill_s + decode_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
        weight_read_s=float(weight_bytes.sum()) / ceilings.read_bytes_per_s,
        kv_read_s=float(kv_bytes.sum()) / ceilings.read_bytes_per_s,
        num_decode_steps=int((num_seqs > 0).sum()),
    )


def _pairs(num_tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, in a prompt."""
    w = min(num_tokens, window or num_tokens)
    return w * (w + 1) // 2 + (num_tokens - w) * w


def decode_load(
    input_lens: list[int], output_lens: list[int], max_num_seqs: int | None = None, window: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(sequences that decode, tokens of keys and values that they read together), each `[steps]`.

    A sequence with `n` output tokens decodes in `n - 1` steps and reads `input + 1`, `input + 2`, … tokens in them,
    but no more than the window.
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
        lengths = np.arange(num_inputs + 1, num_inputs + num_outputs)
        context[steps] += lengths if window is None else np.minimum(lengths, window)
    return num_seqs, context
