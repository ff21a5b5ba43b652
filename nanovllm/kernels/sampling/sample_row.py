"""How `sample_kernel.py` loads a row's parameters, and an entry's logits without forbidden tokens and stop ids."""

from nanovllm.kernels.sampling.gumbel_noise import noise_keys_kernel
from nanovllm.kernels.triton_shim import tl, triton


@triton.jit
def find_entry(draw, entries_ptr):
    """A draw's entry. Without masks, where the pointer is None, it is the draw itself."""
    entry = draw
    if entries_ptr is not None:
        entry = tl.load(entries_ptr + draw)
    return entry


@triton.jit
def load_row_params(
    row, position, per_row, per_row_strides, vocab_size, MIN_TEMPERATURE: tl.constexpr, MAX_TEMPERATURE: tl.constexpr
):
    """Load a row's parameters; make the keys of its noise at this position."""
    temperature = tl.load(per_row[0] + row * per_row_strides[0])
    top_k = tl.load(per_row[1] + row * per_row_strides[1])
    top_p = tl.load(per_row[2] + row * per_row_strides[2])
    min_p = tl.load(per_row[3] + row * per_row_strides[3])
    seed_lo = tl.load(per_row[4] + row * per_row_strides[4])
    seed_hi = tl.load(per_row[5] + row * per_row_strides[5])
    key_0, key_1 = noise_keys_kernel(seed_lo, seed_hi, position)
    is_greedy = temperature < MIN_TEMPERATURE
    asks_truncation = ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0) | (min_p > 0.0)
    is_truncated = asks_truncation & (temperature >= MIN_TEMPERATURE)
    temperature = tl.minimum(temperature, MAX_TEMPERATURE)
    return temperature, is_greedy, is_truncated, top_k, top_p, min_p, key_0, key_1


@triton.jit
def count_stop_ids(
    row, position, per_row, per_row_strides, stop_ids_ptr, stop_ids_stride,
    NUM_STOP_IDS: tl.constexpr, TILE_STOP_IDS: tl.constexpr,
):  # fmt: skip
    """How many of the row's stop ids to mask at this position: none once the row has its minimal length."""
    min_len = tl.load(per_row[6] + row * per_row_strides[6])
    place = tl.arange(0, TILE_STOP_IDS)
    stop_ids = tl.load(stop_ids_ptr + place * stop_ids_stride, mask=place < NUM_STOP_IDS, other=-1)
    return tl.where(position < min_len, tl.max(tl.where(stop_ids >= 0, place + 1, 0), axis=0), 0)


@triton.jit
def load_raw_logits(logits_ptr, index, vocab_size):
    """Load logits as float32; -inf past the vocabulary."""
    return tl.load(logits_ptr + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def mask_stop_ids(x, index, stop_ids_ptr, stop_ids_stride, num_stop_ids):
    """Set the first `num_stop_ids` stop ids to -inf."""
    for i in range(num_stop_ids):
        x = tl.where(index == tl.load(stop_ids_ptr + i * stop_ids_stride), float("-inf"), x)
    return x


@triton.jit
def forbid_tokens(x, index, vocab_size, bits_ptr, first_word):
    """Set tokens whose bit is 0 to -inf; `bits_ptr` may be None."""
    if bits_ptr is not None:
        word = tl.load(bits_ptr + first_word + index // 32, mask=index < vocab_size, other=0)
        x = tl.where((word >> (index % 32)) & 1 == 0, float("-inf"), x)
    return x


@triton.jit
def load_logits(of_entry, index):
    """Load an entry's logits as float32; -inf for forbidden tokens, masked stop ids and past the vocabulary."""
    logits_ptr, vocab_size, bits_ptr, first_word, stop_ids_ptr, stop_ids_stride, num_stop_ids = of_entry
    x = load_raw_logits(logits_ptr, index, vocab_size)
    x = forbid_tokens(x, index, vocab_size, bits_ptr, first_word)
    return mask_stop_ids(x, index, stop_ids_ptr, stop_ids_stride, num_stop_ids)
