"""Creatures drawn from parts on cluttered backgrounds, 64 px, about a millisecond an image.

A creature is a choice of one value for each of six attributes; everything else about its picture is chance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from spa_fast.cil.demo.vocabulary import PARTS, Attributes, random_attributes

SIZE = 64
_SUPER = 2  # drawn at twice the size and averaged down: smooth edges

Places = dict[str, Any]
_COLOURS = {
    "crimson": (196, 44, 48), "amber": (228, 170, 40), "green": (72, 160, 70),
    "azure": (50, 130, 215), "violet": (122, 62, 172), "rose": (232, 150, 178),
}  # fmt: skip
# Chances that a part cannot be seen, that something lies in front of the creature, and that a part of another
# creature lies behind it. They keep the classes from being told apart without error.
_HIDDEN, _COVERED, _STRAY = 0.12, 0.35, 0.7
_IVORY, _CREAM, _ORANGE = (242, 232, 205), (246, 232, 200), (235, 150, 70)


def render(attributes: Attributes, rng: np.random.Generator) -> Image.Image:
    """Draw one creature on a cluttered background.

    Position, size, tilt, direction, colours, light, clutter and noise are drawn from `rng`; so is whether a
    part stays hidden or something lies in front of it. The same generator state gives the same bytes.

    Args:
        attributes: one value per key of `ATTRIBUTES`.
        rng: the source of everything that is not an attribute.

    Returns:
        RGB image, 64 x 64.
    """
    return render_with_places(attributes, rng)[0]


def render_with_places(attributes: Attributes, rng: np.random.Generator) -> tuple[Image.Image, Places]:
    """As `render`; also the pixel (x, y) of the middle of each part, without parts that stay hidden."""
    image = Image.new("RGB", (SIZE * _SUPER, SIZE * _SUPER), _tuple(rng.uniform(70, 200, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(6, 13)):
        _clutter(draw, rng, rng.uniform(0, SIZE, 2), 1.0)
    if rng.random() < _STRAY:
        _stray(draw, rng)
    pen = _Pen(draw, rng, np.array(_COLOURS[attributes["colour"]]) + rng.normal(0, 14, 3))
    seen = {part: attributes[part] if rng.random() >= _HIDDEN else "" for part in PARTS}
    _tail(pen, seen["tail"])
    _legs(pen, seen["legs"])
    _body(pen, attributes["pattern"])
    _head(pen, seen["ears"], seen["horns"])
    if rng.random() < _COVERED:
        _clutter(draw, rng, pen.place([rng.uniform((-24, -24), (24, 18))])[0] / _SUPER, 0.6)
    pixels = np.asarray(image.reduce(_SUPER), dtype=np.float32)
    slope = rng.normal(0, 0.12, 2)
    grid = np.linspace(-1, 1, SIZE, dtype=np.float32)
    light = rng.uniform(0.75, 1.2) + slope[0] * grid[:, None] + slope[1] * grid[None, :]
    noise = rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32) * rng.uniform(2, 10)
    pixels = np.clip(pixels * light[..., None].astype(np.float32) + noise, 0, 255).astype(np.uint8)
    places = {part: np.concatenate(xy).mean(0) / _SUPER for part, xy in pen.drawn.items()}
    return Image.fromarray(pixels), places


class _Pen:
    """Draws outlined shapes given in the creature's own frame: x to the head, y down, origin in the body."""

    def __init__(self, draw: ImageDraw.ImageDraw, rng: np.random.Generator, colour: Any) -> None:
        self.draw, self.rng, self.colour = draw, rng, colour
        self.accent = colour * rng.uniform(0.6, 0.8)
        self.part, self.drawn = "", dict[str, list[Any]]()
        tilt, scale = rng.normal(0, 0.22), rng.uniform(0.75, 1.05) * _SUPER
        turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
        self.matrix = np.diag([rng.choice([-1, 1]), 1.0]) @ turn * scale
        self.offset = (SIZE / 2 + rng.uniform(-5, 5, 2) + (0, 4)) * _SUPER

    def place(self, points: Any) -> Any:
        return np.asarray(points, dtype=float) @ self.matrix.T + self.offset

    def trace(self, points: Any) -> list[tuple[float, ...]]:
        xy = self.place(points)
        self.drawn.setdefault(self.part, []).append(xy)
        return [tuple(p) for p in xy.tolist()]

    def shape(self, points: Any, colour: Any) -> None:
        xy = self.trace(points)
        self.draw.polygon(xy, fill=_tuple(colour))
        self.draw.line([*xy, xy[0]], fill=_tuple(np.asarray(colour) * 0.35), width=_SUPER)

    def line(self, points: Any, width: float, colour: Any) -> None:
        xy = self.trace(points)
        for extra, shade in ((2, 0.35), (0, 1.0)):
            ink = _tuple(np.asarray(colour) * shade)
            self.draw.line(xy, ink, round(width * _SUPER) + extra, joint="curve")

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Any) -> None:
        self.shape(_ellipse(x, y, rx, ry), colour)


def _tail(pen: _Pen, value: str) -> None:
    pen.part = "tail"
    sway = pen.rng.uniform(-2, 2)
    if value == "bushy":
        bush = [(-9, 1), (-16, 4), (-24, -1), (-27, -9 + sway), (-24, -18 + sway), (-18, -12), (-14, -4)]
        pen.shape(bush, pen.colour)
        pen.shape([(-27, -9 + sway), (-24, -18 + sway), (-20, -10)], _CREAM)
    elif value == "spiral":
        turns = np.linspace(0, 3.4 * math.pi, 24)
        radius = np.linspace(8, 1, 24)
        pen.line(np.c_[-19 + radius * np.cos(turns), -7 + sway + radius * np.sin(turns)], 2.0, pen.colour)
        pen.line([(-8, 0), (-11, -7 + sway)], 2.0, pen.colour)
    elif value == "arrow":
        pen.line([(-9, 0), (-15, 3), (-20, -1), (-21, -8)], 2.0, pen.colour)
        pen.shape([(-27, -7 + sway), (-22, -19 + sway), (-15, -8 + sway), (-21, -10 + sway)], pen.accent)
    elif value == "fan":
        for angle in np.linspace(2.2, 4.4, 5) + sway * 0.05:
            x, y = -10 + 17 * math.cos(angle), -3 + 17 * math.sin(angle)
            pen.line([(-9, -2), (x, y)], 2.5, pen.accent)
            pen.disc(x, y, 3, 3, _CREAM)


def _legs(pen: _Pen, value: str) -> None:
    pen.part = "legs"
    for i, x in enumerate((-8.5, -3.5, 3.5, 8.5)):
        step = pen.rng.uniform(-1.2, 1.2)
        if value == "short":
            pen.shape([(x - 2.8, 4), (x + 2.8, 4), (x + 2.8, 12), (x - 2.8, 12)], pen.colour)
        elif value == "long":
            pen.line([(x, 5), (x + step - 1, 13), (x + 2 * step, 21)], 1.6, pen.accent)
        elif value == "tentacles":
            t = np.linspace(0, 1, 10)
            pen.line(np.c_[x * (1 + 0.4 * t) + 2.2 * np.sin(6.5 * t + step), 5 + 13 * t], 2.4, pen.accent)
        elif value == "flippers" and i % 2 == 0:
            x = x * 1.2 + 2
            foot = [(x - 2, 5), (x + 2, 5), (x + 9, 14 + step), (x + 5, 16), (x, 16), (x - 5, 14)]
            pen.shape(foot, _ORANGE)


def _body(pen: _Pen, pattern: str) -> None:
    pen.part = "body"
    pen.disc(0, 0, 13, 9, pen.colour)
    shift = pen.rng.uniform(-1.5, 1.5)
    if pattern == "stripes":
        for x in (-8 + shift, -2.5 + shift, 3 + shift, 8 + shift):
            high = 8 * math.sqrt(1 - (x / 13) ** 2)
            pen.line([(x, -high), (x + 1, 0.5 * high)], 1.8, pen.colour * 0.4)
    elif pattern == "spots":
        for x, y in ((-8, -2), (-3, 4), (-2, -4.5), (3, 0.5), (8, 3)):
            pen.disc(x + shift, y, 2, 2, _CREAM)
    elif pattern == "belly":
        bottom = np.linspace(0.15 * math.pi, 0.85 * math.pi, 10)
        pen.shape(np.c_[12 * np.cos(bottom), 8.3 * np.sin(bottom)], _CREAM)


def _head(pen: _Pen, ears: str, horns: str) -> None:
    pen.part = "ears"
    if ears == "pointed":
        for x in (7.5, 12):
            pen.shape([(x - 3, -13), (x - 5.5, -28), (x + 3, -15)], pen.colour)
            pen.shape([(x - 2, -15), (x - 4, -23), (x + 1, -15)], pen.accent)
    elif ears == "round":
        for x in (5.5, 12):
            pen.disc(x, -18, 5.2, 5.2, pen.colour)
            pen.disc(x, -18, 2.6, 2.6, _CREAM)
    elif ears == "frilled":
        angles = np.linspace(1.7, 5.0, 13)
        radius = np.where(np.arange(13) % 2 == 0, 14, 9)
        pen.shape(np.c_[13 + radius * np.cos(angles), -9 + radius * np.sin(angles)], _ORANGE)
    pen.part = "horns"
    if horns == "antlers":
        for x in (13, 17):
            pen.line([(x, -14), (x + 3, -26)], 1.4, _IVORY)
            pen.line([(x + 1, -19), (x + 7, -23)], 1.4, _IVORY)
            pen.line([(x + 2, -22), (x - 2, -26)], 1.4, _IVORY)
    elif horns == "feelers":
        for x, y in ((17, -28), (25, -22)):
            pen.line([(16, -14), ((16 + x) / 2 - 1, y + 4), (x, y)], 1.2, pen.accent)
            pen.disc(x, y, 2.8, 2.8, (250, 225, 70))
    elif horns == "spike":
        pen.shape([(14.5, -15), (25, -29), (19.5, -12)], _IVORY)
    pen.part = "head"
    pen.disc(13.5, -8.5, 8, 7.3, pen.colour)
    pen.disc(17, -10, 1.8, 1.8, (255, 255, 255))
    pen.disc(17.4, -10, 0.8, 0.8, (20, 20, 20))
    pen.line([(16, -5), (20, -5.5)], 0.8, pen.colour * 0.4)
    pen.part = "horns"
    if horns == "curled":
        turns = np.linspace(-0.5, 3.2 * math.pi, 20)
        radius = np.linspace(5.5, 1, 20)
        pen.line(np.c_[15 + radius * np.cos(turns), -16 - radius * np.sin(turns)], 2.2, _IVORY)
    pen.part = "ears"
    if ears == "floppy":
        pen.shape(_ellipse(7.5, -5, 3.8, 9), pen.accent)


def _clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator, centre: Any, size: float) -> None:
    """One random ellipse, polygon, bar or arc, in the size of a part or larger."""
    kind, colour = rng.integers(4), _tuple(rng.uniform(30, 235, 3))
    x, y = np.asarray(centre) * _SUPER
    w, h = rng.uniform(5, 14, 2) * _SUPER * size
    if kind == 0:
        draw.ellipse((x - w, y - h, x + w, y + h), fill=colour)
    elif kind == 1:
        draw.polygon([(x + a, y + b) for a, b in rng.uniform(-1.5, 1.5, (4, 2)) * (w, h)], fill=colour)
    elif kind == 2:
        draw.line([(x - w, y - h), (x + w, y + rng.uniform(-h, h))], colour, int(rng.integers(2, 9)))
    else:
        start, end = np.sort(rng.uniform(0, 360, 2))
        draw.arc((x - w, y - h, x + w, y + h), start, end, colour, int(rng.integers(2, 7)))


def _stray(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """A tail, a set of legs, or ears and horns on a head, of some other creature, near the border."""
    other, angle = random_attributes(rng), rng.uniform(0, 2 * math.pi)
    pen = _Pen(draw, rng, np.array(_COLOURS[other["colour"]]) + rng.normal(0, 14, 3))
    # The middle of the part, in the creature's frame, moves to a circle around the picture's centre.
    kind = int(rng.integers(3))
    pen.matrix *= 0.8
    aim = np.array([math.cos(angle), math.sin(angle)]) * 26 + SIZE / 2
    pen.offset = aim * _SUPER - pen.matrix @ ((-17, -5), (0, 12), (13, -15))[kind]
    if kind == 0:
        _tail(pen, other["tail"])
    elif kind == 1:
        _legs(pen, other["legs"])
    else:
        _head(pen, other["ears"], other["horns"])


def _ellipse(x: float, y: float, rx: float, ry: float) -> Any:
    return _CIRCLE * (rx, ry) + (x, y)


_CIRCLE = np.c_[np.cos(np.linspace(0, 2 * np.pi, 16, False)), np.sin(np.linspace(0, 2 * np.pi, 16, False))]


def _tuple(colour: Any) -> tuple[int, int, int]:
    r, g, b = (int(min(max(c, 0), 255)) for c in colour)
    return r, g, b
