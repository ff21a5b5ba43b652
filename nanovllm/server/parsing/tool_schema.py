"""Checks a request's tools, and says as a JSON schema what an answer must be that has to call them.

As in vLLM, a forced answer is JSON whatever the model's own format is: for tool_choice="required" a list of
{"name": …, "parameters": …}, for one function its arguments alone. `tool_calls.py` reads both.
"""

import re
from dataclasses import dataclass
from typing import Any

NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_CHOICES = ("none", "auto", "required")
# In these, the keys are names and not keywords of JSON Schema; or the value is data and no schema.
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_DATA = {"const", "enum", "default", "examples"}


@dataclass(frozen=True)
class Function:
    """A function that the model may call; `parameters` is the JSON schema of an object."""

    name: str
    parameters: dict[str, Any]
    description: str = ""
    strict: bool = False


def check_tools(tools: Any) -> list[Function]:
    """The functions of `tools` in the form of OpenAI's chat completions: {"type": "function", "function": {…}}.

    Raises TypeError or ValueError, naming the part that has another form.
    """
    if not isinstance(tools, list):
        raise TypeError(f"tools={tools!r:.80} must be a list")
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = [function.name for function in functions]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"tools[{i}].function.name={name!r} is the name of tools[{names.index(name)}] too")
    return functions


def _function(tool: Any, where: str) -> Function:
    _check_keys(tool, where, ("type", "function"))
    if tool.get("type") != "function":
        raise ValueError(f"{where}.type={tool.get('type')!r:.80} must be 'function'")
    where, function = f"{where}.function", tool.get("function")
    _check_keys(function, where, ("name", "description", "parameters", "strict"))
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", name):
        raise ValueError(f"{where}.name={name!r:.80} must be 1 to 64 letters, digits, underscores and dashes")
    description, strict = function.get("description") or "", function.get("strict") or False
    if not isinstance(description, str):
        raise TypeError(f"{where}.description={description!r:.80} must be a string")
    if not isinstance(strict, bool):
        raise TypeError(f"{where}.strict={strict!r:.80} must be true or false")
    if parameters is not None and not isinstance(parameters, dict):
        raise TypeError(f"{where}.parameters={parameters!r:.80} must be a JSON schema")
    if parameters and parameters.get("type") != "object":
        raise ValueError(f"{where}.parameters.type={parameters.get('type')!r:.80} must be 'object'")
    return Function(name, parameters or NO_PARAMETERS, description, strict)


def _check_keys(value: Any, where: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{where}={value!r:.80} must be an object")
    for key in value:
        if key not in allowed:
            raise ValueError(f"{where} has {key!r:.80}: it may have {', '.join(allowed)}")


def check_tool_choice(tool_choice: Any, functions: list[Function]) -> str | Function:
    """ "none", "auto", "required", or the one function that is to be called.

    Raises:
        TypeError, ValueError: `tool_choice` is none of OpenAI's forms, or asks for a function that is not there.
    """
    if tool_choice is None:
        return "auto" if functions else "none"
    if isinstance(tool_choice, str):
        if tool_choice not in _CHOICES:
            raise ValueError(f"tool_choice={tool_choice!r:.80} must be one of {', '.join(_CHOICES)}, or an object")
        if tool_choice == "required" and not functions:
            raise ValueError("tool_choice='required' needs tools")
        return tool_choice if functions else "none"
    _check_keys(tool_choice, "tool_choice", ("type", "function"))
    if tool_choice.get("type") != "function":
        raise ValueError(f"tool_choice.type={tool_choice.get('type')!r:.80} must be 'function'")
    function = tool_choice.get("function")
    _check_keys(function, "tool_choice.function", ("name",))
    for candidate in functions:
        if candidate.name == function.get("name"):
            return candidate
    raise ValueError(f"tool_choice.function.name={function.get('name')!r:.80} must be the name of one of the tools")


def forced_schema(
    functions: list[Function], tool_choice: str | Function, parallel_tool_calls: bool = True
) -> dict[str, Any] | None:
    """The JSON schema of the whole answer, behind the reasoning; None if the answer is free.

    Args:
        tool_choice: as `check_tool_choice` returns it.
        parallel_tool_calls: whether a "required" answer may have several calls.
    """
    if isinstance(tool_choice, Function):
        return tool_choice.parameters
    if tool_choice != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "parameters": {"$ref": f"#/$defs/{function.name}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    # Each function's schema is a definition, and its own references begin there: two may define the same name.
    definitions = {function.name: _moved(function.parameters, f"#/$defs/{function.name}") for function in functions}
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return schema if parallel_tool_calls else schema | {"maxItems": 1}


def _moved(schema: Any, to: str, keys_are_names: bool = False) -> Any:
    """The schema with its references as they must be once its root lies at `to`."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for key, value in schema.items():
        if keys_are_names:
            moved[key] = _moved(value, to)
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = to + value[1:]
        else:
            moved[key] = value if key in _DATA else _moved(value, to, key in _MAPS)
    return moved
