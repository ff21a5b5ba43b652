"""Random JSON schemas, for hypothesis: small ones of all kinds that can be enforced, whose texts are short."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

LEAVES = [
    st.builds(
        lambda least, most, step: {"type": "integer", "minimum": least, "maximum": most, "multipleOf": step},
        st.integers(-50, 0),
        st.integers(5, 500),
        st.sampled_from([1, 2, 5]),
    ),
    st.tuples(st.integers(0, 3), st.integers(3, 8)).map(
        lambda lengths: {"type": "string", "minLength": lengths[0], "maxLength": lengths[1]}
    ),
    st.sampled_from(["^[ab]{1,3}$", "^[0-9]{2}-x?", "^(é|日本){1,2}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 12}
    ),
    st.sampled_from(["date", "ipv4", "uuid"]).map(lambda name: {"type": "string", "format": name}),
    st.lists(st.sampled_from(["a", "b\n", 1, None, 2.5, [1], {"k": "v"}]), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "boolean"]}, {"const": {"a": [1]}}]),
]


@st.composite
def objects(draw: Callable[..., Any], parts: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(st.sampled_from(["a", "b", "long name", "é"]), parts, max_size=3))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    more: dict[str, Any] = {"additionalProperties": False}
    if len(required) == len(properties) and draw(st.booleans()):  # else the library does not bound their number
        more |= {"patternProperties": {"^[xy]$": {"type": "boolean"}}, "maxProperties": len(required) + 1}
    return {"type": "object", "properties": properties, "required": required, **more}


def larger(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.builds(
        lambda items, least: {"type": "array", "items": items, "minItems": least, "maxItems": 2},
        parts,
        st.integers(0, 2),
    )
    tuples = st.lists(parts, min_size=1, max_size=2).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    )
    either = st.lists(parts, min_size=1, max_size=2).map(lambda options: {"anyOf": options})
    return st.one_of(objects(parts), arrays, tuples, either)


@st.composite
def schemas(draw: Callable[..., Any]) -> dict[str, Any]:
    """Small schemas of all kinds that can be enforced, whose texts are short."""
    schema = draw(st.recursive(st.one_of(LEAVES), larger, max_leaves=5))
    if draw(st.booleans()):
        return schema
    return {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 1, "$defs": {"part": schema}}
