"""The threshold from which on a truncation keeps logits, found by bisection instead of a sort. For `sample_kernel.py`.

A threshold is an integer of the same order as float32 logits, shortened to the bits that the logits' dtype has. So a
bisection ends, and ends exactly, after at most 16 or 32 passes over the tokens. A bisection for a mass may take some
more; usually it takes 6.
"""

from nanovllm.kernels.sampling.sample_row import load_logits
from nanovllm.kernels.triton_shim import tl, triton

# A bisection for a mass first picks its middle by the masses, then halves the interval of logits, and after that the
# interval of integers, which ends in any case.
PASSES_BY_MASS, PASSES_BY_VALUE = tl.constexpr(8), tl.constexpr(20)


@triton.jit
def load_tokens(place, source, num_tokens, is_collected, MAX_CANDIDATES: tl.constexpr):
    """Load logits and indices of the collected tokens, or of the whole vocabulary."""
    of_entry, vocab_size, collected_ptr, top, to_exponent = source
    if is_collected:
        inside = place < num_tokens
        x = tl.load(collected_ptr + place, mask=inside, other=float("-inf"))
        index = tl.load(collected_ptr + MAX_CANDIDATES + place, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    else:
        x = load_logits(of_entry, place)
        index = place
    return x, index


@triton.jit
def order(x):
    """int32 of the same order as the float32 x, with -0 equal to 0; the low bits that are 0 in x stay 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _middle(low, high):
    return (low.to(tl.int64) + (high.to(tl.int64) - low) // 2).to(tl.int32)


@triton.jit
def least_logit(key, LOW_BITS: tl.constexpr):
    """The least logit whose shortened `order` is the key: exactly the logits from it on reach the key."""
    bits = tl.where(key < 0, -key, key) << LOW_BITS
    value = bits.to(tl.float32, bitcast=True)
    return tl.where(key < 0, -value, value)


@triton.jit
def _middle_by_value(low, high, mass_low, mass_high, wanted_mass, widest, LOW_BITS: tl.constexpr):
    """The next threshold to try (ITP method: Oliveira & Takahashi, 2020, ACM TOMS 47(1)).

    It is where the mass would be as wanted if it fell evenly with the logit, moved a little towards the middle, so that
    both ends come closer. With `widest` 0 it is the very middle.
    """
    first, last = least_logit(low, LOW_BITS), least_logit(high, LOW_BITS)
    half = 0.5 * first + 0.5 * last
    width = last - first
    even = first + width * ((mass_low - wanted_mass) / tl.maximum(mass_low - mass_high, 1e-30))
    inward = tl.minimum(0.2 * width * (width / widest), tl.abs(half - even))
    even += tl.where(half > even, inward, -inward)
    middle = order(tl.where(widest > 0, even, half)) >> LOW_BITS
    return tl.minimum(tl.maximum(middle, low + 1), high - 1)


@triton.jit
def kth_largest(orders, k, LOWEST: tl.constexpr):
    """The k-th largest of `orders`, or a lower bound of it that at most 2 k of them reach."""
    low = tl.full([], LOWEST, tl.int32)
    high = tl.max(orders, axis=0) + 1
    while high > low + 1:
        middle = _middle(low, high)
        count = tl.sum((orders >= middle).to(tl.int32), axis=0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count < k, middle, tl.where(count <= 2 * k, low + 1, high))
    return low


@triton.jit
def count_and_mass_from(
    threshold, source, num_tokens, is_collected,
    LOW_BITS: tl.constexpr, MAX_CANDIDATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many tokens reach the threshold, and their mass, where the likeliest token weighs 1."""
    of_entry, vocab_size, collected_ptr, top, to_exponent = source
    limit = least_logit(threshold, LOW_BITS)
    if is_collected:
        place = tl.arange(0, MAX_CANDIDATES)
        x = tl.load(collected_ptr + place, mask=place < num_tokens, other=float("-inf"))
        reaches = x >= limit
        num_reaching = tl.sum(reaches.to(tl.int32), axis=0)
        total = tl.sum(tl.where(reaches, tl.exp2((x - top) * to_exponent), 0.0), axis=0)
    else:
        lane = tl.arange(0, TILE)
        count = tl.zeros([TILE], tl.int32)
        mass = tl.zeros([TILE], tl.float32)
        for start in range(0, vocab_size, TILE):
            x = load_logits(of_entry, start + lane)
            reaches = x >= limit
            count += reaches.to(tl.int32)
            mass += tl.where(reaches, tl.exp2((x - top) * to_exponent), 0.0)
        num_reaching, total = tl.sum(count, axis=0), tl.sum(mass, axis=0)
    return num_reaching, total


@triton.jit
def bisect(
    low, high, count_low, mass_low, mass_high, wanted_count, wanted_mass, source, num_tokens, is_collected,
    BY_MASS: tl.constexpr, LOW_BITS: tl.constexpr, MAX_CANDIDATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The highest threshold that enough tokens, or enough mass, reach. The caller knows that enough reach `low`.

    `count_low`, `mass_low` and `mass_high` may be rough, but `count_low` not too small.
    """
    count_high = tl.full([], 0, tl.int32)
    num_passes = tl.full([], 0, tl.int32)
    widest = least_logit(high, LOW_BITS) - least_logit(low, LOW_BITS)
    while (high > low + 1) & (count_low > count_high + 1):
        middle = _middle(low, high)
        if BY_MASS and num_passes < PASSES_BY_VALUE:
            scale = tl.where(num_passes < PASSES_BY_MASS, widest, 0.0)
            middle = _middle_by_value(low, high, mass_low, mass_high, wanted_mass, scale, LOW_BITS)
        num_passes += 1
        count, mass = count_and_mass_from(middle, source, num_tokens, is_collected, LOW_BITS, MAX_CANDIDATES, TILE)
        if BY_MASS:
            is_enough = mass >= wanted_mass
        else:
            is_enough = count >= wanted_count
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
        count_low = tl.where(is_enough, count, count_low)
        count_high = tl.where(is_enough, count_high, count)
        mass_low = tl.where(is_enough, mass, mass_low)
        mass_high = tl.where(is_enough, mass_high, mass)
        if not BY_MASS:
            high = tl.where(count_low == wanted_count, low + 1, high)
    return low
