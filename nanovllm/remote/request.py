"""A request that runs in another process, as its reader sees it."""

import asyncio
from dataclasses import dataclass, field

from nanovllm.engine.request import Completion, Progress, Request, is_last
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestMetrics, RequestOutput
from nanovllm.remote.messages import Add, News
from nanovllm.sampling_params import RequestOutputKind
from nanovllm.text.token_decoder import TokenDecoder


@dataclass(slots=True)
class _Text:
    """The pieces of text that the engine's detokenizer has made."""

    pieces: list[str] = field(default_factory=list)


class RemoteRequest:
    """Takes a request's news, and makes its outputs. All of it is of one event loop.

    It has copies of the request's sequences, which grow by what the news bring; no engine knows them. Outputs are built
    of them as they are in the engine's own process. A reader that falls behind gets one output with all it has missed.

    Attributes:
        engine_index: where it runs.
        is_finished: no news come any more.
    """

    def __init__(self, add: Add, engine_index: int, decoder: TokenDecoder | None) -> None:
        self.key, self.engine_index, self.is_finished = add.key, engine_index, False
        params = add.params
        seqs = [
            Sequence(add.request_id, list(add.token_ids), params, 0, frozenset(), {}, seed=0) for _ in range(params.n)
        ]
        self._request = Request(
            request_id=add.request_id,
            prompt=add.text,
            prompt_token_ids=add.token_ids,
            params=params,
            completions=[Completion(seq, None) for seq in seqs],
            metrics=RequestMetrics(add.arrival_time),
            output_kind=params.output_kind,
            decoder=decoder if params.detokenize else None,
        )
        self._latest: list[Progress] | BaseException | None = None
        self._has_news = asyncio.Event()

    def take(self, news: News) -> None:
        """Remember what is new, and wake the reader."""
        if isinstance(news.of, BaseException):
            return self.fail(news.of)
        request = self._request
        if news.start is not None:
            seq = request.completions[0].seq
            seq.num_cached_tokens, seq.prompt_logprobs = news.start
        if news.metrics is not None:
            request.metrics = news.metrics
        for completion, (now, token_ids, pieces, logprobs) in zip(request.completions, news.of, strict=True):
            seq = completion.seq
            seq.token_ids += token_ids
            seq.logprobs += logprobs
            seq.finish_reason, seq.stop_reason = now.finish_reason, now.stop_reason
            if pieces is not None:
                completion.detokenizer = completion.detokenizer or _Text()
                completion.detokenizer.pieces += pieces
        progress = [advance[0] for advance in news.of]
        self.is_finished = is_last(progress)
        if self.is_finished or request.output_kind is not RequestOutputKind.FINAL_ONLY:
            self._latest = progress
            self._has_news.set()

    def fail(self, error: BaseException) -> None:
        """The reader gets this error, after which nothing comes."""
        self.is_finished, self._latest = True, error
        self._has_news.set()

    async def next_output(self) -> RequestOutput:
        """Wait for something new. `AsyncLLM.generate` yields these, up to one that is finished. Raises its error."""
        await self._has_news.wait()
        self._has_news.clear()
        if isinstance(self._latest, BaseException):
            raise self._latest
        return self._request.output(self._latest)
