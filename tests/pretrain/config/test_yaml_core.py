"""Scalars mean what they look like, and values survive being written and read."""

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pretrain.config import yaml_core


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-010", -10), ("0o17", 15), ("0x1F", 31), ("1e-3", 1e-3), ("1E3", 1000.0),
        (".5", 0.5), ("5.", 5.0), ("-.inf", -math.inf), ("1_000", "1_000"), ("12:30", "12:30"),
        ("off", "off"), ("yes", "yes"), ("True", True), ("~", None), ("~/x", "~/x"),
        ("2024-01-01", "2024-01-01"), ("0b1", "0b1"), ("'1'", "1"), ("<<", "<<"),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    found = yaml_core.read(f"a: {text}")["a"]
    assert (type(found), found) == (type(value), value)
    assert math.isnan(yaml_core.read(".nan"))


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.from_regex(r"[-+0-9.:_eoxinfyon~]{1,6}", fullmatch=True)
)


@given(
    st.recursive(
        _SCALARS,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1", max_size=2), inner)
        ),
        max_leaves=8,
    )
)
@example({"text that YAML 1.1 or 1.2 reads as something else": ["010", "1e-3", "off", "1:30", ""]})
@example(["\x85", "a\u2028b", "\u2029\n"])
def test_values_survive_being_written_and_read(value: Any) -> None:
    assert yaml_core.read(yaml_core.dump(value)) == value


@given(st.data())
def test_a_key_that_is_given_twice_is_refused_at_any_depth(data: st.DataObject) -> None:
    path = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=4))
    flow = data.draw(st.booleans())
    *parents, name = path
    if flow:
        text = "".join(f"{{{parent}: " for parent in parents) + f"{{{name}: 1, d: 2, '{name}': 1}}"
        text += "}" * len(parents)
    else:
        text = "".join(f"{'  ' * depth}{parent}:\n" for depth, parent in enumerate(parents))
        indent = "  " * len(parents)
        text += f"{indent}{name}: 1\n{indent}d: 2\n{indent}{name}: 1\n"
    with pytest.raises(yaml_core.yaml.YAMLError) as error:
        yaml_core.read(text)
    assert f"{name!r} is given twice" in yaml_core.explain(error.value)
