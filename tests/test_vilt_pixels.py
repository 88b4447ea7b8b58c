"""ViLT's input from images: sizes, numbers and masks, against Hugging Face's processor."""

import numpy as np
import pytest
import torch
from PIL import Image

from minivlp.data.own import read_rgb
from minivlp.models.published.pixels import resized
from minivlp.models.vilt import vilt_pixels

HUGGING_FACE_PIXELS = "transformers.models.vilt.image_processing_pil_vilt"


def shape_of(height, width, **settings):
    pixels, _ = vilt_pixels([np.zeros((height, width, 3), dtype=np.uint8)], **settings)
    return tuple(pixels.shape[2:])


def test_pixels_sizes():
    assert shape_of(480, 640) == (384, 512)
    assert shape_of(640, 426) == (576, 384)  # 576.9 pixels
    assert shape_of(100, 100) == (384, 384)
    assert shape_of(400, 1000) == (256, 608)  # 255.6 × 639: the longer side decides
    assert shape_of(30, 48, size=48, multiple=8) == (48, 72)


def test_no_image_has_more_than_228_patches():
    """12 × 19, where the paper says 12 × 20: int(384 · 1333/800) is 639, a pixel short of 640."""
    grids = {resized(384 + a, 384 + b) for a in range(0, 700, 7) for b in range(0, 700, 7)}
    assert max(h * w // 32**2 for h, w in grids) == 228
    assert (384, 608) in grids


def test_sizes_equal_hugging_face():
    module = pytest.importorskip(HUGGING_FACE_PIXELS, reason="transformers without its PIL processor")
    for height in range(50, 900, 13):
        for width in range(60, 900, 17):
            image = np.broadcast_to(np.uint8(0), (height, width, 3))
            expected = module.get_resize_output_image_size(
                image, 384, int(1333 / 800 * 384), 32, "channels_last"
            )
            if min(expected):
                assert resized(height, width) == expected
            else:
                with pytest.raises(ValueError, match="images must keep 32 pixels a side"):
                    resized(height, width)


def test_pixels_equal_hugging_face():
    """Outside truth: Hugging Face's processor, on photographs' shapes, padded to one batch."""
    module = pytest.importorskip(HUGGING_FACE_PIXELS, reason="transformers without its PIL processor")
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(300, 417), (500, 333), (90, 700)]
    ]
    expected = module.ViltImageProcessorPil()(images, return_tensors="pt")
    pixels, mask = vilt_pixels(images)
    assert torch.allclose(pixels, expected["pixel_values"].float(), atol=1e-6)
    assert torch.equal(mask, expected["pixel_mask"].bool())


def test_pixels_of_any_mode_and_their_mask():
    grey = Image.new("L", (64, 96), 255)
    pixels, mask = vilt_pixels([grey, np.zeros((64, 64, 3), dtype=np.uint8)], size=32, multiple=16)
    assert pixels.shape == (2, 3, 48, 32) and mask.dtype == torch.bool
    assert (pixels[0] == 1).all() and mask[0].all()
    assert (pixels[1, :, :32] == -1).all() and (pixels[1, :, 32:] == 0).all()
    assert mask[1, :32].all() and not mask[1, 32:].any()


def stored(folder, mode):
    """A picture of 4 × 3 squares in a file, of a kind that a plain convert("RGB") would spoil."""
    rng = np.random.default_rng(0)
    path = folder / f"{mode}.png"
    colours = np.kron(rng.integers(0, 256, (4, 3, 4)), np.ones((16, 16, 1))).astype(np.uint8)
    if mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(colours[..., :3]).save(path, exif=exif)
    elif mode == "I;16":
        Image.fromarray(colours[..., 0].astype(np.uint16) * 256 + 7).save(path)
    elif mode == "P":
        image = Image.fromarray(colours[..., :3]).quantize(8)
        image.save(path, transparency=3)
    elif mode == "CMYK":
        path = path.with_suffix(".tif")
        Image.fromarray(colours, "CMYK").save(path)
    else:
        Image.fromarray(colours).convert(mode).save(path)
    return path


@pytest.mark.parametrize("mode", ["turned", "I;16", "P", "CMYK", "RGBA", "LA", "L", "1"])
def test_pixels_of_a_file_are_those_of_the_reader_of_own_captions(mode, tmp_path):
    path = stored(tmp_path, mode)
    with Image.open(path) as image:
        pixels, _ = vilt_pixels([image], size=48, multiple=16)
    shown = read_rgb(path)
    assert shown.shape[:2] == ((48, 64) if mode == "turned" else (64, 48))
    assert torch.equal(pixels, vilt_pixels([shown], size=48, multiple=16)[0])
    assert pixels.max() - pixels.min() > 0.5  # something is seen


def test_a_picture_without_a_known_range_is_refused():
    with pytest.raises(ValueError, match="images must be pictures whose colours are known, got mode F"):
        vilt_pixels([Image.fromarray(np.ones((64, 64), np.float32))])


def test_pixels_refusals():
    for images, message in [
        ([], "images must hold at least one image"),
        ([np.zeros((8, 8, 3))], r"images must be PIL images or uint8 \(H, W, 3\), got float64"),
        ([np.zeros((8, 8), dtype=np.uint8)], "images must be PIL images or uint8"),
        (["cat.png"], "images must be PIL images .* got str"),
        ([np.zeros((20, 900, 3), dtype=np.uint8)], "images must keep 32 pixels a side"),
    ]:
        with pytest.raises(ValueError, match=message):
            vilt_pixels(images)
