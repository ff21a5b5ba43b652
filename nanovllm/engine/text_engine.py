"""Prompts become sequences, whose tokens become text. `LLM` and `AsyncLLM` are two fronts of this.

A request has a sequence for each of its n completions; the engine knows only sequences. Text is made after the step
that follows has been launched, so while the device works. If neither a stop string nor a reader of a stream waits for
it, it is made once, of all tokens, when the output is taken (`engine/request.py`).
"""

import time
from collections.abc import Iterable
from hashlib import blake2b
from numbers import Integral
from typing import Any

from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Completion, Request
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestMetrics
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.text.bad_words import bad_word_ids
from nanovllm.text.detokenizer import Detokenizer
from nanovllm.text.surrogates import refuse_surrogates
from nanovllm.text.token_decoder import NO_CONTEXT, TokenDecoder

Prompt = str | list[int] | dict[str, Any]

# Of vLLM's prompts, besides the text and the ids: taken if they ask for nothing.
ABSENT_PROMPT_KEYS = frozenset(
    ("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs", "cache_salt", "token_type_ids", "prompt_embeds")
)


class TextEngine:
    """An engine with its tokenizer. Not thread-safe, except for `make_request`, beside which the others may run.

    Its books are marked while they are changed, as the engine's are, and put in order by whoever finds them so.
    """

    _is_changing = False

    def __init__(self, config: Config) -> None:
        self.engine = LLMEngine(config)
        try:
            path = str(self.engine.model_path)
            self._tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, path)
            self._decoder = None if self._tokenizer is None else TokenDecoder(self._tokenizer)
            if self._tokenizer is not None:
                self.engine.use_eos_of_tokenizer(self._tokenizer.eos_token_id)
        except BaseException:
            self.engine.close()  # the error's traceback keeps it alive
            raise
        self._requests: dict[str, Request] = {}  # the unfinished
        self._owner: dict[Sequence, tuple[Request, Completion]] = {}

    @property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer. Raises ValueError if the engine was made without one."""
        if self._tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: this engine has no tokenizer; give token ids")
        return self._tokenizer

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        name: str = "prompt",
        request_id: str | None = None,
        is_streaming: bool = False,
    ) -> Request:
        """Check a request and give it its shape; `add` then lets it run.

        `params` are the request's own, as `own_params` gives them: nobody assigns to them any more.
        With n > 1 the completions share the prompt's full blocks through the prefix cache, unless that is switched
        off. The first has the request's seed, the others have seeds that follow from it.

        Raises:
            TypeError, ValueError: naming the prompt as `name`, or the parameter, and what is wrong with it.
        """
        arrival_time = time.monotonic()
        text, token_ids = self.encode(prompt, name)
        for strings in ("stop", "bad_words"):
            for i, string in enumerate(getattr(params, strings)):
                refuse_surrogates(string, f"{strings}[{i}]")
        if request_id is not None:
            refuse_surrogates(request_id, "request_id")
        if params.truncate_prompt_tokens is not None:
            longest = self.engine.max_model_len - 1
            num_kept = longest if params.truncate_prompt_tokens == -1 else params.truncate_prompt_tokens
            token_ids = token_ids[-num_kept:]
        if params.stop and self._tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer, which skip_tokenizer_init=True leaves away")
        seqs = self._make_sequences(token_ids, params, name, request_id)
        request_id = seqs[0].request_id
        for i, seq in enumerate(seqs if params.n > 1 else ()):
            seq.request_id = f"{i}_{request_id}"
        metrics = RequestMetrics(arrival_time)
        for seq in seqs:
            seq.metrics = metrics
        output_kind = params.output_kind if is_streaming else RequestOutputKind.FINAL_ONLY
        decoder = self._decoder if params.detokenize else None
        must_follow = decoder is not None and (bool(params.stop) or output_kind is not RequestOutputKind.FINAL_ONLY)
        context = decoder.context(token_ids, params) if must_follow else NO_CONTEXT
        return Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            completions=[Completion(s, Detokenizer(decoder, params, context) if must_follow else None) for s in seqs],
            metrics=metrics,
            output_kind=output_kind,
            decoder=decoder,
        )

    def _make_sequences(
        self, token_ids: list[int], params: SamplingParams, name: str, request_id: str | None
    ) -> list[Sequence]:
        bad_words = bad_word_ids(params.bad_words, self.tokenizer) if params.bad_words else ()
        make = self.engine.make_sequence
        seqs = [make(token_ids, params, name=name, bad_words=bad_words, request_id=request_id)]
        if params.n > 1:
            params = params.clone()
            params.prompt_logprobs = None  # the prompt's are the same for all
        for i in range(1, params.n):
            seqs.append(make(token_ids, params, name=name, bad_words=bad_words, request_id=seqs[0].request_id))
            if params.seed is not None:
                seqs[i].seed = child_seed(params.seed, i)
        return seqs

    def default_sampling_params(self) -> SamplingParams:
        """How a request is sampled that comes without: fresh, for whoever gets it may change it."""
        return SamplingParams(**self.engine.default_sampling)

    def encode(self, prompt: Prompt, name: str = "prompt") -> tuple[str | None, list[int]]:
        """A prompt's text, if it has one, and a fresh list of its token ids. Raises as `make_request` does."""
        text, token_ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        if isinstance(prompt, dict):
            unknown = prompt.keys() - {"prompt", "prompt_token_ids"} - ABSENT_PROMPT_KEYS
            if unknown or not prompt:
                keys = ", ".join(map(repr, prompt))
                raise ValueError(f"{name} has the keys {keys or 'none'}: it must have 'prompt' or 'prompt_token_ids'")
            for key in prompt.keys() & ABSENT_PROMPT_KEYS:
                if not isinstance(prompt[key], dict | None) or prompt[key]:
                    raise ValueError(f"{name}[{key!r}]={shorten(prompt[key])} must be None: it is not supported")
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if not isinstance(text, str | None):
                raise TypeError(f"{name}['prompt']={shorten(text)} must be a string")
        if text is not None:
            refuse_surrogates(text, name if text is prompt else f"{name}['prompt']")
            if token_ids is None:
                return text, self.tokenizer.encode(text)
        kinds = set(map(type, token_ids)) if isinstance(token_ids, (list, tuple)) else {None}
        if not all(map(is_id_type, kinds)):
            raise TypeError(f"{name}={shorten(prompt)} must be a string or a list of token ids")
        return text, list(token_ids) if kinds <= {int} else list(map(int, token_ids))

    def add(self, request: Request) -> None:
        """Let a request run. Raises ValueError if another of its id is running."""
        if request.request_id in self._requests:
            raise ValueError(f"request_id={request.request_id!r} is that of a request which is still running")
        self._begin_change()
        self._requests[request.request_id] = request
        try:
            for completion in request.completions:
                self._owner[completion.seq] = (request, completion)
                self.engine.add(completion.seq)
        except Exception:
            self._abort([request])
            self._is_changing = False
            raise
        self._is_changing = False

    def find(self, request_ids: Iterable[str]) -> list[Request]:
        """The unfinished requests among those named."""
        return [self._requests[i] for i in request_ids if i in self._requests]

    def abort(self, requests: Iterable[Request]) -> None:
        """End requests before their time. Those that have finished, or were never added, are left alone."""
        self._begin_change()
        self._abort(requests)
        self._is_changing = False

    def _abort(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if self._requests.get(request.request_id) is request:
                self.engine.abort(completion.seq for completion in request.completions)
                for completion in request.completions:
                    if completion.detokenizer is not None:
                        self._follow(completion)
                self._forget(request)

    def step(self) -> list[Request]:
        """Let the engine do a step. Returns the requests whose readers should know of it.

        Those are the requests that got tokens; with FINAL_ONLY the first and the last time.

        If it fails, all requests are aborted, and the error goes on; the next request is served.
        """
        self._begin_change()
        try:
            self.engine.step()
            changed: dict[Request, None] = {}
            now = time.monotonic()
            for seq in self.engine.advanced:
                request, completion = self._owner[seq]
                request.metrics.last_token_time = now
                if completion.detokenizer is not None:
                    self._follow(completion)
                changed[request] = None
            advanced = [request for request in changed if self._has_news(request)]
        except BaseException:
            self._reset()
            raise
        self._is_changing = False
        return advanced

    def _begin_change(self) -> None:
        """As `LLMEngine.begin_change`."""
        if self._is_changing or self.engine.is_changing:
            self._reset()
        self._is_changing = True

    def _reset(self) -> None:
        """Abort all requests, and begin anew: the books may be in any state. May be interrupted, and done again."""
        self._is_changing = True
        self.engine.reset()
        for request in list(self._requests.values()):
            for completion in request.completions:
                if not completion.seq.is_finished:  # the engine had not been given it yet
                    completion.seq.finish("abort")
            self._forget(request)
        self._owner.clear()
        self._is_changing = False

    def _has_news(self, request: Request) -> bool:
        """After a step that has brought it tokens."""
        if request.is_finished:
            self._forget(request)
        elif request.has_news and request.output_kind is RequestOutputKind.FINAL_ONLY:
            return False
        request.has_news = True
        return True

    def _forget(self, request: Request) -> None:
        request.has_news = True
        request.metrics.finished_time = time.monotonic()
        self._requests.pop(request.request_id, None)
        for completion in request.completions:
            self._owner.pop(completion.seq, None)

    def _follow(self, completion: Completion) -> None:
        """Make text of the tokens that have come, and end the sequence if it contains a stop string."""
        seq, text, stop = completion.seq, completion.detokenizer, None
        for token_id in completion.readable_ids(completion.num_read):
            stop = text.append(token_id)
            completion.num_read += 1
            if stop is not None:
                break
        if seq.is_finished and stop is None:
            stop = text.finish()
        if stop is not None and seq.finish_reason != "abort":
            self.engine.finish(seq, "stop", stop)
            del seq.token_ids[seq.num_prompt_tokens + completion.num_read :]


def load_tokenizer(config: Config, model_path: str) -> Any:
    """The `transformers` tokenizer. Raises OSError or ValueError, naming the source, if there is none that works."""
    from transformers import AutoTokenizer

    source = config.tokenizer or model_path
    advice = "give LLM a tokenizer=, or skip_tokenizer_init=True and token ids"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # of many types, few of which name the source
        refusal = OSError if isinstance(error, OSError) else ValueError
        raise refusal(f"the tokenizer in {source} cannot be loaded: {error}; {advice}") from error
    # Of a folder without its files transformers makes a tokenizer with nothing but an EOS.
    if len(tokenizer) <= len(tokenizer.get_added_vocab()) and not tokenizer.encode("a", add_special_tokens=False):
        raise FileNotFoundError(f"no tokenizer in {source}: {advice}")
    return tokenizer


def child_seed(seed: int, index: int) -> int:
    """The seed, 64 bits, of a request's completion number `index`: not near to that of any other request."""
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little")


def is_id_type(kind: type | None) -> bool:
    """Whether its values may be token ids: Python's integers and numpy's, but no truth values."""
    return kind is not None and issubclass(kind, Integral) and not issubclass(kind, bool)


def own_copy(given: Any) -> Any:
    """The dicts and lists that a caller has given and may change before they are read; all else as it is."""
    if isinstance(given, dict):
        return {key: own_copy(value) for key, value in given.items()}
    if not isinstance(given, list):
        return given
    return list(given) if given and is_id_type(type(given[0])) else [own_copy(value) for value in given]


def as_list_of_prompts(prompts: Any) -> list[Prompt]:
    """What `generate` takes, as a list. Raises TypeError."""
    is_list = isinstance(prompts, (list, tuple))
    if isinstance(prompts, (str, dict)) or (is_list and prompts and is_id_type(type(prompts[0]))):
        return [prompts]
    if not is_list:
        raise TypeError(f"prompts={shorten(prompts)} must be a string, a list of token ids, or a list of these")
    return list(prompts)


def own_params(given: Any, name: str = "sampling_params") -> SamplingParams:
    """A request's parameters: checked, and its own, whatever the caller assigns later.

    Raises TypeError, which calls the argument `name`, or ValueError.
    """
    if not isinstance(given, SamplingParams):
        raise TypeError(f"{name}={shorten(given)} must be a SamplingParams")
    return given.clone()


def one_for_each(sampling_params: Any, num_prompts: int) -> list[SamplingParams]:
    """One for all, or one for each prompt, as a list of the caller's objects. Raises TypeError, ValueError."""
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if not isinstance(sampling_params, (list, tuple)) or not all(
        isinstance(p, SamplingParams) for p in sampling_params
    ):
        raise TypeError(f"sampling_params={shorten(sampling_params)} must be a SamplingParams or a list of them")
    if len(sampling_params) != num_prompts:
        raise ValueError(
            f"sampling_params has {len(sampling_params)} entries for {num_prompts} prompts: give one, or one for each"
        )
    return list(sampling_params)


def as_request_ids(request_id: str | Iterable[str]) -> list[str]:
    """What `abort` takes, as a list. Raises TypeError."""
    ids = [request_id] if isinstance(request_id, str) else request_id
    ids = list(ids) if isinstance(ids, Iterable) else [ids]
    if not all(isinstance(i, str) for i in ids):
        raise TypeError(f"request_id={shorten(request_id)} must be a string or a list of strings")
    return ids


def shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
