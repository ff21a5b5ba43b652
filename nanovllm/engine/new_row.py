"""What the device must know of a sequence that enters the batch: its request's parameters as a row can hold them."""

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import MAX_STOP_IDS
from nanovllm.step_plan import LogitEdits, NewRow

# The largest numbers that a row can hold
INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4e38


def new_row(seq: Sequence) -> NewRow:
    """The row of a sequence that was just admitted, and so has its blocks."""
    params = seq.params
    stop_ids = sorted(seq.stop_ids) if params.min_tokens else []
    min_len = min(seq.num_prompt_tokens + params.min_tokens, seq.max_len) if params.min_tokens else 0
    fits = len(stop_ids) <= MAX_STOP_IDS
    return NewRow(
        row=seq.row,
        token_ids=seq.token_ids,
        num_computed_tokens=seq.num_computed_tokens,
        block_tables=seq.block_tables,
        temperature=min(params.temperature, FLOAT32_MAX),
        top_k=min(params.top_k, INT32_MAX),
        top_p=params.top_p,
        min_p=params.min_p,
        seed=seq.seed,
        min_len=min_len,
        stop_ids=stop_ids if fits else [],
        edits=_edits(seq, () if fits else tuple(stop_ids), min_len),
    )


def _edits(seq: Sequence, held_back: tuple[int, ...], min_len: int) -> LogitEdits | None:
    """How the sequence edits its logits; None if it does not, as most."""
    params = seq.params
    if params.structured_outputs is not None and seq.grammar is None:
        raise RuntimeError(
            f"sequence {seq.request_id} has structured_outputs without a grammar: TextEngine gives it one"
        )
    edits = LogitEdits(
        prompt_len=seq.num_prompt_tokens,
        repetition_penalty=min(params.repetition_penalty, FLOAT32_MAX),
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=params.logit_bias or None,
        allowed_token_ids=params.allowed_token_ids,
        bad_words=seq.bad_words,
        held_back=held_back,
        min_len=min_len,
        has_grammar=seq.grammar is not None,
    )
    return edits if edits.has_any else None
