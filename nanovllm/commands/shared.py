"""What the commands share: the model if the user names none, errors of options as one line, a request's parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from nanovllm.demo import chat_model, demo_model
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_outputs import StructuredOutputsParams

# So small a model is often wrong where it draws: at its card's temperature of 0.2 France's capital is not always Paris.
# A GGUF file has no place for sampling parameters.
CHAT_SAMPLING = {"temperature": 0.0}


def model_and_options(model: str | None, engine: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model and the options of its engine. Without a model it is one that is here, and stderr says which.

    Raises typer.Exit if there is none.
    """
    if model is not None:
        return model, engine
    try:
        model = chat_model()
    except FileNotFoundError as error:
        note(f"No MODEL given. Using the small model in the package, which completes Python: {error}")
        with usage_errors():
            return demo_model(), engine
    note("No MODEL given. Using SmolLM2-135M-Instruct: small, and often wrong.")
    return model, {"override_generation_config": CHAT_SAMPLING, **engine}


def request_params(model_says: dict[str, Any], given: dict[str, Any], **defaults: Any) -> SamplingParams:
    """A request's parameters: those given, else the model's own, else `defaults`, else those of `SamplingParams`.

    Args:
        model_says: `LLM.engine.default_sampling`.

    Raises:
        TypeError, ValueError: as `SamplingParams`.
    """
    asked = given.get("structured_outputs")
    if isinstance(asked, dict):
        given = {**given, "structured_outputs": StructuredOutputsParams(**asked)}
    return SamplingParams(**{**defaults, **model_says, **given})


@contextmanager
def usage_errors() -> Iterator[None]:
    """End the program with exit code 2 and one line if the options of an engine or a request are refused.

    Those are the errors that making an `LLM` or `SamplingParams` raises. Others keep their traceback.
    """
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        fail(str(error))


def fail(message: str, code: int = 2) -> NoReturn:
    """End the program with one line on stderr."""
    note(f"nanovllm: {' '.join(message.split())}")
    raise typer.Exit(code)


def note(message: str) -> None:
    """A line for the user, on stderr: stdout has nothing but what the model writes."""
    typer.echo(message, err=True)
