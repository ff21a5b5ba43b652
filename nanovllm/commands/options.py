"""The options of commands, made from the fields of `Config` and `SamplingParams`: a new field needs no code here.

Name, type and default of an option are those of the field, its help is the field's line in the docstring. Values are
checked by the class itself, so the command line and the library refuse the same values with the same words. vLLM's
other names work too, and vLLM's further options are accepted if they ask for nothing, as `LLM` accepts them.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from inspect import Parameter
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from nanovllm.config import Config
from nanovllm.sampling_params import SamplingParams
from nanovllm.vllm_defaults import ANY, ENGINE_OPTIONS, SAME_OPTIONS, check

SHORT = {"tensor_parallel_size": "-tp", "data_parallel_size": "-dp", "pipeline_parallel_size": "-pp"}  # as in vLLM
SWITCHES = ("enable_", "disable_", "use_", "skip_")  # options of vLLM that begin like this take no value


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command every option of an engine. It gets those that the user gave as a dict, `engine`.

        @app.command(cls=EngineCommand)
        @engine_options
        def serve(model: str | None = None, port: int = 8000, *, engine: dict[str, Any]) -> None:
            model, options = model_and_options(model, engine)
            with usage_errors():
                llm = AsyncLLM(model, **options)

    A parameter of the command's own takes the place of an engine's option of that name. `EngineCommand` adds vLLM's
    words that ask for nothing.
    """
    options = [_option(Config, name, "Engine", True, {}) for name in _names(Config) if name != "model"]
    return _with_options(command, "engine", options)


def sampling_options(**defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command every parameter of a request. It gets those that the user gave as a dict, `sampling`.

    The parameters that the user left out are the model's own, from its generation_config.json, or else `defaults`, or
    else those of `SamplingParams`: see `nanovllm.commands.shared.request_params`. Put it below `engine_options`: then
    `--seed` is the request's.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        names = [name for name in _names(SamplingParams) if name != "output_kind"]  # it is for readers of streams
        options = [_option(SamplingParams, name, "Sampling", False, defaults) for name in names]
        return _with_options(command, "sampling", options)

    return decorate


class EngineCommand(TyperCommand):
    """A command that reads `--max_num_seqs` as `--max-num-seqs`, and drops options of vLLM that ask for nothing.

    It refuses those that ask for something with the words of `LLM`.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        own = {flag for param in self.params for flag in (*param.opts, *param.secondary_opts)}
        rest, words = take_vllm_words(args, own)
        try:
            check("nanovllm", ENGINE_OPTIONS, words, sorted(own))
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=ctx) from error
        return super().parse_args(ctx, rest)


def take_vllm_words(args: list[str], own: set[str]) -> tuple[list[str], dict[str, Any]]:
    """Split a command line into the arguments that a command knows, under its own names, and what only vLLM has.

    An option of vLLM takes the next argument as its value, unless its name says that it is a switch, or that argument
    is an option itself.

    Args:
        own: the command's options, as `--max-num-seqs`.
    """
    rest: list[str] = []
    words: dict[str, Any] = {}
    left = list(args)
    while left:
        arg = left.pop(0)
        if arg == "--":
            return [*rest, arg, *left], words
        flag, equals, value = arg.partition("=")
        own_flag = flag if flag in own or not flag.startswith("--") else flag.replace("_", "-")
        own_flag = _OWN_FLAGS.get(own_flag, own_flag)
        name = _ABSENT_FLAGS.get(own_flag.replace("--no-", "--", 1))
        if name is None or own_flag in own:
            rest.append(own_flag + equals + value if own_flag in own else arg)
        elif own_flag.startswith("--no-"):
            words[name] = False
        elif equals:
            words[name] = json_or_text(value)
        else:
            has_value = bool(left) and not left[0].startswith("--") and not _is_switch(name)
            words[name] = json_or_text(left.pop(0)) if has_value else True
    return rest, words


def json_or_text(text: str) -> Any:
    """The text's value as JSON, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _is_switch(name: str) -> bool:
    nothing = ENGINE_OPTIONS[name].nothing
    return name.startswith(SWITCHES) or (nothing is not ANY and any(isinstance(value, bool) for value in nothing))


def descriptions(cls: type) -> dict[str, str]:
    """What the docstring of a class says of each of its fields, a line each."""
    args = (inspect.getdoc(cls) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", args, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


_OWN_FLAGS = {_flag(name): _flag(own) for name, own in SAME_OPTIONS.items()}
_ABSENT_FLAGS = {_flag(name): name for name in ENGINE_OPTIONS}
_ABSENT_FLAGS |= {short: name for name, short in SHORT.items() if name in ENGINE_OPTIONS}


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def _option(cls: type, name: str, panel: str, has_default: bool, told: dict[str, Any]) -> Parameter:
    """A field as a parameter of a command; of what kind, `_kind` says.

    Args:
        has_default: the command gets the field's default if the user says nothing; otherwise None.
        told: defaults for the help to tell of instead of the fields' own.
    """
    field = next(f for f in fields(cls) if f.name == name)
    kind, metavar, parser = _kind(field.type)
    flags = [f"{_flag(name)}/--no-{_flag(name)[2:]}"] if kind is bool else [_flag(name)]
    flags += [SHORT[name]] if name in SHORT else []
    text = descriptions(cls).get(name, "")
    for other in (other for other, own in SAME_OPTIONS.items() if own == name and cls is Config):
        text += f" vLLM's name: {_flag(other)}."
    if not has_default and (name in told or field.default is not None):
        text += f" Default: {told.get(name, field.default)}."
    option = typer.Option(*flags, help=text, metavar=metavar, parser=parser, rich_help_panel=panel)
    default = field.default if has_default else None
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind | None, option])


def _kind(type_: Any) -> tuple[Any, str | None, Callable[[str], Any] | None]:
    """(type, metavar, parser) of an option for a field of this type. Values are checked later, by the class."""
    if get_origin(type_) in (Union, UnionType):
        kinds = [kind for kind in get_args(type_) if kind is not type(None)]
        type_ = next((kind for kind in kinds if get_origin(kind) is list), kinds[0])
    if get_origin(type_) is Literal:
        return str, "|".join(get_args(type_)), None  # the class takes further names for some of them
    if get_origin(type_) is list:
        element = get_args(type_)[0]
        return list[str if element is Any else element], None, None
    if get_origin(type_) is dict or is_dataclass(type_):  # `request_params` makes the dataclass
        return dict, "JSON", _json_object
    return type_, None, None


def _json_object(value: str | dict[Any, Any]) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{value!r:.80} must be a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{value!r:.80} must be a JSON object, in braces")
    return found


def _with_options(command: Callable[..., Any], argument: str, options: list[Parameter]) -> Callable[..., Any]:
    """A function with the command's parameters and these, which it hands on as one dict: those that the user gave."""
    signature = inspect.signature(command)
    own = [parameter for name, parameter in signature.parameters.items() if name not in (argument, "context")]
    takes_context = "context" in signature.parameters  # it has such options already
    taken = {parameter.name for parameter in own}
    added = [option for option in options if option.name not in taken]
    context = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)

    @functools.wraps(command)
    def with_options(context: typer.Context, **values: Any) -> Any:
        told = {option.name: values.pop(option.name) for option in added}
        values[argument] = {name: value for name, value in told.items() if _is_given(context, name)}
        return command(**values, **({"context": context} if takes_context else {}))

    with_options.__signature__ = signature.replace(parameters=[*own, *added, context])  # which typer reads
    return with_options


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the user has given an option, though its value may be the default."""
    return context.get_parameter_source(name).name != "DEFAULT"
