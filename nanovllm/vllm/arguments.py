"""vLLM's `EngineArgs`: the options of `LLM` as fields of a dataclass and as `--options` of a command line."""

import json
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import fields, make_dataclass
from typing import Any, Self

from nanovllm.config import Config
from nanovllm.vllm_defaults import ANY, ENGINE_OPTIONS, SAME_OPTIONS

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"
_SHORT = {"tensor_parallel_size": "-tp", "data_parallel_size": "-dp", "pipeline_parallel_size": "-pp"}


def _options() -> list[tuple[str, Any, Any]]:
    """(name, type, default) of every option of `LLM`: ours, vLLM's other names for ours, and vLLM's that we lack."""
    ours = [(f.name, f.type, DEFAULT_MODEL if f.name == "model" else f.default) for f in fields(Config)]
    type_of = {name: type_ for name, type_, _ in ours}
    others = [(name, type_of[own], None) for name, own in SAME_OPTIONS.items()]
    absent = []
    for name, (nothing, _) in ENGINE_OPTIONS.items():
        default = nothing[0] if nothing and nothing[0] is not ... else None
        absent.append((name, bool if isinstance(default, bool) else Any, default))
    return ours + others + absent


class _Methods:
    """The methods of `EngineArgs`; its fields are the options."""

    def given(self) -> dict[str, Any]:
        """The model and the options that differ from their defaults, as keyword arguments of `LLM`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {"model": self.model, **values}

    @classmethod
    def add_cli_args(cls, parser: ArgumentParser) -> ArgumentParser:
        """Add an `--option` for each field to a parser. The parser reads a value as JSON unless the field is a string.

        An option that the engine ignores whatever its value needs none.
        """
        for f in fields(cls):
            flags = [f"--{f.name.replace('_', '-')}", *filter(None, [_SHORT.get(f.name)])]
            kind: dict[str, Any] = {"type": str if f.type in (str, str | None) else _value}
            if f.type is bool:
                kind = {"action": BooleanOptionalAction}
            elif f.name in ENGINE_OPTIONS and ENGINE_OPTIONS[f.name].nothing is ANY:  # many are flags in vLLM
                kind |= {"nargs": "?", "const": True}
            parser.add_argument(*flags, dest=f.name, default=f.default, **kind)
        return parser

    @classmethod
    def from_cli_args(cls, args: Namespace) -> Self:
        """The options among the arguments that a parser has read; other arguments are ignored."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)})

    def create_model_config(self) -> Any:
        raise NotImplementedError(
            "a model's config is known only once the model is loaded: LLM(…).llm_engine.model_config"
        )

    create_engine_config = create_model_config


EngineArgs = make_dataclass("EngineArgs", _options(), bases=(_Methods,), namespace={"__module__": __name__})
AsyncEngineArgs = make_dataclass("AsyncEngineArgs", [], bases=(EngineArgs,), namespace={"__module__": __name__})


def _value(text: str) -> Any:
    """The text's value as JSON, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


class FlexibleArgumentParser(ArgumentParser):
    """An `ArgumentParser` that reads `--max_tokens` as `--max-tokens`."""

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(map(self._with_dashes, args)), namespace)

    def _with_dashes(self, arg: str) -> str:
        flag, equals, value = arg.partition("=")
        dashed = flag.replace("_", "-")
        is_ours = flag not in self._option_string_actions and dashed in self._option_string_actions
        return dashed + equals + value if flag.startswith("--") and is_ours else arg


class ProfilerConfig(dict):
    """The options of `start_profile()`, for `LLM(profiler_config=…)`, which takes a plain dict of them as well."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
