"""Refuses what of a JSON Schema would not be enforced, where the library for grammars would not say so itself.

llguidance refuses by name the keywords that it lacks. It lets two things through: a schema's own `x-guidance`, which
may have keywords ignored, and `minProperties`, though names that the schema does not have may come twice.
"""

import json
from collections.abc import Iterable
from typing import Any

# Keywords of JSON Schema whose value is a schema, a list of schemas, or a dict of schemas.
ONE_SCHEMA = ("additionalProperties", "items", "additionalItems", "not", "if", "then", "else", "contains")
MANY_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def enforceable_schema(source: str, disable_additional_properties: bool) -> str:
    """The same schema as text, with what `disable_additional_properties` adds. Raises ValueError, which says why."""
    try:
        schema = json.loads(source)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(schema, dict):
        raise ValueError("a schema is an object")
    if "x-guidance" in schema:
        raise ValueError("it has x-guidance; whitespace_pattern and disable_any_whitespace say how JSON is written")
    for part in _parts(schema):
        required, least = part.get("required", []), part.get("minProperties", 0)
        # Of properties that a schema does not name, one may come twice; a reader of JSON then counts it once.
        if isinstance(required, list) and isinstance(least, int) and least > len(required) + 1:
            raise ValueError(f"minProperties={least}: with {len(required)} required, at most one more can be enforced")
        if disable_additional_properties and ("properties" in part or "patternProperties" in part):
            part.setdefault("additionalProperties", False)
    return json.dumps(schema)


def _parts(schema: Any) -> Iterable[dict[str, Any]]:
    """A schema and all schemas within it."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        waiting += [part[name] for name in ONE_SCHEMA if name in part]
        for name in MANY_SCHEMAS:
            waiting += part[name] if isinstance(part.get(name), list) else []
        for name in NAMED_SCHEMAS:
            waiting += part[name].values() if isinstance(part.get(name), dict) else []
