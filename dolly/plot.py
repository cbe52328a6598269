"""The training curve as a PNG: each update's loss, their running mean, and the held-out losses."""

import io
import math

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 1200, 600, 90, 50, 30, 70  # pixels; the last four are margins
PAPER, INK, GRID, EACH, MEAN, HELD_OUT = "#ffffff", "#333333", "#dddddd", "#f4cba6", "#d9691e", "#1f5fa8"
SMOOTHING = 0.8  # of the running mean
TICKS = 6  # of an axis, at most


def training_curve(history: list[dict]) -> bytes:
    """A PNG of `history`, {"step", "loss"} and {"step", "heldout"} by step; some step has a loss.

    The loss axis ends at the largest held-out loss or running mean: a spike does not flatten the rest.
    """
    losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
    heldout = [(row["step"], row["heldout"]) for row in history if "heldout" in row]
    means, mean, weight = [], 0.0, 0.0
    for step, loss in losses:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * loss, SMOOTHING * weight + (1 - SMOOTHING)
        means.append((step, mean / weight))
    low, high = min(loss for _, loss in losses + heldout), max(loss for _, loss in means + heldout)
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    last = max(step for step, _ in losses + heldout)

    def at(step: float, loss: float) -> tuple[float, float]:
        height = (min(loss, high) - low) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1), HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * height

    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(22)
    for loss in _round_numbers(low, high):
        draw.line([at(0, loss), at(last, loss)], GRID)
        draw.text((LEFT - 12, at(0, loss)[1]), f"{loss:.4g}", INK, font, "rm")
    for step in _round_numbers(0, last):
        draw.text((at(step, low)[0], HEIGHT - BOTTOM + 12), f"{step:,.10g}", INK, font, "ma")
    draw.text((WIDTH / 2, HEIGHT - 8), "updates", INK, font, "ms")
    _line(draw, [at(*point) for point in losses], EACH, 1)
    _line(draw, [at(*point) for point in means], MEAN, 4)
    _line(draw, [at(*point) for point in heldout], HELD_OUT, 3)
    for x, y in (at(*point) for point in heldout):
        draw.ellipse([x - 6, y - 6, x + 6, y + 6], HELD_OUT)
    legend = [("training loss", MEAN)] + [("held-out loss", HELD_OUT)] * bool(heldout)
    for place, (name, colour) in enumerate(legend):
        draw.text((LEFT + 220 * place, 12), name, colour, font)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _round_numbers(low: float, high: float) -> list[float]:
    """At most `TICKS` multiples of 1, 2 or 5 times a power of ten."""
    for exponent in range(-12, 13):
        for unit in (1, 2, 5):
            multiples = range(math.ceil(low / (unit * 10**exponent)), math.floor(high / (unit * 10**exponent)) + 1)
            if len(multiples) <= TICKS:
                return [unit * multiple * 10**exponent for multiple in multiples]
    return []


def _line(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: str, width: int) -> None:
    if len(points) > 1:
        draw.line(points, colour, width, "curve")
