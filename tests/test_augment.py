"""RandAugment, operation by operation: each does what its formula says, and nothing else."""

import numpy as np
import pytest
from PIL import Image

from minivlp.data import augment
from minivlp.data.augment import OPERATIONS, SIGNED, magnitude, rand_augment

# ViLT's ranges: name → (low, high).
RANGES = {
    "AutoContrast": (0, 1), "Equalize": (0, 1), "Rotate": (0, 30), "Posterize": (0, 4), "Solarize": (0, 256),
    "SolarizeAdd": (0, 110), "Color": (0.1, 1.9), "Contrast": (0.1, 1.9), "Brightness": (0.1, 1.9),
    "Sharpness": (0.1, 1.9), "ShearX": (0, 0.3), "ShearY": (0, 0.3), "TranslateXabs": (0, 100),
    "TranslateYabs": (0, 100),
}  # fmt: skip


def noise(height: int = 40, width: int = 56, low: int = 0, high: int = 256, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def apply(name: str, image: Image.Image, value: float) -> np.ndarray:
    """The pixels after one operation, as integers that can be subtracted."""
    return np.asarray(OPERATIONS[name][0](image, value)).astype(int)


def ints(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def marked(x: int, y: int, height: int = 400, width: int = 480) -> Image.Image:
    """Grey with one red pixel."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    pixels[y, x] = (255, 0, 0)
    return Image.fromarray(pixels)


def mark(pixels: np.ndarray) -> list[tuple[int, int]]:
    """Where (x, y) the red pixels are."""
    return [(int(x), int(y)) for y, x in np.argwhere((pixels == (255, 0, 0)).all(-1))]


# The table and the strength -------------------------------------------------------------------------


def test_the_table_holds_the_fourteen_operations_without_invert_and_cutout():
    assert {name: (low, high) for name, (_, low, high) in OPERATIONS.items()} == RANGES
    assert {"Rotate", "ShearX", "ShearY", "TranslateXabs", "TranslateYabs"} == SIGNED


@pytest.mark.parametrize("name", OPERATIONS)
def test_strength_runs_linearly_from_low_to_high(name):
    low, high = RANGES[name]
    assert magnitude(name, 0) == pytest.approx(low) and magnitude(name, 30) == pytest.approx(high)
    assert magnitude(name, 9) == pytest.approx(low + 0.3 * (high - low))
    assert magnitude(name, 15) == pytest.approx((low + high) / 2)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("m", [1, 9, 30])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (48, 48), (400, 500)])
def test_size_and_mode_stay_and_the_input_is_left_alone(name, m, size):
    image = noise(*size)
    before = ints(image)
    value = magnitude(name, m)
    for signed in {value, -value} if name in SIGNED else {value}:
        out = OPERATIONS[name][0](image, signed)
        assert out.size == image.size and out.mode == "RGB"
    assert (ints(image) == before).all()


NOTHING = {
    "Rotate": 0, "Posterize": 8, "Solarize": 256, "SolarizeAdd": 0, "ShearX": 0, "ShearY": 0,
    "TranslateXabs": 0, "TranslateYabs": 0, "Color": 1, "Contrast": 1, "Brightness": 1, "Sharpness": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_the_neutral_value_gives_the_same_picture_and_others_do_not(name):
    image = noise()
    assert (apply(name, image, NOTHING[name]) == ints(image)).all()
    assert (apply(name, image, magnitude(name, 9)) != ints(image)).any()


def test_auto_contrast_and_equalize_leave_a_full_flat_histogram_alone():
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2))
    assert (apply("AutoContrast", ramp, 0.3) == ints(ramp)).all()
    assert np.abs(apply("Equalize", ramp, 0.3) - ints(ramp)).max() <= 1


def test_the_neutral_strengths_named_in_the_docstring():
    image = noise()
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        assert (apply(name, image, magnitude(name, 15)) == ints(image)).all()
    assert (apply("Solarize", image, magnitude("Solarize", 30)) == ints(image)).all()
    inverted = apply("Solarize", image, magnitude("Solarize", 9)) != ints(image)
    assert (inverted == (ints(image) >= 77)).all()
    assert np.unique(apply("Posterize", image, magnitude("Posterize", 9))).tolist() == [0, 128]


# Colours --------------------------------------------------------------------------------------------


def test_auto_contrast_stretches_each_channel_to_the_full_range_in_order():
    pixels = ints(noise(low=60, high=180))
    pixels[..., 2] //= 2
    image = Image.fromarray(pixels.astype(np.uint8))
    out = apply("AutoContrast", image, 0)
    for c in range(3):
        low, high = pixels[..., c].min(), pixels[..., c].max()
        assert (out[..., c].min(), out[..., c].max()) == (0, 255)
        assert np.abs(out[..., c] - (pixels[..., c] - low) * 255 / (high - low)).max() <= 1


def test_equalize_flattens_the_histogram_and_keeps_the_order():
    values = np.random.default_rng(0).gamma(2.0, 15.0, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    out = apply("Equalize", Image.fromarray(values), 0)
    for c in range(3):
        before, after = values[..., c].ravel(), out[..., c].ravel()

        def distance(v: np.ndarray) -> float:
            """Largest gap between the share of pixels below each level and a uniform distribution."""
            below = np.searchsorted(np.sort(v), np.arange(257)) / v.size
            return float(np.abs(below - np.arange(257) / 256).max())

        # A level cannot be split, so no map does better than about the share of the fullest one.
        fullest = np.bincount(before).max() / before.size
        assert distance(after) <= 2 * fullest < distance(before) / 4
        order = np.argsort(before, kind="stable")
        assert (np.diff(after[order]) >= 0).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_posterize_leaves_two_to_the_bits_levels_and_moves_values_down_only(bits):
    image = noise(64, 64)
    out = apply("Posterize", image, bits)
    assert len(np.unique(out)) == 2**bits
    moved = ints(image) - out
    assert moved.min() >= 0 and moved.max() < 2 ** (8 - bits)


def test_posterize_takes_the_whole_part_and_at_least_one_bit():
    image = noise()
    assert (apply("Posterize", image, 2.9) == apply("Posterize", image, 2)).all()
    assert (apply("Posterize", image, 0.4) == apply("Posterize", image, 1)).all()


@pytest.mark.parametrize("threshold", [1, 76.8, 128, 255])
def test_solarize_inverts_from_the_threshold_on_and_only_there(threshold):
    image = noise(64, 64)
    v, out = ints(image), apply("Solarize", image, threshold)
    assert (out == np.where(v >= threshold, 255 - v, v)).all()


@pytest.mark.parametrize("addition", [0, 11, 33.0, 110])
def test_solarize_add_lifts_the_dark_values_and_only_those(addition):
    image = noise(64, 64)
    v, out = ints(image), apply("SolarizeAdd", image, addition)
    assert (out == np.where(v < 128, v + int(addition), v)).all()


@pytest.mark.parametrize("factor", [0.1, 0.64, 1.9])
def test_color_moves_along_the_line_to_the_grey_picture(factor):
    image = noise()
    grey = ints(image.convert("L"))[..., None]
    expected = (grey + factor * (ints(image) - grey)).clip(0, 255)
    assert np.abs(apply("Color", image, factor) - expected).max() <= 1


@pytest.mark.parametrize("factor", [0.1, 0.64, 1.9])
def test_contrast_moves_along_the_line_to_the_mean_grey(factor):
    image = noise(low=0, high=200)
    mean = ints(image.convert("L")).mean()
    expected = (mean + factor * (ints(image) - mean)).clip(0, 255)
    assert np.abs(apply("Contrast", image, factor) - expected).max() <= 1.5


@pytest.mark.parametrize("factor", [0.1, 0.64, 1.9])
def test_brightness_multiplies(factor):
    image = noise()
    assert np.abs(apply("Brightness", image, factor) - (factor * ints(image)).clip(0, 255)).max() <= 1


def test_sharpness_smooths_below_one_and_sharpens_above():
    image = noise(low=80, high=170)

    def roughness(pixels: np.ndarray) -> float:
        return float(np.abs(np.diff(pixels, axis=1)).mean())

    flat = Image.new("RGB", (20, 20), (40, 90, 200))
    rough = [roughness(apply("Sharpness", image, f)) for f in (0.1, 0.64, 1.0, 1.9)]
    assert rough == sorted(rough) and rough[0] < rough[2] / 1.5 and rough[3] > 1.3 * rough[2]
    assert (apply("Sharpness", flat, 1.9) == ints(flat)).all()


@pytest.mark.parametrize("name", sorted(set(RANGES) - SIGNED - {"Sharpness"}))
def test_colour_operations_leave_every_pixel_in_its_place(name):
    """Shuffling the pixels first or last gives the same picture."""
    image, order = noise(), np.random.default_rng(1).permutation(40 * 56)

    def shuffled(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(-1, 3)[order].reshape(pixels.shape)

    first = apply(name, Image.fromarray(shuffled(np.asarray(image))), magnitude(name, 9))
    assert (first == shuffled(apply(name, image, magnitude(name, 9)))).all()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("m", [1, 5, 9, 20, 30])
def test_no_operation_is_a_colour_inversion(name, m):
    """On a picture of all values, no strength that rand_augment accepts turns v into 255 − v throughout."""
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2))
    assert np.abs(apply(name, ramp, magnitude(name, m)) - (255 - ints(ramp))).max() > 8


# Places ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.09, -0.09, 0.3, -0.3])
def test_shear_moves_a_pixel_in_proportion_to_its_distance_from_the_edge(slope):
    x, y = 240, 150
    ((moved_x, moved_y),) = mark(apply("ShearX", marked(x, y), slope))
    assert moved_y == y and abs(moved_x - (x - slope * y)) <= 1
    ((moved_x, moved_y),) = mark(apply("ShearY", marked(x, y), slope))
    assert moved_x == x and abs(moved_y - (y - slope * x)) <= 1


@pytest.mark.parametrize("pixels", [30, -30, 100, -100])
def test_translation_moves_a_pixel_by_so_many_pixels_on_a_large_picture(pixels):
    assert mark(apply("TranslateXabs", marked(240, 150), pixels)) == [(240 - pixels, 150)]
    assert mark(apply("TranslateYabs", marked(240, 150), pixels)) == [(240, 150 - pixels)]


@pytest.mark.parametrize("height, width", [(96, 96), (96, 400), (400, 96), (192, 192)])
def test_translation_shrinks_with_the_short_side_of_a_small_picture(height, width):
    """100 pixels of 384 are the same share of a smaller short side: 25 of 96, 50 of 192."""
    shift = min(height, width) * 100 // 384
    x, y = width // 2, height // 2
    assert mark(apply("TranslateXabs", marked(x, y, height, width), 100)) == [(x - shift, y)]
    assert mark(apply("TranslateYabs", marked(x, y, height, width), -100)) == [(x, y + shift)]


def test_the_strongest_translation_keeps_most_of_any_picture_in_view():
    for side in (16, 48, 64, 128, 384, 640):
        white = Image.new("RGB", (side, side), "white")
        assert (apply("TranslateXabs", white, 100) > 0).mean() > 0.7


@pytest.mark.parametrize("degrees", [9, -9, 30, -30])
def test_rotation_turns_counter_clockwise_about_the_centre(degrees):
    """A pixel at angle φ (counter-clockwise, y upwards) goes to φ + degrees, at the same distance."""
    x, y = 340, 150
    ((moved_x, moved_y),) = mark(apply("Rotate", marked(x, y), degrees))
    centre = complex(239.5, 199.5)
    start, end = (complex(a, -b) - centre.conjugate() for a, b in ((x, y), (moved_x, moved_y)))
    expected = start * np.exp(1j * np.deg2rad(degrees))
    assert abs(end - expected) < 1.5


@pytest.mark.parametrize("name", sorted(SIGNED))
def test_what_comes_in_from_outside_is_black_and_signs_are_mirror_images(name):
    white = Image.new("RGB", (400, 400), "white")
    value = magnitude(name, 30)
    plus, minus = apply(name, white, value), apply(name, white, -value)
    assert set(np.unique(plus)) == {0, 255} and (plus != minus).any()
    assert (plus == 0).mean() == pytest.approx((minus == 0).mean(), abs=0.01)


def test_left_stays_left():
    """A dark left half and a bright right half: no strength and no sign may exchange them."""
    pixels = np.full((48, 48, 3), 60, np.uint8)
    pixels[:, 24:] = 200
    image = Image.fromarray(pixels)
    for name in SIGNED:
        for value in (magnitude(name, 30), -magnitude(name, 30)):
            out = apply(name, image, value)
            columns = np.arange(48)
            dark, bright = ((out == v).all(-1) * columns for v in (60, 200))
            assert dark.sum() / (dark > 0).sum() < bright.sum() / (bright > 0).sum()


# rand_augment ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_picture_and_global_state_is_not_touched():
    image = noise()
    state = np.random.get_state()[1].copy()
    one, two = (ints(rand_augment(image, np.random.default_rng(3))) for _ in range(2))
    assert (one == two).all() and (np.random.get_state()[1] == state).all()
    pictures = {ints(rand_augment(image, np.random.default_rng(s))).tobytes() for s in range(30)}
    assert len(pictures) > 20


def test_arrays_come_back_as_arrays_with_the_same_pixels_as_pillow_pictures():
    image = noise()
    for seed in range(20):
        array = np.asarray(image).copy()
        before = array.copy()
        out = rand_augment(array, np.random.default_rng(seed))
        picture = rand_augment(image, np.random.default_rng(seed))
        assert out.dtype == np.uint8 and out.shape == array.shape and picture.mode == "RGB"
        assert (out == np.asarray(picture)).all() and (array == before).all()
        out[:] = 0  # writable, and its own


def recorded(monkeypatch, draws: int, **kwargs) -> list[list[tuple[str, float]]]:
    """What rand_augment called, per draw: operations replaced by ones that only take notes."""
    calls: list[list[tuple[str, float]]] = []

    def note(name):
        return lambda image, value: (calls[-1].append((name, value)), image)[1]

    table = {name: (note(name), low, high) for name, (_, low, high) in OPERATIONS.items()}
    monkeypatch.setattr(augment, "OPERATIONS", table)
    rng, image = np.random.default_rng(0), noise(2, 2)
    for _ in range(draws):
        calls.append([])
        rand_augment(image, rng, **kwargs)
    return calls


def test_two_operations_of_strength_nine_drawn_with_replacement(monkeypatch):
    draws = 7000
    calls = recorded(monkeypatch, draws)
    assert all(len(call) == 2 for call in calls)
    names = list(OPERATIONS)
    counts = np.zeros((14, 14))
    for (first, _), (second, _) in calls:
        counts[names.index(first), names.index(second)] += 1
    # 196 equally likely ordered pairs, the diagonal among them: χ² has mean 195 and deviation √390 ≈ 20.
    assert ((counts - draws / 196) ** 2 / (draws / 196)).sum() < 195 + 5 * 20
    values = {name: {v for call in calls for n, v in call if n == name} for name in names}
    for name in names:
        value = magnitude(name, 9)
        assert values[name] == ({value, -value} if name in SIGNED else {value})


def test_the_sign_is_negative_half_of_the_time(monkeypatch):
    signed = [value < 0 for call in recorded(monkeypatch, 4000) for name, value in call if name in SIGNED]
    assert abs(np.mean(signed) - 0.5) < 5 * 0.5 / np.sqrt(len(signed))


def test_n_and_m_are_obeyed(monkeypatch):
    calls = recorded(monkeypatch, 300, n=3, m=21)
    assert all(len(call) == 3 for call in calls)
    assert {abs(v) for call in calls for name, v in call if name == "Rotate"} == {magnitude("Rotate", 21)}


def test_zero_operations_give_a_copy():
    image = noise()
    out = rand_augment(image, np.random.default_rng(0), n=0)
    assert out is not image and (ints(out) == ints(image)).all()


@pytest.mark.parametrize(
    "image, kwargs, message",
    [
        (noise().convert("L"), {}, "image must be RGB, got L"),
        (noise().convert("RGBA"), {}, "image must be RGB, got RGBA"),
        ([[1]], {}, "image must be RGB, got list"),
        (np.zeros((4, 4)), {}, r"image must be \(H, W, 3\) uint8"),
        (np.zeros((4, 4, 3)), {}, r"image must be \(H, W, 3\) uint8, got \(4, 4, 3\) float64"),
        (np.zeros((0, 4, 3), np.uint8), {}, r"image must be \(H, W, 3\) uint8"),
        (noise(), {"n": -1}, "n must be a whole number"),
        (noise(), {"n": 1.5}, "n must be a whole number"),
        (noise(), {"m": 0}, r"m must lie in \[1, 30\], got 0"),
        (noise(), {"m": 31}, r"m must lie in \[1, 30\], got 31"),
        (noise(), {"m": float("nan")}, r"m must lie in"),
    ],
)
def test_refusals(image, kwargs, message):
    with pytest.raises(ValueError, match=message):
        rand_augment(image, np.random.default_rng(0), **kwargs)
