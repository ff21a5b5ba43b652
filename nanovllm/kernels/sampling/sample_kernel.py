"""`sample` on a GPU: two launches, no sort, and the host need know nothing about the batch.

_scan_kernel: many programs share an entry's logits, and each keeps the best token of its *range* of the vocabulary. If
the row draws from the whole vocabulary, the best token has the largest logit / temperature + noise, and only the ranges
remain to be compared. The kernel reads each logit once (2 bytes in bf16) and spends about 50 instructions on its noise.

_choose_kernel: one program for each entry. For a truncated row (top_k, top_p or min_p) it finds the few tokens to draw
from, without sorting. The scan has left the maxima of many small groups; at least k tokens reach the k-th largest of
these, which is the *floor*. One pass collects all tokens that reach the floor, and bisections over the collected logits
find the exact thresholds. If there are too many to collect (a flat distribution), the same bisections run over all
logits: slower, never wrong. A bisection compares logits as integers of the same order, so it ends, and ends exactly.

Under masks a kernel's programs belong to the masks, and each reads its entry's logits and its mask's bits: 2 bytes and
a bit for each token. Without masks the kernels are compiled without these lines.
"""

import torch

from nanovllm.kernels.early_launch import early_launch, wait_for_previous
from nanovllm.kernels.sampling.gumbel_noise import MAX_TEMPERATURE, gumbel_kernel, noise_bits_kernel
from nanovllm.kernels.sampling.sample_row import (
    count_stop_ids,
    find_entry,
    forbid_tokens,
    load_logits,
    load_raw_logits,
    load_row_params,
    mask_stop_ids,
)
from nanovllm.kernels.sampling.sample_threshold import (
    bisect,
    count_and_mass_from,
    kth_largest,
    least_logit,
    load_tokens,
    order,
)
from nanovllm.kernels.sampling.tensors import SamplingTensors, TokenBits
from nanovllm.kernels.triton_shim import tl, triton
from nanovllm.sampling_params import MIN_TEMPERATURE, NAN_LOGITS, NO_TOKEN_LEFT

SCAN_TILE, CHOOSE_TILE = 2048, 4096  # logits at a time
# Two programs fit on a multiprocessor: while one waits, the other works.
CHOOSE_OPTIONS = {"num_warps": 8, "maxnreg": 128}
TARGET_PROGRAMS = 1024  # of the scan: 8 on each of an H100's 132 multiprocessors
GROUPS = 128  # whose maxima the scan of a range leaves
MAX_GROUPS = 4096  # of an entry, that the choice tells apart
MAX_CANDIDATES = 1024  # most tokens of an entry to collect


def sample_triton(
    logits: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    params: SamplingTensors,
    token_ids: torch.Tensor,
    out: torch.Tensor,
    masks: TokenBits | None = None,
) -> None:
    """`sample` in two launches: a scan by many programs for each entry, and a choice by one."""
    num_entries, vocab_size = logits.shape
    if masks is not None:
        num_entries = len(masks.entries)
    whole = max(triton.next_power_of_2(vocab_size), 16)
    scan_tile = min(SCAN_TILE, whole)
    groups = min(GROUPS, scan_tile)
    max_ranges = triton.cdiv(vocab_size, scan_tile)
    tiles_each = triton.cdiv(max_ranges * num_entries, TARGET_PROGRAMS)
    num_ranges = triton.cdiv(max_ranges, max(tiles_each, 1))
    # [entry, range]: best score, its index, mass; [entry, range, group]: maximum; [entry, candidate]: logit, index
    scratch = torch.empty(
        num_entries * (num_ranges * (3 + groups) + 2 * MAX_CANDIDATES), dtype=torch.float32, device=logits.device
    )
    per_row = (
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.seed_lo,
        params.seed_hi,
        params.min_len,
    )
    arguments = (
        None if masks is None else masks.entries,
        None if masks is None else masks.bits,
        0 if masks is None else masks.bits.stride(0),
        logits,
        logits.stride(0),
        vocab_size,
        rows,
        seq_lens,
        per_row,
        tuple(field.stride(0) for field in per_row),
        params.stop_ids,
        params.stop_ids.stride(),
        scratch,
        num_ranges,
    )
    constants = {
        "MIN_TEMPERATURE": MIN_TEMPERATURE,
        "MAX_TEMPERATURE": MAX_TEMPERATURE,
        "NUM_STOP_IDS": params.stop_ids.shape[1],
        "TILE_STOP_IDS": triton.next_power_of_2(params.stop_ids.shape[1]),
        "GROUPS": groups,
        **early_launch(logits),
    }
    _scan_kernel[(num_entries, num_ranges)](*arguments, tiles_each, TILE=scan_tile, num_warps=8, **constants)
    _choose_kernel[(num_entries,)](
        *arguments,
        token_ids,
        token_ids.stride(),
        out,
        TILE=min(CHOOSE_TILE, whole),
        TILE_RANGES=triton.next_power_of_2(max_ranges),
        TILE_GROUPS=min(MAX_GROUPS, triton.next_power_of_2(max_ranges * groups)),
        MAX_CANDIDATES=MAX_CANDIDATES,
        # The low bits of float32 that are 0 in every logit of this dtype.
        LOW_BITS={torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0),
        NAN_LOGITS=NAN_LOGITS,
        NO_TOKEN_LEFT=NO_TOKEN_LEFT,
        **CHOOSE_OPTIONS,
        **constants,
    )


@triton.jit(do_not_specialize=["num_ranges", "tiles_each"])
def _scan_kernel(
    entries_ptr,
    bits_ptr,
    bits_stride,
    logits_ptr,
    logits_stride,
    vocab_size,
    rows_ptr,
    seq_lens_ptr,
    per_row,
    per_row_strides,
    stop_ids_ptr,
    stop_ids_strides,
    scratch_ptr,
    num_ranges,
    tiles_each,
    MIN_TEMPERATURE: tl.constexpr,
    MAX_TEMPERATURE: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    TILE_STOP_IDS: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Store, for one range of an entry: the best score (NaN if a logit is), its token, the mass, the groups' maxima."""
    wait_for_previous(EARLY)
    draw = tl.program_id(0).to(tl.int64)
    entry = find_entry(draw, entries_ptr)
    range_index = tl.program_id(1)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    if row < 0:
        return
    temperature, is_greedy, is_truncated, top_k, top_p, min_p, key_0, key_1 = load_row_params(
        row, tl.load(seq_lens_ptr + entry), per_row, per_row_strides, vocab_size, MIN_TEMPERATURE, MAX_TEMPERATURE
    )
    inverse_temperature = tl.math.div_rn(1.0, tl.maximum(temperature, MIN_TEMPERATURE))
    stop_ids_ptr += row * stop_ids_strides[0]
    num_stop_ids = count_stop_ids(
        row, tl.load(seq_lens_ptr + entry), per_row, per_row_strides, stop_ids_ptr, stop_ids_strides[1],
        NUM_STOP_IDS, TILE_STOP_IDS,
    )  # fmt: skip
    logits_ptr += entry * logits_stride
    to_exponent = inverse_temperature * 1.4426950408889634
    lane = tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_index = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    mass = tl.zeros([TILE], tl.float32)
    is_nan = tl.zeros([TILE], tl.int32)
    for i in range(tiles_each):
        index = (range_index * tiles_each + i) * TILE + lane
        raw = load_raw_logits(logits_ptr, index, vocab_size)
        is_nan |= (raw != raw).to(tl.int32)
        score = forbid_tokens(raw, index, vocab_size, bits_ptr, draw * bits_stride)
        score = mask_stop_ids(score, index, stop_ids_ptr, stop_ids_strides[1], num_stop_ids)
        if is_truncated:
            largest = tl.maximum(best, score)
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            mass = mass * tl.exp2((best - shift) * to_exponent) + tl.exp2((score - shift) * to_exponent)
        elif not is_greedy:
            score = score * inverse_temperature + gumbel_kernel(noise_bits_kernel(index, key_0, key_1))
        is_better = score > best  # a lane keeps the first of equal scores; NaN is never better
        best_index = tl.where(is_better, index, best_index)
        best = tl.where(is_better, score, best)

    top = tl.max(best, axis=0)
    program = draw * num_ranges + range_index
    num_programs = tl.num_programs(0).to(tl.int64) * num_ranges
    tl.store(scratch_ptr + program, tl.where(tl.max(is_nan, axis=0) > 0, float("nan"), top))
    token = tl.min(tl.where(best == top, best_index, 0x7FFFFFFF), axis=0)
    tl.store(scratch_ptr + num_programs + program, token.to(tl.float32, bitcast=True))
    if is_truncated:
        shift = tl.where(top == float("-inf"), 0.0, top)
        tl.store(scratch_ptr + 2 * num_programs + program, tl.sum(mass * tl.exp2((best - shift) * to_exponent), axis=0))
        group_max = tl.max(tl.reshape(best, [GROUPS, TILE // GROUPS]), axis=1)
        tl.store(scratch_ptr + (3 * num_programs + program * GROUPS) + tl.arange(0, GROUPS), group_max)


@triton.jit(do_not_specialize=["num_ranges"])
def _choose_kernel(
    entries_ptr,
    bits_ptr,
    bits_stride,
    logits_ptr,
    logits_stride,
    vocab_size,
    rows_ptr,
    seq_lens_ptr,
    per_row,
    per_row_strides,
    stop_ids_ptr,
    stop_ids_strides,
    scratch_ptr,
    num_ranges,
    token_ids_ptr,
    token_ids_strides,
    out_ptr,
    MIN_TEMPERATURE: tl.constexpr,
    MAX_TEMPERATURE: tl.constexpr,
    NUM_STOP_IDS: tl.constexpr,
    TILE_STOP_IDS: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_RANGES: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    LOW_BITS: tl.constexpr,
    NAN_LOGITS: tl.constexpr,
    NO_TOKEN_LEFT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Compare an entry's ranges, or draw from the tokens that its truncations leave; store the token."""
    wait_for_previous(EARLY)
    draw = tl.program_id(0).to(tl.int64)
    entry = find_entry(draw, entries_ptr)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    if row < 0:
        tl.store(out_ptr + entry, 0)
        return
    position = tl.load(seq_lens_ptr + entry)
    temperature, is_greedy, is_truncated, top_k, top_p, min_p, key_0, key_1 = load_row_params(
        row, position, per_row, per_row_strides, vocab_size, MIN_TEMPERATURE, MAX_TEMPERATURE
    )
    inverse_temperature = tl.math.div_rn(1.0, tl.maximum(temperature, MIN_TEMPERATURE))
    ranges = tl.arange(0, TILE_RANGES)
    inside = ranges < num_ranges
    program = draw * num_ranges + ranges
    num_programs = tl.num_programs(0).to(tl.int64) * num_ranges
    scores = tl.load(scratch_ptr + program, mask=inside, other=float("-inf"))
    is_nan = tl.max((scores != scores).to(tl.int32), axis=0)
    scores = tl.where(scores == scores, scores, float("-inf"))
    top = tl.max(scores, axis=0)
    if is_truncated & (top > float("-inf")) & (is_nan == 0):
        # What this row keeps is some upper part of its logits: everything from a threshold on.
        to_exponent = inverse_temperature * 1.4426950408889634
        logits_ptr += entry * logits_stride
        stop_ids_ptr += row * stop_ids_strides[0]
        num_stop_ids = count_stop_ids(
            row, position, per_row, per_row_strides, stop_ids_ptr, stop_ids_strides[1], NUM_STOP_IDS, TILE_STOP_IDS
        )
        first_word = draw * bits_stride
        of_entry = (logits_ptr, vocab_size, bits_ptr, first_word, stop_ids_ptr, stop_ids_strides[1], num_stop_ids)
        has_top_k = (top_k > 0) & (top_k < vocab_size)
        has_top_p = top_p < 1.0
        has_min_p = min_p > 0.0
        LOWEST: tl.constexpr = (-0x7F800000 >> LOW_BITS) + 1  # above -inf, which is never drawn
        threshold = tl.full([], LOWEST, tl.int32)
        if has_min_p:
            least = order(top + temperature * tl.log(min_p))
            threshold = tl.maximum(threshold, (least + ((1 << LOW_BITS) - 1)) >> LOW_BITS)

        # The floor, from the groups' maxima. For top_p alone, how many tokens it needs is a guess.
        wanted = tl.where(has_top_k, top_k, tl.where(has_min_p, 0x3FFFFFFF, 128))
        floor = threshold
        if 2 * wanted <= tl.minimum(num_ranges * GROUPS, TILE_GROUPS):
            maxima_ptr = scratch_ptr + (3 * num_programs + draw * num_ranges * GROUPS)
            group_max = tl.full([TILE_GROUPS], float("-inf"), tl.float32)
            for base in range(0, num_ranges * GROUPS, TILE_GROUPS):  # groups past the tile are merged with those in it
                group = base + tl.arange(0, TILE_GROUPS)
                inside_group = group < num_ranges * GROUPS
                group_max = tl.maximum(group_max, tl.load(maxima_ptr + group, mask=inside_group, other=float("-inf")))
            floor = tl.maximum(floor, kth_largest(order(group_max) >> LOW_BITS, wanted, LOWEST))

        # Collect the tokens that reach the floor.
        collected_ptr = scratch_ptr + (3 + GROUPS) * num_programs + draw * (2 * MAX_CANDIDATES)
        lane = tl.arange(0, TILE)
        num_tokens = tl.full([], 0, tl.int32)
        floor_logit = least_logit(floor, LOW_BITS)
        for start in range(0, vocab_size, TILE):
            x = load_logits(of_entry, start + lane)
            reaches = (x >= floor_logit).to(tl.int32)
            place = num_tokens + tl.cumsum(reaches, axis=0) - 1
            fits = (reaches > 0) & (place < MAX_CANDIDATES)
            tl.store(collected_ptr + place, x, mask=fits)
            tl.store(collected_ptr + MAX_CANDIDATES + place, (start + lane).to(tl.float32, bitcast=True), mask=fits)
            num_tokens += tl.sum(reaches, axis=0)
        tl.debug_barrier()  # from here on, threads read what other threads stored
        is_collected = num_tokens <= MAX_CANDIDATES
        num_tokens = tl.where(is_collected, num_tokens, vocab_size)
        source = (of_entry, vocab_size, collected_ptr, top, to_exponent)

        masses = tl.load(scratch_ptr + 2 * num_programs + program, mask=inside, other=0.0)
        total = tl.sum(tl.where(masses > 0, masses * tl.exp2((scores - top) * to_exponent), 0.0), axis=0)
        count, mass = count_and_mass_from(floor, source, num_tokens, is_collected, LOW_BITS, MAX_CANDIDATES, TILE)
        highest = (order(top) >> LOW_BITS) + 1
        none = 0.0  # the mass that reaches `highest`
        if has_top_k:
            if count > top_k:
                threshold = bisect(
                    floor, highest, count, mass, none, top_k, 0.0, source, num_tokens, is_collected,
                    False, LOW_BITS, MAX_CANDIDATES, TILE,
                )  # fmt: skip
            else:
                threshold = floor
            count, total = count_and_mass_from(
                threshold, source, num_tokens, is_collected, LOW_BITS, MAX_CANDIDATES, TILE
            )
        elif has_min_p:
            total = mass
        if has_top_p:
            low = tl.maximum(threshold, floor)
            mass_low, mass_high = tl.minimum(mass, total), none
            if mass < total * top_p:  # the guess was too low
                is_collected = is_collected & False
                num_tokens = vocab_size
                low = threshold
                highest = floor
                count = vocab_size
                mass_low, mass_high = total, mass
            # Even all tokens together, were they below this, would not have half of the mass that top_p may leave out.
            least = tl.log2(0.5 * (1.0 - top_p) * total / vocab_size) / to_exponent
            low = tl.minimum(tl.maximum(low, order(top + least) >> LOW_BITS), highest - 1)
            threshold = bisect(
                low, highest, count, mass_low, mass_high, 0, total * top_p, source, num_tokens, is_collected,
                True, LOW_BITS, MAX_CANDIDATES, TILE,
            )  # fmt: skip

        threshold_logit = least_logit(threshold, LOW_BITS)
        best = tl.full([TILE], float("-inf"), tl.float32)
        best_index = tl.full([TILE], 0x7FFFFFFF, tl.int32)
        for start in range(0, num_tokens, TILE):
            x, index = load_tokens(start + lane, source, num_tokens, is_collected, MAX_CANDIDATES)
            score = x * inverse_temperature + gumbel_kernel(noise_bits_kernel(index, key_0, key_1))
            score = tl.where(x >= threshold_logit, score, float("-inf"))
            is_better = score > best
            best_index = tl.where(is_better, index, best_index)
            best = tl.where(is_better, score, best)
        token = tl.min(tl.where(best == tl.max(best, axis=0), best_index, 0x7FFFFFFF), axis=0)
    else:
        tokens = tl.load(scratch_ptr + num_programs + program, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        token = tl.min(tl.where(inside & (scores == top), tokens, 0x7FFFFFFF), axis=0)
    token = tl.where(token == 0x7FFFFFFF, NO_TOKEN_LEFT, token)
    token = tl.where(is_nan > 0, NAN_LOGITS, token)
    tl.store(out_ptr + entry, token)
    place = row * token_ids_strides[0] + position.to(tl.int64) * token_ids_strides[1]
    tl.store(token_ids_ptr + place, tl.maximum(token, 0))
