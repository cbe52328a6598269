"""The curve in the card: what is drawn where."""

import io

import pytest
from PIL import Image, ImageColor

from dolly.plot import BOTTOM, HEIGHT, HELD_OUT, LEFT, MEAN, RIGHT, TOP, WIDTH, _round_numbers, training_curve


def pixels(history: list[dict], colour: str) -> list[tuple[int, int]]:
    """Where a colour is inside the axes."""
    image = Image.open(io.BytesIO(training_curve(history)))
    assert (image.format, image.size) == ("PNG", (WIDTH, HEIGHT))
    wanted = ImageColor.getrgb(colour)
    box = ((x, y) for x in range(LEFT, WIDTH - RIGHT + 1) for y in range(TOP, HEIGHT - BOTTOM + 1))
    return [place for place in box if image.getpixel(place) == wanted]


def test_the_curves_run_from_the_first_to_the_last_update():
    falling = [{"step": step, "loss": 4 - step / 100} for step in range(201)]
    mean = pixels([*falling, {"step": 200, "heldout": 3.0}], MEAN)
    assert min(mean)[1] < TOP + 10  # high at the left ...
    assert max(mean)[1] > HEIGHT - BOTTOM - 50  # ... and low at the right
    assert max(mean)[0] > WIDTH - RIGHT - 5
    held_out = pixels([*falling, {"step": 200, "heldout": 3.0}], HELD_OUT)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    assert held_out and all(x > WIDTH - RIGHT - 8 and abs(y - middle) < 8 for x, y in held_out)


@pytest.mark.parametrize(
    "history", [[{"step": 1, "loss": 2.0}], [{"step": 0, "heldout": 2.0}, {"step": 1, "loss": 2.0}]]
)
def test_a_run_of_one_update_has_a_picture(history):
    training_curve(history)


def test_a_first_spike_does_not_flatten_the_rest():
    history = [{"step": 0, "loss": 2.1}, {"step": 1, "loss": 900.0}, *({"step": i, "loss": 2.0} for i in range(2, 200))]
    assert max(y for _, y in pixels(history, MEAN)) == HEIGHT - BOTTOM


def test_the_axes_have_round_numbers():
    assert _round_numbers(0, 490) == [0, 100, 200, 300, 400]
    assert _round_numbers(2.91, 4.06) == pytest.approx([3.0, 3.2, 3.4, 3.6, 3.8, 4.0])
