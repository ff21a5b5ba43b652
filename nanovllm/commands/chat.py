"""`nanovllm chat`: a conversation in the terminal, or one question a line from a pipe.

Answers go to stdout as the model writes them, everything else to stderr. Ctrl-C ends an answer between two of the
engine's steps, and the cache keeps what it has. A second Ctrl-C ends the answer at once.
"""

import math
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanovllm.commands.conversation import Conversation, Turn, most_prompt_tokens
from nanovllm.commands.options import engine_options, sampling_options
from nanovllm.commands.shared import model_and_options, note, request_params, usage_errors
from nanovllm.engine.prompts import Prompt
from nanovllm.output_stream import OutputStream
from nanovllm.outputs import CompletionOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM

HELP = """\
/reset         forget the conversation, and keep the system prompt
/system TEXT   set the system prompt; without TEXT, remove it
/help          this list
/exit          leave, as Ctrl-D does
Ctrl-C         stop an answer"""
# What a terminal would obey: all control characters but tab and newline.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")
DEFAULTS = {"max_tokens": None}  # up to the model's length


@engine_options
@sampling_options(**DEFAULTS)
def chat(
    model: Annotated[str | None, typer.Argument(help="A directory, a GGUF file, or a hub id.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Talk to a model. It remembers the conversation, and drops the oldest turns when it grows too long.

    /reset forgets the conversation, /system TEXT sets the system prompt, /help lists these, /exit or Ctrl-D leaves.
    Ctrl-C stops the answer. Without --max-tokens an answer may be as long as the model allows.

    If stdin is not a terminal, each line is a question, and the answers go to stdout; the exit code is 1 if a question
    was refused.
    """
    from nanovllm.llm import LLM

    with usage_errors():
        if sampling.get("n", 1) != 1:
            raise ValueError(f"n={sampling['n']} must be 1: a conversation goes on with one answer")
        request_params({}, sampling)  # before the model is loaded, which takes its time
        model, options = model_and_options(model, engine)
        llm = LLM(model, **options)
        params = request_params(llm.engine.default_sampling, sampling, **DEFAULTS)
    params.output_kind = RequestOutputKind.DELTA
    with llm:
        if not _Chat(llm, params, Conversation(system)).run():
            raise typer.Exit(1)


class _Chat:
    """The state of the command: the engine, a request's parameters, and what was said."""

    def __init__(self, llm: "LLM", params: SamplingParams, conversation: Conversation) -> None:
        self.llm, self.params, self.conversation = llm, params, conversation
        self.tokenizer = llm.get_tokenizer()
        self.interrupts = Interrupts()
        self.max_model_len = llm.engine.max_model_len
        self.most_tokens = most_prompt_tokens(self.max_model_len, params.max_tokens)

    def run(self) -> bool:
        """Answer until the user leaves. False if a question was refused, unless a user in a terminal has read why."""
        is_terminal = sys.stdin.isatty()
        if not self.tokenizer.chat_template:
            note("This model has no chat template: it continues your text.")
        if is_terminal:
            note("Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.")
        is_all_answered = True
        with self.interrupts if is_terminal else nullcontext():
            for line in _lines_of_terminal(self.interrupts) if is_terminal else sys.stdin:
                if line.strip() == "/exit":
                    break
                if line.strip() and not self._obey(line.strip()):
                    is_all_answered &= self._ask(line.rstrip("\n"))
        return is_all_answered or is_terminal

    def _obey(self, line: str) -> bool:
        """Carry out a command. False: the line is none."""
        command, _, text = line.partition(" ")
        if not re.fullmatch("/[a-z]+", command):
            return False
        if command == "/reset":
            self.conversation.turns.clear()
            note("The conversation begins anew.")
        elif command == "/system":
            self.conversation.system = text.strip() or None
            note("The system prompt is set." if text.strip() else "There is no system prompt now.")
        else:
            note(HELP if command == "/help" else f"There is no {command}. The commands are:\n{HELP}")
        return True

    def _ask(self, question: str) -> bool:
        """Print the answer, and remember it as far as it came. False: the engine refuses the question."""
        try:
            prompt, num_dropped = self.conversation.fitting_prompt(self.tokenizer, question, self.most_tokens)
            outputs = self.llm.stream(prompt, self.params)
        except (TypeError, ValueError) as error:
            note(f"This was not asked: {' '.join(str(error).split())}")
            return False
        if num_dropped:
            turns = "turn was" if num_dropped == 1 else f"{num_dropped} turns were"
            note(_dim(f"The conversation had grown too long: its oldest {turns} dropped."))
            del self.conversation.turns[:num_dropped]
        answer = self._answer(prompt, outputs)
        if answer:
            self.conversation.turns.append(Turn(question, answer))
        return True

    def _answer(self, prompt: Prompt, outputs: OutputStream) -> str:
        """Print the answer as the model writes it, then a line about it. Returns the text."""
        is_terminal = sys.stdout.isatty()
        pieces: list[str] = []
        num_tokens, end = 0, None
        begin = first = last = perf_counter()
        with self.interrupts.noting(1):
            for output in outputs:
                last = perf_counter()
                first = first if num_tokens else last
                for completion in output.outputs:
                    num_tokens += len(completion.token_ids)
                    end = completion
                    pieces.append(completion.text)
                    text = completion.text.translate(CONTROLS) if is_terminal else completion.text
                    print(text, end="", flush=True)
                if self.interrupts.num_come:
                    break
        outputs.close()
        print(flush=True)
        note(_dim(self._line_about(prompt, num_tokens, end, first - begin, last - first)))
        return "".join(pieces)

    def _line_about(
        self, prompt: Prompt, num_tokens: int, last: CompletionOutput | None, wait_s: float, writing_s: float
    ) -> str:
        num_context = len(prompt["prompt_token_ids"]) + num_tokens
        rate = f", {(num_tokens - 1) / writing_s:.0f} tok/s" if num_tokens > 1 and writing_s else ""
        line = f"{num_tokens:,} tokens after {wait_s:.2f} s{rate}; context {num_context:,} of {self.max_model_len:,}"
        reason = None if last is None else last.finish_reason
        if reason == "error":
            return f"{line}; failed: {last.stop_reason}"
        return line + {None: "; stopped", "length": "; cut off by its length"}.get(reason, "")


class Interrupts:
    """Within the block Ctrl-C is only noted, except where `noting` says that it interrupts.

    Attributes:
        num_come: since `noting` was called last.
    """

    def __init__(self) -> None:
        self.num_come = 0
        self._most_noted = math.inf

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *exc_info: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def noting(self, num: int) -> Iterator[None]:
        """Note so many; the next one ends this block, and no error leaves it. Outside `with` any Ctrl-C raises."""
        self.num_come = 0
        try:
            self._most_noted = num
            yield
            self._most_noted = math.inf
        except KeyboardInterrupt:
            if not self.num_come:  # it came from Python's own handler
                raise

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.num_come += 1
        if self.num_come > self._most_noted:
            self._most_noted = math.inf  # first, so that a further one does not interrupt the cleanup
            raise KeyboardInterrupt


def _lines_of_terminal(interrupts: Interrupts) -> Iterator[str]:
    """What the user types, until Ctrl-D. Ctrl-C begins the line anew."""
    with suppress(ImportError):  # Python may come without it: then lines have no history
        import readline  # noqa: F401
    while True:
        line = None
        with interrupts.noting(0):
            try:
                line = input("> " if sys.stdout.isatty() else "")
            except EOFError:
                note("")
                return
        if line is None:
            note("\nCtrl-D or /exit leaves.")
        else:
            yield line


def _dim(text: str) -> str:
    return typer.style(text, dim=True)
