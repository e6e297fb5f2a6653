"""Diagrams of the documentation are drawn with every node and arrow of their text."""

import importlib
import re
import xml.etree.ElementTree as ET

import pytest

from tests.docs.commands import ROOT


def test_the_diagram_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    diagram = importlib.import_module("diagram")
    (text,) = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S)
    arrows = re.findall(r"^ {8}(.+) --> (.+)$", text, re.MULTILINE)
    names = {name for pair in arrows for side in pair for name in side.split(" & ")}
    svg = ET.fromstring(f"<body>{diagram.draw(text)}</body>".replace("<br>", "<br/>"))
    assert {element.text for element in svg.iter("text")} == names
    edges = [path for path in svg.iter("path") if path.get("class") == "edge"]
    assert len(edges) == sum(len(a.split(" & ")) * len(b.split(" & ")) for a, b in arrows)


def test_an_arrow_leads_downwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    diagram = importlib.import_module("diagram")
    layers = diagram._layers([("a", "b"), ("b", "c"), ("a", "c")])
    assert layers == [["a"], ["b"], ["c"]]
