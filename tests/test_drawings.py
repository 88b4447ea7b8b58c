"""Single drawings: cut out and centred, changed at random, never mirrored."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minivlp.data import EmojiVL
from minivlp.data.drawings import FILLED, Portraits, Variation, _places
from tests.tiny import few

STILL = Variation(
    sides=(1, 1), turn=0, slant=0, stretch=0, tint=0, light=0, background=(0.5, 0.5), slope=0, mix=0
)


def drawn(*tiles: np.ndarray, canvas: int = 32) -> Portraits:
    """Portraits of hand-made tiles by one artist."""
    return Portraits(EmojiVL((), {"me": np.stack(tiles)}), canvas)


def tile(x1, y1, x2, y2, colour=(255, 0, 0)) -> np.ndarray:
    out = np.zeros((64, 64, 4), np.uint8)
    out[y1:y2, x1:x2] = (*colour, 255)
    return out


def test_margins_tell_nothing():
    """The same square, wherever it lies in its tile and whatever its size, makes the same picture."""
    portraits = drawn(tile(0, 0, 64, 64), tile(3, 20, 23, 40), tile(32, 0, 64, 32))
    a, b, c = portraits.plain([0, 1, 2], ["me"] * 3)
    assert torch.equal(a, b) and torch.equal(a, c)
    red = (a[0] > 0.9).float().mean().sqrt()
    assert abs(float(red) - FILLED) < 0.05 and a[:, 0, 0].abs().max() < 0.01  # grey around it


def test_an_oblong_drawing_keeps_its_shape_and_its_middle():
    (picture,) = drawn(tile(4, 4, 60, 32)).plain([0], ["me"])
    rows, columns = np.nonzero((picture[0] > 0.5).numpy())
    assert np.ptp(columns) + 1 == pytest.approx(2 * (np.ptp(rows) + 1), abs=2)
    assert rows.mean() == pytest.approx(15.5, abs=0.6) and columns.mean() == pytest.approx(15.5, abs=0.6)


def test_a_missing_drawing_is_the_background():
    (picture,) = drawn(np.zeros((64, 64, 4), np.uint8)).plain([0], ["me"])
    assert picture.abs().max() < 1e-6


def test_without_variation_a_drawing_fills_the_canvas_as_it_is():
    portraits = Portraits(few(), 32)
    rng = np.random.default_rng(0)
    (picture,) = portraits.varied([0], ["noto"], ["noto"], rng, STILL)
    sprite = portraits.sheets["noto"][0].float() / 255
    expected = (torch.minimum(sprite[:3], sprite[3:]) + 0.5 * (1 - sprite[3:])).clamp(0, 1) * 2 - 1
    assert torch.allclose(picture, expected, atol=1e-5)


def test_nothing_is_mirrored_and_nothing_leaves_the_canvas():
    theta = _places(2000, np.random.default_rng(0), Variation())
    A, t = theta[:, :, :2], theta[:, :, 2]
    assert (np.linalg.det(A) > 0).all() and (A[:, 0, 0] > 0).all() and (A[:, 1, 1] > 0).all()
    centre = -np.linalg.solve(A, t[..., None])[..., 0]  # where the middle of the drawing lies
    side = 1 / np.sqrt(np.linalg.det(A))
    assert (np.abs(centre) <= 1 - side[:, None] + 1e-9).all()
    assert side.min() >= 0.8 and side.max() <= 1.0 and np.abs(centre).max() > 0.1


def test_every_part_of_the_variation_changes_the_picture():
    portraits = Portraits(few(), 32)
    whole = Variation()
    for name in vars(whole):
        v = replace(STILL, **{name: 1.0 if name == "mix" else getattr(whole, name)})
        (picture,) = portraits.varied([13], ["noto"], ["twemoji"], np.random.default_rng(0), v)
        (still,) = portraits.varied([13], ["noto"], ["twemoji"], np.random.default_rng(0), STILL)
        assert (picture - still).abs().max() > 0.02, name
        assert picture.min() >= -1 and picture.max() <= 1


def test_equal_generators_give_equal_pictures():
    portraits = Portraits(few(), 32)
    ids, one, two = [0, 13, 26], ["noto"] * 3, ["twemoji"] * 3
    a, b, c = (portraits.varied(ids, one, two, np.random.default_rng(s), Variation()) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (3, 3, 32, 32)
