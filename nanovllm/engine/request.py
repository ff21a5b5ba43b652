"""A request, and the outputs that its reader takes.

The engine's thread makes tokens and pieces of text. After each step it reports how many there are, as a `Progress`,
whose cost does not grow with the text. The reader, perhaps in another thread, builds an output from the latest
`Progress`. That needs no lock: ids, pieces and log-probabilities are lists that only grow, and entries that a
`Progress` counts never change. An output that no reader takes is never built. One that is taken belongs to its reader,
who may change it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import NamedTuple

from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.text.detokenizer import Detokenizer, decode_all
from nanovllm.text.token_decoder import NUM_CONTEXT, TokenDecoder


class Progress(NamedTuple):
    """How far a completion had come at one moment."""

    num_tokens: int = 0
    num_pieces: int = 0  # of its text; its end may be kept back
    num_chars: int = 0  # that the reader may see
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True, eq=False)
class Completion:
    """One of a request's n completions. Only the reader touches the last three fields."""

    seq: Sequence
    detokenizer: Detokenizer | None  # None: its text is made at the end, or never
    num_read: int = 0  # output tokens that the detokenizer has read
    delivered: Progress = Progress()  # of the last output
    text: str = ""  # with CUMULATIVE all so far; with DELTA the text made but not delivered
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)  # delivered so far, unless DELTA

    def readable_ids(self, start: int = 0) -> list[int]:
        """The output tokens from `start` on that become text: not a stop token, unless the request includes it."""
        seq = self.seq
        ids = seq.token_ids[seq.num_prompt_tokens + start :]
        ended_by_token = seq.finish_reason == "stop" and not isinstance(seq.stop_reason, str)
        return ids[:-1] if ended_by_token and not seq.params.include_stop_str_in_output else ids

    def progress(self) -> Progress:
        seq, text = self.seq, self.detokenizer
        return Progress(
            len(seq.token_ids) - seq.num_prompt_tokens,
            len(text.pieces) if text else 0,
            text.num_chars if text else 0,
            seq.cumulative_logprob,
            seq.finish_reason,
            seq.stop_reason,
        )


@dataclass(slots=True, eq=False)
class Request:
    """A caller's prompt with its n completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    completions: list[Completion]
    metrics: RequestMetrics
    output_kind: RequestOutputKind
    decoder: TokenDecoder | None  # None: the request gets no text
    has_news: bool = False  # since its last output
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def is_finished(self) -> bool:
        first, *others = self.completions
        return first.seq.is_finished and all(completion.seq.is_finished for completion in others)

    @property
    def has_output(self) -> bool:
        """Whether the reader should take an output now."""
        return self.has_news and (self.is_finished or self.output_kind is not RequestOutputKind.FINAL_ONLY)

    def progress(self) -> list[Progress]:
        """How far its completions have come. The thread that runs the engine calls this between two steps."""
        return [completion.progress() for completion in self.completions]

    def output(self, progress: list[Progress]) -> RequestOutput:
        """All tokens and text as of `progress`; with DELTA only what is new since the last output.

        Only the reader calls this, in any thread, each time with a later progress.
        """
        is_delta = self.output_kind is RequestOutputKind.DELTA
        is_first = not self.completions[0].delivered.num_tokens
        self._make_texts()
        if self.prompt_logprobs is None and is_first:
            seq = self.completions[0].seq
            values = seq.prompt_logprobs
            if values is not None and len(values) == len(self.prompt_token_ids):  # all have arrived
                self.prompt_logprobs = [v and self._logprobs(v, seq.token_ids, i) for i, v in enumerate(values)]
        self.metrics.num_generation_tokens = sum(completion.num_tokens for completion in progress)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs if is_first or not is_delta else None,
            outputs=[
                self._completion(index, completion, now, is_delta)
                for index, (completion, now) in enumerate(zip(self.completions, progress, strict=True))
                if not is_delta or now != completion.delivered
            ],
            finished=is_last(progress),
            num_cached_tokens=self.completions[0].seq.num_cached_tokens,
            metrics=replace(self.metrics),
        )

    def _make_texts(self) -> None:
        """Make the texts of completions without a detokenizer: their only output comes after the last token."""
        pending = [completion for completion in self.completions if completion.detokenizer is None]
        if self.decoder is not None and pending:
            context = self.decoder.context(self.prompt_token_ids, self.params)
            ids = [completion.readable_ids() for completion in pending]
            for completion, text in zip(pending, decode_all(self.decoder, ids, context, self.params), strict=True):
                completion.text = text

    def _completion(self, index: int, completion: Completion, now: Progress, is_delta: bool) -> CompletionOutput:
        seq, since = completion.seq, completion.delivered
        completion.delivered = now
        start = seq.num_prompt_tokens + (since.num_tokens if is_delta else 0)
        return CompletionOutput(
            index=index,
            text=self._text(completion, since, now, is_delta),
            token_ids=seq.token_ids[start : seq.num_prompt_tokens + now.num_tokens],
            cumulative_logprob=now.cumulative_logprob,
            logprobs=self._logprobs_of(completion, since, now, is_delta),
            finish_reason=now.finish_reason,
            stop_reason=now.stop_reason,
        )

    def _text(self, completion: Completion, since: Progress, now: Progress, is_delta: bool) -> str:
        if completion.detokenizer is None:
            return completion.text
        text = completion.text + "".join(completion.detokenizer.pieces[since.num_pieces : now.num_pieces])
        num_shown = now.num_chars - since.num_chars if is_delta else now.num_chars
        completion.text = text[num_shown:] if is_delta else text
        return text[:num_shown]

    def _logprobs_of(
        self, completion: Completion, since: Progress, now: Progress, is_delta: bool
    ) -> list[dict[int, Logprob]] | None:
        if self.params.logprobs is None:
            return None
        seq = completion.seq
        places = range(since.num_tokens, now.num_tokens)
        new = [self._logprobs(seq.logprobs[i], seq.token_ids, seq.num_prompt_tokens + i) for i in places]
        if is_delta:
            return new
        completion.logprobs += new
        return list(completion.logprobs)  # the output copies its dicts when the reader looks at them

    def _logprobs(self, values: TokenLogprobs, token_ids: list[int], place: int) -> dict[int, Logprob]:
        """At one place of `token_ids`: first the token there, then the likeliest tokens, best first."""
        texts: Iterable[str | None] = repeat(None)
        if self.decoder is not None:
            before = token_ids[max(0, place - NUM_CONTEXT) : place]
            texts = self.decoder.token_texts(values.token_ids, before)
        entries = zip(values.token_ids, values.logprobs, values.ranks, texts, strict=False)
        return {token_id: Logprob(logprob, rank, text) for token_id, logprob, rank, text in entries}


def is_last(progress: list[Progress]) -> bool:
    """Whether all completions are finished, so that no later progress comes."""
    return all(completion.finish_reason is not None for completion in progress)
