"""Draws the Mermaid flowcharts of docs/ as SVG, so that pages load no script from another host.

Supported are lines ``a & b --> c & d`` within ``subgraph name`` … ``end``.
"""

import re
from collections.abc import Iterable
from statistics import fmean

_HEIGHT, _LAYER, _GAP, _CHARACTER = 26, 64, 14, 7.4

_ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
    'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>'
)


def draw(text: str) -> str:
    """The SVG elements of a flowchart, one for each subgraph."""
    subgraphs = re.findall(r"subgraph (\w+)\n(.*?)\n\s*end", text, re.DOTALL)
    return "\n".join(_svg(name, _edges(lines)) for name, lines in subgraphs)


def _edges(lines: str) -> list[tuple[str, str]]:
    pairs = re.findall(r"^ *(.+) --> (.+)$", lines, re.MULTILINE)
    return [(a, b) for left, right in pairs for a in left.split(" & ") for b in right.split(" & ")]


def _layers(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Nodes by the longest path to them, each layer in the order of the nodes above."""
    depth = {node: 0 for edge in edges for node in edge}
    for _ in depth:  # a path has at most as many edges
        for a, b in edges:
            depth[b] = max(depth[b], depth[a] + 1)
    layers = [[n for n in depth if depth[n] == i] for i in range(max(depth.values()) + 1)]
    place: dict[str, float] = {}
    for layer in layers:
        layer.sort(key=lambda node: fmean([place[a] for a, b in edges if b == node] or [0.5]))
        place |= {node: (i + 0.5) / len(layer) for i, node in enumerate(layer)}
    return layers


def _svg(name: str, edges: list[tuple[str, str]]) -> str:
    layers = _layers(edges)
    widths = {node: _CHARACTER * len(node) + 16 for layer in layers for node in layer}
    rows = [sum(widths[n] for n in layer) + _GAP * (len(layer) - 1) for layer in layers]
    width, height = max(rows) + 4, _LAYER * (len(layers) - 1) + _HEIGHT + 4
    centre: dict[str, tuple[float, float]] = {}
    for i, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        x = (width - row) / 2
        for node in layer:
            centre[node] = (x + widths[node] / 2, 2 + _LAYER * i + _HEIGHT / 2)
            x += widths[node] + _GAP
    parts = [_edge(centre[a], centre[b]) for a, b in edges]
    parts += [_node(node, *centre[node], widths[node]) for node in centre]
    return (
        f'<div class="diagram"><strong>{name}</strong><br><svg width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="Imports within {name}">'
        f"{_ARROW}{''.join(parts)}</svg></div>"
    )


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, x2 = f"{start[0]:.0f}", f"{end[0]:.0f}"
    y1, y2 = start[1] + _HEIGHT / 2, end[1] - _HEIGHT / 2
    bend = f"{(y1 + y2) / 2:.0f}"
    return f'<path class="edge" d="M{x1} {y1:.0f} C{x1} {bend} {x2} {bend} {x2} {y2:.0f}"/>'


def _node(name: str, x: float, y: float, width: float) -> str:
    return (
        f'<rect x="{x - width / 2:.0f}" y="{y - _HEIGHT / 2:.0f}" width="{width:.0f}" '
        f'height="{_HEIGHT}" rx="4"/><text x="{x:.0f}" y="{y + 4:.0f}">{name}</text>'
    )
