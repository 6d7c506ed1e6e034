"""Draws the pictures of docs/architecture.md from what is in the repository.

    python docs/draw.py

writes docs/rooms.png (docs/rooms.toml, the rooms' docstrings and their imports) and docs/step.png (docs/step.toml).
"""

from __future__ import annotations

import ast
import dataclasses
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

DOCS = Path(__file__).resolve().parent
INK, GREY, LINE, PAPER = "#1b1f24", "#57606a", "#8c959f", "#ffffff"
BLUE, SAND, BAND = "#ddf4ff", "#fff8c5", "#f6f8fa"
WIDTH, GAP, LABEL, LINE_HEIGHT = 11.0, 0.14, 0.7, 0.16  # inches, as all lengths here; y runs down
CELL, NODE = (2.16, 1.85), (1.86, 0.95)  # of docs/step.png: width and height of a place in the grid, and of a node

Box = tuple[float, float, float, float]  # left, top, width, height


def place(room: str) -> Path:
    """A room's folder or file."""
    places = (DOCS.parent / path for path in (f"icarus_jax/{room}", f"icarus_jax/{room}.py", room))
    return next(path for path in places if path.exists())


def owns(room: str) -> str:
    """The first line of what a room owns; else of its docstring; else what it contains."""
    path = place(room)
    source = path / "__init__.py" if path.is_dir() else path
    text = (ast.get_docstring(ast.parse(source.read_text())) or "") if source.exists() else ""
    if not text:
        folders = {file.parent.name for file in path.glob("*/__init__.py")}
        return ", ".join(sorted(folders or {file.stem for file in path.glob("*.py")} - {"__init__"}))
    first = text.rpartition("Owns:")[2].strip().partition("\n")[0].partition(" Takes:")[0].replace("`", "")
    return first[0].upper() + first[1:]


def imports(room: str, rooms: list[str]) -> list[str]:
    """The rooms that a room imports from, in the order of `rooms`."""
    path = place(room)
    files = path.rglob("*.py") if path.is_dir() else [path]
    found = {there for file in files for there in imported_rooms(file)}
    return [name for name in rooms if name in found - {room}]


def imported_rooms(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        for name in names:
            dotted = f"{node.module}.{name}" if isinstance(node, ast.ImportFrom) else name
            yield dotted.removeprefix("icarus_jax.").partition(".")[0]


def canvas(height: float) -> tuple[Figure, Axes]:
    figure = pyplot.figure(figsize=(WIDTH, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, at: Box, fill: str) -> None:
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch(at[:2], *at[2:], style, facecolor=fill, edgecolor=LINE, linewidth=0.9))


def write(axes: Axes, x: float, y: float, text: str, size: float = 8.5, **style: Any) -> None:
    axes.text(x, y, text, **{"fontsize": size, "color": INK, "va": "top", "linespacing": 1.25, **style})


def heading(axes: Axes, x: float, y: float, text: str, size: float = 10.0, **style: Any) -> None:
    write(axes, x, y, text, size, weight="bold", va="baseline", **style)


def save(figure: Figure, name: str) -> None:
    figure.savefig(DOCS / name, dpi=130, pil_kwargs={"optimize": True})
    pyplot.close(figure)
    print(DOCS / name)


@dataclasses.dataclass
class Floor:
    """A floor's rooms, and of each what it owns and what it imports, wrapped to the width of its box."""

    number: int
    rooms: list[str]
    everything: list[str]

    def __post_init__(self) -> None:
        self.width = (WIDTH - LABEL) / len(self.rooms) - GAP
        fill = textwrap.TextWrapper(int(self.width * 14.5)).fill
        self.owned = [fill(owns(room)) for room in self.rooms]
        below = [", ".join(imports(room, self.everything)) for room in self.rooms]
        self.below = [fill(f"\N{DOWNWARDS ARROW} {names}") if names else "" for names in below]
        lines = max(len(f"{a}\n{b}".strip().split("\n")) for a, b in zip(self.owned, self.below, strict=True))
        self.height = 0.47 + LINE_HEIGHT * lines

    def draw(self, axes: Axes, top: float, without_jax: list[str]) -> None:
        band = (0, top - GAP / 2), WIDTH, self.height + GAP
        axes.add_patch(Rectangle(*band, facecolor=BAND if self.number % 2 else PAPER))
        write(axes, LABEL / 2, top + self.height / 2, str(self.number), 15, ha="center", va="center", color=GREY)
        for i, room in enumerate(self.rooms):
            left = LABEL + i * (self.width + GAP)
            box(axes, (left, top, self.width, self.height), SAND if room in without_jax else BLUE)
            heading(axes, left + 0.1, top + 0.22, room)
            write(axes, left + 0.1, top + 0.31, self.owned[i])
            write(axes, left + 0.1, top + self.height - 0.07, self.below[i], 8, color=GREY, va="bottom")


def draw_rooms() -> None:
    house = tomllib.loads((DOCS / "rooms.toml").read_text())
    rooms = [room for floor in house["floors"] for room in floor]
    floors = [Floor(number, floor, rooms) for number, floor in enumerate(house["floors"], 1)][::-1]
    figure, axes = canvas(0.9 + sum(floor.height + GAP for floor in floors))
    heading(axes, GAP, 0.32, "The rooms: imports run down only", 12)
    top = 0.55
    for floor in floors:
        floor.draw(axes, top, house["without_jax"])
        top += floor.height + GAP
    text = "Yellow: host code, which never imports JAX.  \N{DOWNWARDS ARROW} the rooms that it imports from, measured."
    write(axes, LABEL, top + 0.05, text, color=GREY)
    save(figure, "rooms.png")


def draw_step() -> None:
    step = tomllib.loads((DOCS / "step.toml").read_text())
    figure, axes = canvas(0.1 + CELL[1] * (1 + max(node["at"][1] for node in step["nodes"])))
    lanes = {node["at"][1]: node["lane"] for node in step["nodes"]}
    for row, lane in lanes.items():
        draw_lane(axes, row, lane, named=lanes.get(row - 1) != lane)
    boxes: dict[str, Box] = {}
    for node in step["nodes"]:
        column, row = node["at"]
        boxes[node["name"]] = (0.25 + column * CELL[0], 0.85 + row * CELL[1], *NODE)
    for depth, group in enumerate(step["groups"]):
        boxes[group["name"]] = draw_group(axes, [boxes[name] for name in group["nodes"]], group["title"], 2 - depth)
    for node in step["nodes"]:
        draw_node(axes, boxes[node["name"]], node)
    for start, end, *both in step["arrows"]:
        draw_arrow(axes, boxes[start], boxes[end], "<|-|>" if both else "-|>")
    save(figure, "step.png")


def draw_lane(axes: Axes, row: int, lane: str, named: bool) -> None:
    top = 0.05 + row * CELL[1]
    axes.add_patch(Rectangle((0, top), WIDTH, CELL[1], facecolor=BAND if lane == "host" else PAPER))
    if named:
        heading(axes, 0.15, top + 0.25, lane, 11, color=GREY)


def draw_group(axes: Axes, members: list[Box], title: str, level: int) -> Box:
    """A frame around the nodes of a row; level 2 leaves room for frames within it."""
    left, top = members[0][0] - 0.07 * level, members[0][1] - 0.03 - 0.2 * level
    right, bottom = members[-1][0] + NODE[0] + 0.07 * level, members[0][1] + NODE[1] + 0.08 * level
    box(axes, (left, top, right - left, bottom - top), "none")
    write(axes, right - 0.08, top + 0.05, title, 8, color=GREY, ha="right")
    return left, top, right - left, bottom - top


def draw_node(axes: Axes, at: Box, node: dict[str, Any]) -> None:
    box(axes, at, SAND if node.get("store") else BLUE if node["lane"] == "device" else PAPER)
    heading(axes, at[0] + 0.1, at[1] + 0.22, node["title"])
    write(axes, at[0] + 0.1, at[1] + 0.34, textwrap.fill(node["text"], 26))


def draw_arrow(axes: Axes, start: Box, end: Box, style: str) -> None:
    """Sideways within a row; to another row straight, or around a corner in the gap between the rows."""
    x, y, to_x, to_y = (at + size / 2 for box in (start, end) for at, size in zip(box[:2], box[2:], strict=True))
    if abs(y - to_y) < CELL[1] / 2:
        side = 1 if to_x > x else -1
        points = [(x + side * start[2] / 2, y), (to_x - side * end[2] / 2, y)]
    else:
        side = 1 if to_y > y else -1
        leave, arrive = y + side * start[3] / 2, to_y - side * end[3] / 2
        to_x = x if end[2] > NODE[0] else to_x  # straight up to a frame
        corners = [] if to_x == x else [(x, leave + 0.28), (to_x, leave + 0.28)]
        points = [(x, leave), *corners, (to_x, arrive)]
    axes.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1.1)
    axes.add_patch(FancyArrowPatch(*points[-2:], arrowstyle=style, mutation_scale=11, shrinkA=0, shrinkB=0, color=INK))


if __name__ == "__main__":
    draw_rooms()
    draw_step()
