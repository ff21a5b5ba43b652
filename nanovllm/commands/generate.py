"""`nanovllm generate`: completes prompts from arguments, stdin or a file, and goes on after a crash where it was.

The engine has at most twice as many requests as run at once; the others stay in the input. So files may be larger than
the memory. Results come in the order in which requests end.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanovllm.commands.options import engine_options, sampling_options
from nanovllm.commands.request_lines import Asked, asked_in_json, asked_in_text, error_record, result_record
from nanovllm.commands.results_file import Line, ResultsFile, number_lines
from nanovllm.commands.shared import fail, model_and_options, note, request_params, usage_errors
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM

DEFAULTS = {"max_tokens": 256}
STDIN = Path("-")


@engine_options
@sampling_options(**DEFAULTS)
def generate(
    model: Annotated[str | None, typer.Argument(help="A directory, a GGUF file, or a hub id.")] = None,
    prompts: Annotated[list[str] | None, typer.Argument(help="Without them, each line of stdin is a prompt.")] = None,
    input: Annotated[Path | None, typer.Option(help="A file with a JSON object a line; - is stdin.")] = None,
    output: Annotated[Path | None, typer.Option(help="The file of results; otherwise stdout.")] = None,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Complete prompts, and write a line of JSON for each as soon as it is finished.

    A line of --input has "prompt" (text or token ids) or "messages", or is a line of an OpenAI batch: {"custom_id": …,
    "body": {…}}. A line's keys that are named like a sampling parameter replace the command line's for this line; other
    keys are kept in its result, under "input".

    A result has the line's "index", from 0, and "choices" and "usage" as in OpenAI's API, or "error". Results come in
    the order in which they end. With --seed, line i draws with a seed made of both, so that equal prompts differ and a
    second run draws the same.

    The same command goes on after a crash or Ctrl-C: lines with a result in --output, errors included, do not run
    again. It refuses to go on if the input, the model or the sampling options have changed.

    Exit codes: 0; 1 if lines have errors; 2 if nothing can run; 130 after Ctrl-C.
    """
    from nanovllm.llm import LLM

    with usage_errors():
        source = _source(prompts, input)
        request_params({}, sampling, **DEFAULTS)  # before the model is loaded, which takes its time
        model, options = model_and_options(model, engine)
        key = blake2b(json.dumps([model, sampling], sort_keys=True).encode()).digest()
        results = ResultsFile(output)
    with results:
        with usage_errors():
            num_left = None
            if source.can_be_read_twice:
                num_left = sum(1 for _ in results.unfinished(number_lines(source.lines(), key)))
            llm = None if num_left == 0 else LLM(model, **options)
        if llm is not None:
            with llm:
                _run(llm, source, results, key, sampling, num_left)
        if results.num_errors:
            fail(f'{results.num_errors:,} lines have errors: see "error" in {results.name}', code=1)


@dataclass
class _Source:
    """Where lines come from, and how they are read."""

    lines: Callable[[], Iterable[bytes]]
    read: Callable[[bytes], Asked]
    can_be_read_twice: bool


def _source(prompts: list[str] | None, path: Path | None) -> _Source:
    """Raises ValueError if prompts come from two places, or from a terminal; OSError if there is no such file."""
    if prompts and path is not None:
        raise ValueError("prompts come as arguments or from --input, not both")
    if prompts:
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError(f"prompts={prompts!r:.80} must not be blank")
        lines = [prompt.encode(errors="surrogatepass") for prompt in prompts]
        return _Source(lambda: lines, lambda line: Asked(prompt=line.decode()), can_be_read_twice=True)
    if path is not None and path != STDIN:
        path.stat()
        return _Source(partial(_lines_of_file, path), asked_in_json, can_be_read_twice=path.is_file())  # not a pipe
    if sys.stdin.isatty():
        raise ValueError("there are no prompts: give them behind MODEL, in --input FILE.jsonl, or through a pipe")
    read = asked_in_json if path == STDIN else asked_in_text
    return _Source(lambda: sys.stdin.buffer, read, can_be_read_twice=False)


def _lines_of_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _run(
    llm: "LLM", source: _Source, results: ResultsFile, key: bytes, sampling: dict[str, Any], num_left: int | None
) -> None:
    """Keep the engine busy with the lines that are left, until all have their results."""
    bar = _progress_bar(llm, results, num_left)
    requests = _Requests(llm, source, sampling)
    lines = results.unfinished(number_lines(source.lines(), key))
    try:
        while True:
            while not requests.is_full and (line := _next(lines)) is not None:
                error = requests.add(line)
                if error is not None:
                    results.write(line, error)
                    bar.update(1)
            if not requests.running:
                break
            ended = requests.step()
            for line, record in ended:
                results.write(line, record)
            bar.update(len(ended))
    except KeyboardInterrupt:
        note(f"\nStopped. What is finished is in {results.name}; with --output the same command does the rest.")
        raise
    finally:
        bar.close()


def _next(lines: Iterator[Line]) -> Line | None:
    with usage_errors():  # the input may turn out to be another than that of the results
        return next(lines, None)


class _Requests:
    """The lines that are in the engine."""

    def __init__(self, llm: "LLM", source: _Source, sampling: dict[str, Any]) -> None:
        self.running: dict[str, tuple[Line, Asked, SamplingParams]] = {}
        self._engine, self._tokenizer, self._read = llm.llm_engine, llm.get_tokenizer, source.read
        self._most = 2 * llm.engine.config.max_num_seqs
        self._model_says, self._sampling = llm.engine.default_sampling, sampling

    @property
    def is_full(self) -> bool:
        return len(self.running) >= self._most

    def add(self, line: Line) -> dict[str, Any] | None:
        """Give a line to the engine. Returns the record of its error if it cannot run."""
        asked = Asked()
        try:
            asked = self._read(line.content)
            params = self._params(line.index, asked)
            prompt = asked.prompt if asked.messages is None else asked.as_prompt(self._tokenizer())
            self._engine.add_request(str(line.index), prompt, params)
        except (TypeError, ValueError) as error:
            return error_record(asked.custom_id, str(error))
        self.running[str(line.index)] = line, asked, params
        return None

    def step(self) -> list[tuple[Line, dict[str, Any]]]:
        """Run a step of the engine. Returns the lines that have ended in it, with their records."""
        ended = []
        for output in self._engine.step():
            line, asked, params = self.running.pop(output.request_id)
            ended.append((line, result_record(asked, output, has_text=params.detokenize)))
        return ended

    def _params(self, index: int, asked: Asked) -> SamplingParams:
        from nanovllm.engine.text_engine import child_seed

        seed = self._sampling.get("seed")
        own = {} if seed is None else {"seed": child_seed(seed, index) >> 1}  # 63 bits: seeds are signed
        params = request_params(self._model_says, {**self._sampling, **own, **asked.sampling}, **DEFAULTS)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        return params


def _progress_bar(llm: "LLM", results: ResultsFile, num_left: int | None) -> Any:
    """A bar on stderr, if that is a terminal on which no results are printed."""
    from tqdm import tqdm

    from nanovllm.progress_bar import ProgressBar

    is_shown = sys.stderr.isatty() and not (results.name == "stdout" and sys.stdout.isatty())
    return ProgressBar(num_left, llm.engine.stats, partial(tqdm, disable=not is_shown))
