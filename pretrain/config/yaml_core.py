"""The core schema of YAML 1.2: numbers and booleans mean what they look like.

PyYAML reads YAML 1.1, in which ``010`` is 8, ``12:30`` is 750, ``off`` is false and ``1e-3`` is
text, and in which the second of two equal keys replaces the first. Here, scalars follow the core
schema (yaml.org/spec/1.2.2, section 10.3.2). Features that a configuration does not need are
refused: duplicate keys, anchors and aliases (which can expand to any size), merge keys and tags.
"""

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_NULL, _BOOL, _INT, _FLOAT = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")
)
_CORE = (
    (_NULL, r"null|Null|NULL|~|", "nN~"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


def _add_core_schema(cls: Any) -> None:
    for tag, pattern, first in _CORE:
        # PyYAML looks patterns up by the first character of the text; "" stands for empty text.
        matcher = re.compile(rf"(?:{pattern})\Z")
        cls.add_implicit_resolver(tag, matcher, [*first, *([""] if tag == _NULL else [])])


def _error(problem: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


class _Loader(yaml.SafeLoader):
    """Parses YAML into nodes, which :func:`_value` converts to values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _error("anchors and aliases are not supported: write the value", event)
        if getattr(event, "tag", None) is not None:
            raise _error(f"tags are not supported: remove {event.tag}", event)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that :func:`read` or a YAML 1.1 reader would take for another type."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _write_text(dumper: _Dumper, text: str) -> ScalarNode:
    # In other styles PyYAML writes line breaks as they are, and reads some of them as spaces.
    style = '"' if re.search("[\n\\x85\\u2028\\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)
_Loader.yaml_implicit_resolvers = {}
_add_core_schema(_Loader)
_add_core_schema(_Dumper)


def read(text: str, *, comments: bool = True) -> Any:
    """The value of a YAML document; None for an empty one.

    Args:
        comments: whether comments are allowed.

    Raises:
        yaml.YAMLError: the text is not valid, or uses a feature that this module refuses.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        end = node.end_mark.index if node is not None else 0
        if not comments and text[end:].strip():
            raise yaml.YAMLError(f"{text[end:].strip()!r} would be ignored: put it in quotes")
        return None if node is None else _value(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def explain(error: yaml.YAMLError) -> str:
    """A one-line description of an error of :func:`read`, with the line number."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    context = getattr(error, "context", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}: " + (f"{context}, {problem}" if context else str(problem))


def dump(values: Any) -> str:
    """Write plain values as YAML, in their order, such that :func:`read` returns the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_line(values: Any) -> str:
    """:func:`dump` in one line."""
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 1 << 30}
    line: str = yaml.dump(values, Dumper=_Dumper, default_flow_style=True, **options)
    return line.strip()


def _value(node: Node) -> Any:
    if isinstance(node, MappingNode):
        return _mapping(node)
    if isinstance(node, SequenceNode):
        return [_value(item) for item in node.value]
    assert isinstance(node, ScalarNode)
    return _scalar(node)


def _mapping(node: MappingNode) -> dict[Any, Any]:
    values: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode):
            raise _error("a key must be a name", key_node)
        key = _scalar(key_node)
        if key in values:
            raise _error(f"{key!r} is given twice: merge the two", key_node)
        values[key] = _value(value_node)
    return values


def _scalar(node: ScalarNode) -> Any:
    text: str = node.value
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT:
        try:
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        except ValueError:  # Python limits the digits of a number
            raise _error(f"the number has {len(text)} digits", node) from None
    if node.tag == _FLOAT:
        return float(re.sub(r"\.(?=[a-zA-Z])", "", text))  # .inf, .nan
    return text
