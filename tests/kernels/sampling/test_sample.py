"""Promises of the sampler, kept by the kernels (interpreted on a CPU), the CPU's version and the reference."""

import math
import random
from itertools import cycle

import numpy as np
import pytest
import torch
from drawn_from import assert_drawn_from

from nanovllm.kernels.sampling import cpu_sample, sample_kernel
from nanovllm.kernels.sampling.cpu_sample import sample_cpu
from nanovllm.kernels.sampling.reference import distribution, sample_reference
from nanovllm.kernels.sampling.sample import sample
from nanovllm.kernels.sampling.sample_kernel import sample_triton
from nanovllm.kernels.sampling.tensors import SamplingTensors, TokenBits
from nanovllm.sampling_params import MAX_STOP_IDS, MIN_TEMPERATURE, NAN_LOGITS, NO_TOKEN_LEFT

FUNCTIONS = [sample_triton, sample_cpu, sample_reference]
POISON = -77
DEFAULTS = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed_lo": 0,
    "seed_hi": 0,
    "min_len": 0,
    "stop_ids": (),
}
TRUNCATIONS = [
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.8},
    {"top_p": 0.9, "min_p": 0.03},
    {"top_k": 8, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
]


class Rows:
    """Parameters as an engine holds them, in columns of one int32 tensor; and the rows' tokens."""

    def __init__(self, asked: list[dict], device: str, width: int = 40) -> None:
        table = torch.full((len(asked), len(DEFAULTS) - 1 + MAX_STOP_IDS), -1, dtype=torch.int32)
        floats = table.view(torch.float32)
        for i, of_row in enumerate(asked):
            values = {**DEFAULTS, **of_row}
            for column, name in enumerate(DEFAULTS):
                if name == "stop_ids":
                    table[i, column : column + len(values[name])] = torch.tensor(values[name])
                else:
                    is_float = isinstance(DEFAULTS[name], float)
                    (floats if is_float else table)[i, column] = values[name]
        table = table.to(device)
        floats = table.view(torch.float32)
        columns = {
            name: (floats if isinstance(default, float) else table)[:, column]
            for column, (name, default) in enumerate(DEFAULTS.items())
        }
        self.params = SamplingTensors(**{**columns, "stop_ids": table[:, len(DEFAULTS) - 1 :]})
        self.token_ids = torch.full((len(asked), 2 * width), POISON, dtype=torch.int32, device=device)[:, ::2]
        self.device = device

    def sample(
        self, function, logits: torch.Tensor, rows: list[int], positions: list[int], may_lack: bool = False
    ) -> list[int]:
        """The drawn tokens. Checks that the rows got them and nothing else. `may_lack`: or 0, for an entry without."""
        expected = self.token_ids.clone()
        out = torch.full((len(logits),), POISON, dtype=torch.int32, device=self.device)
        # More sequences than entries: the rest of the step does not sample.
        on_device = [torch.tensor([*x, 0, 1], dtype=torch.int32, device=self.device) for x in (rows, positions)]
        before = logits.clone()
        function(logits, *on_device, self.params, self.token_ids, out)
        tokens = out.tolist()
        for token, row, position in zip(tokens, rows, positions, strict=True):
            assert (0 <= token or may_lack) and token < logits.shape[1]
            if row >= 0:
                expected[row, position] = max(token, 0)
            else:
                assert token == 0
        assert torch.equal(self.token_ids, expected)
        assert torch.equal(logits.view(torch.uint8), before.view(torch.uint8))
        return tokens


def draw_logits(seed: int, entries: int, vocab_size: int, dtype: torch.dtype, scale: float, device: str):
    """Rows of a wider tensor, so that the vocabulary is no multiple of anything and rows are strided."""
    wide = torch.randn(entries, vocab_size + 3, generator=torch.Generator().manual_seed(seed)) * scale
    return wide.to(device, dtype)[:, :vocab_size]


def exact_distribution(logits: torch.Tensor, asked: dict, is_short: bool = False) -> torch.Tensor:
    """Probabilities of one row, float64."""
    asked = {**DEFAULTS, **asked}
    x = logits.detach().cpu().double().clone()
    if is_short:
        x[list(asked["stop_ids"])] = -math.inf
    return distribution(x, asked["temperature"], asked["top_k"], asked["top_p"], asked["min_p"])


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.5}, {"temperature": 3.0}, *TRUNCATIONS])
@pytest.mark.parametrize("vary", ["position", "seed"])
@pytest.mark.parametrize("function", [sample_triton] if torch.cuda.is_available() else [sample_cpu, sample_reference])
def test_draws_have_the_distribution_that_was_asked_for(function, asked: dict, vary: str, device: str):
    num_draws = 40_000 if device == "cuda" else 2000
    logits = draw_logits(3, 1, 50, torch.float32, 1.5, device)
    num_rows = num_draws if vary == "seed" else 1
    rows = Rows([{**asked, "seed_lo": i} for i in range(num_rows)], device, width=num_draws + 1)
    if vary == "seed":
        rows.token_ids = rows.token_ids[:, :10]
    numbers = list(range(num_draws))
    which = (numbers, [7] * num_draws) if vary == "seed" else ([0] * num_draws, numbers)
    tokens = rows.sample(function, logits.expand(num_draws, -1), *which)
    assert_drawn_from(tokens, exact_distribution(logits[0], asked))


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "scale"),
    [
        (1, torch.float32, 1.0),
        (37, torch.float32, 4.0),
        (37, torch.bfloat16, 0.3),
        (1000, torch.float16, 4.0),
        (1000, torch.bfloat16, 4.0),
        (1000, torch.float32, 0.3),
        (2049, torch.bfloat16, 0.3),
        (5001, torch.float32, 4.0),
    ],
)
def test_fast_versions_draw_what_the_reference_draws(vocab_size: int, scale: float, dtype: torch.dtype, device: str):
    rng = random.Random(vocab_size)
    asked = [{"temperature": 0.0}, {"temperature": 1.0}, *TRUNCATIONS, {"top_k": 150}]
    for of_row in asked:
        of_row = of_row | {"seed_lo": rng.getrandbits(31), "seed_hi": -rng.getrandbits(31)}
        stop_ids = rng.sample(range(vocab_size), min(3, vocab_size))
        logits = draw_logits(vocab_size, 2, vocab_size, dtype, scale, device)
        drawn = []
        for function in FUNCTIONS:
            rows = Rows([of_row, of_row | {"stop_ids": stop_ids, "min_len": 9}], device)
            all_masked = len(stop_ids) == vocab_size
            drawn.append(rows.sample(function, logits, [1, 0], [8, 30], may_lack=all_masked))
        assert drawn[0] == drawn[1] == drawn[2], of_row


@pytest.mark.parametrize("scale", [0.0, 0.5, 6.0])
@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, 0.7, 50.0])
def test_a_program_with_many_tiles_draws_what_the_reference_draws(
    scale: float, temperature: float, device: str, monkeypatch: pytest.MonkeyPatch
):
    """Many entries give each program many tiles. All versions must agree that MIN_TEMPERATURE is not below itself."""
    monkeypatch.setattr(sample_kernel, "TARGET_PROGRAMS", 1)
    monkeypatch.setattr(sample_kernel, "SCAN_TILE", 64 if device == "cpu" else 2048)
    vocab_size, entries = (700, 6) if device == "cpu" else (60_000, 500)
    logits = draw_logits(3, 1, vocab_size, torch.bfloat16, scale, device)
    logits[0, vocab_size // 3] = -math.inf
    drawn = [
        Rows([{"temperature": temperature}], device, width=600).sample(
            function, logits.expand(entries, -1), [0] * entries, list(range(entries))
        )
        for function in FUNCTIONS
    ]
    assert drawn[0] == drawn[1] == drawn[2]
    assert temperature < 0.5 or len(set(drawn[0])) > 1


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("asked", TRUNCATIONS)
def test_only_tokens_of_the_truncated_support_are_drawn(function, asked: dict, device: str):
    logits = draw_logits(5, 1, 300, torch.bfloat16, 2.0, device)
    rows = Rows([asked | {"stop_ids": [int(logits.argmax())], "min_len": 20}], device)
    positions = list(range(15, 24)) if device == "cpu" else list(range(40))
    for is_short in (True, False):
        chosen = [p for p in positions if (p < 20) is is_short]
        p = exact_distribution(logits[0], asked | {"stop_ids": [int(logits.argmax())]}, is_short)
        tokens = rows.sample(function, logits.expand(len(chosen), -1), [0] * len(chosen), chosen)
        assert (p[tokens] > 0).all()
        if p.max() < 0.5:
            assert len(set(tokens)) > 1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_temperature_0_is_the_first_of_the_largest(function, device: str):
    logits = draw_logits(1, 3, 5000, torch.bfloat16, 1.0, device)
    logits[0, [4999, 4100, 17]] = 9.0
    logits[1, 4096:] = 8.0
    rows = Rows([{"temperature": 0.0, "seed_lo": i, "top_k": i, "top_p": 0.5} for i in range(3)], device)
    tokens = rows.sample(function, logits, [2, 0, 1], [0, 5, 5])
    assert tokens == [17, 4096, int((logits[2] == logits[2].max()).nonzero()[0])]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("asked", [{}, {"temperature": 0.0}, *TRUNCATIONS])
def test_a_draw_depends_on_its_seed_position_and_logits_alone(function, asked: dict, device: str):
    logits = draw_logits(2, 4, 700, torch.float32, 1.0, device)
    crowd = Rows([{"temperature": 0.0}, asked | {"seed_hi": 3}, {}, {"top_p": 0.1}], device)
    alone = Rows([asked | {"seed_hi": 3}], device)
    tokens = crowd.sample(function, logits, [3, 1, -1, 0], [9, 20, 0, 4])
    assert tokens[1:2] == alone.sample(function, logits[1:2].clone(), [0], [20])
    if asked == {}:
        others = alone.sample(function, logits[1:2].expand(12, -1), [0] * 12, list(range(21, 33)))
        assert len(set(others)) > 6


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}])
def test_stop_ids_are_not_drawn_before_the_minimal_length(function, temperature: float, truncation, device: str):
    logits = torch.zeros(2, 100, device=device)
    logits[:, :40] = 30.0
    logits[:, 64] = 20.0  # the likeliest that is left
    stop_ids = [*range(40)]
    rows = Rows([truncation | {"temperature": temperature, "stop_ids": stop_ids, "min_len": 7}], device)
    early, late = (rows.sample(function, logits[:1], [0], [position])[0] for position in (6, 7))
    assert early == 64 and late < 40
    full = Rows([truncation | {"temperature": temperature, "stop_ids": range(64), "min_len": 7}], device)
    assert full.sample(function, logits, [0, -1], [6, 0]) == [64, 0]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_ties_at_a_threshold_are_all_kept(function, device: str):
    logits = torch.full((1, 250), -9.0, device=device)
    logits[0, [3, 70, 240]] = 2.0
    logits[0, 9] = 3.0
    num_draws = 10
    for asked, support in (
        ({"top_k": 2}, {3, 9, 70, 240}),
        ({"top_k": 4, "top_p": 0.7}, {3, 9, 70, 240}),  # weights e, 1, 1, 1
        ({"top_k": 4, "top_p": 0.4}, {9}),
        ({"min_p": 0.3}, {3, 9, 70, 240}),
    ):
        rows = Rows([asked], device)
        tokens = rows.sample(function, logits.expand(num_draws, -1), [0] * num_draws, list(range(num_draws)))
        assert set(tokens) == support, asked
    flat = torch.zeros(1, 1100, device=device)  # more than the kernel collects
    flat[:, ::2] = -0.0
    for asked in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}):
        tokens = Rows([asked], device).sample(function, flat.expand(5, -1), [0] * 5, list(range(5)))
        assert len(set(tokens)) > 3 and {token % 2 for token in tokens} == {0, 1}, asked


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_threshold_between_two_bfloat16_numbers_is_not_rounded_to_one(function, device: str):
    logits = torch.full((6, 40), 7.96875, dtype=torch.bfloat16, device=device)
    logits[:, 30] = 8.0
    rows = Rows([{"min_p": math.exp(-0.02)}], device)  # 7.98 is kept; the nearest bfloat16 number is 7.96875
    assert rows.sample(function, logits, [0] * 6, list(range(6))) == [30] * 6


@pytest.mark.parametrize("asked", [{"min_p": 0.1}, {"min_p": 0.05, "top_p": 0.8}, {"top_k": 1300}, {"top_p": 0.7}])
def test_fast_versions_draw_what_the_reference_draws_when_more_is_kept_than_collected(asked: dict, device: str):
    logits = draw_logits(9, 1, 8200, torch.bfloat16, 0.8, device)
    assert int((exact_distribution(logits[0], asked) > 0).sum()) > sample_kernel.MAX_CANDIDATES
    numbers = list(range(4))
    drawn = [Rows([asked], device).sample(function, logits.expand(4, -1), [0] * 4, numbers) for function in FUNCTIONS]
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "asked", [{}, {"temperature": 0.0}, {"temperature": 1e38}, {"temperature": 1e-30}, *TRUNCATIONS]
)
def test_minus_infinity_is_never_drawn(function, asked: dict, device: str):
    logits = torch.full((3, 300), -math.inf, device=device)
    logits[:, 210] = -1e30
    rows = Rows([asked], device)
    assert rows.sample(function, logits, [0] * 3, list(range(3))) == [210] * 3
    logits[:, 17] = -1e30
    assert set(rows.sample(function, logits, [0] * 3, list(range(3)))) <= {17, 210}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("asked", "dtype"),
    zip(
        [{}, {"temperature": 0.0}, {"min_len": 99, "stop_ids": [50, 60]}, *TRUNCATIONS, {}, {"temperature": 0.0}],
        cycle([torch.bfloat16, torch.float32, torch.float32]),
        strict=False,
    ),
    ids=str,
)
def test_an_entry_without_a_token_to_draw_is_noticed_and_its_neighbours_are_not(function, asked, dtype, device: str):
    logits = draw_logits(8, 7, 5000, dtype, 1.0, device)
    rows = Rows([asked], device)
    clean = rows.sample(function, logits, [0] * 7, list(range(7)))
    logits[0] = math.nan
    logits[1] = -math.inf
    logits[2, 50] = math.nan
    logits[3, 61] = math.inf
    logits[4, 4999] = -math.nan
    drawn = rows.sample(function, logits, [0] * 7, list(range(7)), may_lack=True)
    assert drawn == [NAN_LOGITS, NO_TOKEN_LEFT, NAN_LOGITS, 61, NAN_LOGITS, *clean[5:]]
    assert rows.token_ids[0, :5].tolist() == [0, 0, 0, 61, 0]  # the step in flight reads them


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("asked", [{"temperature": 0.0}, {}, {"top_k": 5}])
def test_a_row_whose_every_token_is_masked_has_none_to_draw(function, asked: dict, device: str):
    logits = torch.full((1, 300), -math.inf, device=device)
    logits[:, [7, 9]] = 1.0
    rows = Rows([{"min_len": 2, "stop_ids": [9, 7], **asked}], device)
    assert rows.sample(function, logits, [0], [1], may_lack=True) == [NO_TOKEN_LEFT]
    assert rows.sample(function, logits, [0], [2])[0] in (7, 9)


def sample_under_masks(
    function, rows: Rows, logits: torch.Tensor, entries: list[int], is_allowed: torch.Tensor
) -> tuple[list[int], list[list[int]]]:
    """Draw at positions 8, 9, …: all entries' tokens, and all rows'. Entry i has row i, but the last of 5 has none."""
    padded = np.ones((len(entries), -(-logits.shape[1] // 32) * 32 + 64), dtype=np.uint8)
    padded[:, : logits.shape[1]] = is_allowed.numpy()
    bits = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32)).to(rows.device)
    out = torch.full((5,), POISON, dtype=torch.int32, device=rows.device)
    live, positions = (torch.tensor(x, dtype=torch.int32, device=rows.device) for x in ([0, 1, 2, 3, -1], range(8, 13)))
    masks = TokenBits(torch.tensor(entries, device=rows.device), bits)
    function(logits, live, positions, rows.params, rows.token_ids, out, masks)
    return out.tolist(), rows.token_ids.tolist()


@pytest.mark.parametrize("function", [*FUNCTIONS, sample])
@pytest.mark.parametrize(
    "asked", [{}, {"temperature": 0.0}, {"min_len": 99, "stop_ids": [5, 6]}, *TRUNCATIONS], ids=str
)
@pytest.mark.parametrize(("vocab_size", "dtype"), [(50, torch.float32), (5000, torch.bfloat16)])
def test_a_draw_under_a_mask_is_the_draw_from_masked_logits(
    function, asked: dict, vocab_size: int, dtype: torch.dtype, device: str
):
    """Only entries that have a mask draw, and forbidden tokens count for no truncation."""
    logits = draw_logits(6, 5, vocab_size, dtype, 2.0, device)
    entries = [3, 0, 4, 2]
    is_allowed = torch.rand(4, vocab_size, generator=torch.Generator().manual_seed(1)) < 0.3
    is_allowed[1] = torch.arange(vocab_size) == 41
    masked = logits.clone()
    for entry, allowed in zip(entries, is_allowed, strict=True):
        masked[entry, ~allowed.to(device)] = -math.inf
    rows, expected = (Rows([{**asked, "seed_lo": i} for i in range(4)], device) for _ in range(2))
    tokens = expected.sample(function, masked, [0, 1, 2, 3, -1], list(range(8, 13)))
    drawn, of_rows = sample_under_masks(function, rows, logits, entries, is_allowed)
    assert drawn == [tokens[0], POISON, *tokens[2:]] and drawn[0] == 41 and drawn[4] == 0
    expected.token_ids[1] = POISON
    assert of_rows == expected.token_ids.tolist()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("asked", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_a_mask_hides_no_nan_and_may_leave_no_token(function, asked: dict, device: str):
    logits = draw_logits(6, 5, 300, torch.bfloat16, 2.0, device)
    logits[0, 7] = math.nan
    logits[2, 9] = math.inf
    is_allowed = torch.ones(4, 300, dtype=torch.bool)
    is_allowed[0, 7] = False
    is_allowed[1] = False
    is_allowed[2, 9] = False
    drawn, of_rows = sample_under_masks(function, Rows([asked] * 4, device), logits, [0, 1, 2, 3], is_allowed)
    assert drawn[:2] == [NAN_LOGITS, NO_TOKEN_LEFT] and 0 <= drawn[2] != 9
    assert of_rows[0][8] == of_rows[1][9] == 0


@pytest.mark.parametrize("function", [*FUNCTIONS, sample])
def test_no_entries_give_no_tokens(function, device: str):
    assert Rows([{}], device).sample(function, torch.zeros(0, 300, device=device), [], []) == []


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("likely_chunks", [cpu_sample.LIKELY_CHUNKS, 1])  # with one, most draws need a second look
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cpu_looks_at_few_tokens_and_draws_what_looking_at_all_does(scale, dtype, likely_chunks: int, monkeypatch):
    monkeypatch.setattr(cpu_sample, "LIKELY_CHUNKS", likely_chunks)
    vocab_size, num_draws = 20_011, 12
    logits = draw_logits(4, 1, vocab_size, dtype, scale, "cpu")
    rows = Rows([{"seed_lo": 5, "temperature": 0.6}], "cpu")
    positions = list(range(num_draws))
    arguments = (logits.expand(num_draws, -1), [0] * num_draws, positions)
    assert rows.sample(sample_cpu, *arguments) == rows.sample(sample_reference, *arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("num_entries", [1, 7, 64, 512])
def test_a_real_vocabulary(num_entries: int, scale: float, dtype: torch.dtype, device: str):
    vocab_size = 151_936
    logits = draw_logits(num_entries, num_entries, vocab_size, dtype, scale, device)
    choices = [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"top_k": 800}, *TRUNCATIONS]
    asked = [{"seed_lo": i, **choices[i % len(choices)]} for i in range(num_entries)]
    order = random.Random(num_entries).sample(range(num_entries), num_entries)
    drawn = []
    for function in (sample_triton, sample_reference):
        drawn.append(Rows(asked, device).sample(function, logits, order, [i % 40 for i in range(num_entries)]))
    differing = [(i, a, b) for i, (a, b) in enumerate(zip(*drawn, strict=True)) if a != b]
    # The reference's numbers are float64, so that now and then two tokens this close change places.
    for i, *tokens in differing:
        p = exact_distribution(logits[i], asked[order[i]])
        assert min(p[tokens]) > 0 or abs(p[tokens[0]] - p[tokens[1]]) < 1e-4 * max(p[tokens])
    assert len(differing) <= 1 + num_entries // 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
def test_a_captured_draw_reads_its_rows_and_parameters_anew(device: str):
    logits = draw_logits(6, 4, 5000, torch.bfloat16, 1.0, device)
    state = Rows(
        [{"seed_lo": i, **choice} for i, choice in enumerate([{}, {"top_k": 9}, {"temperature": 0.0}])], device
    )
    rows, seq_lens, out = (torch.zeros(4, dtype=torch.int32, device=device) for _ in range(3))
    arguments = (logits, rows, seq_lens, state.params, state.token_ids, out)
    sample(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(*arguments)
    for batch, positions in (([2, 1, 0, -1], [3, 1, 4, 0]), ([-1, 0, 1, 2], [0, 5, 6, 7])):
        rows.copy_(torch.tensor(batch))
        seq_lens.copy_(torch.tensor(positions))
        state.params.top_p[0] = 0.5 + 0.1 * positions[1]
        out.fill_(POISON)
        graph.replay()
        assert out.tolist() == state.sample(sample_reference, logits, batch, positions)
