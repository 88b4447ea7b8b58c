"""Own captions: every good line arrives, every bad one is reported, no bad picture waits for the training."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivlp.data.own import FORMATS, Captions, captions_folder, coco_captions, split


def picture(folder: Path, name: str = "a.png", colour=(200, 30, 60), size=(5, 4)) -> np.ndarray:
    Image.new("RGB", size, colour).save(folder / name)
    return np.full((size[1], size[0], 3), colour, np.uint8)


def noise(folder: Path, name: str, size: int = 64) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def write(folder: Path, *lines: object) -> Path:
    """captions.jsonl: a dict or list becomes JSON, bytes stay as they are."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "captions.jsonl").write_bytes(b"\n".join(raw) + b"\n")
    return folder


def line(image="a.png", caption="a dog") -> dict:
    return {"image": image, "caption": caption}


def test_items_are_pictures_captions_and_sources_in_the_order_of_the_file(tmp_path):
    red, blue = picture(tmp_path), picture(tmp_path, "b.png", (0, 0, 250), (3, 7))
    write(
        tmp_path,
        line(),
        b"",
        line("b.png", ["a cat ", "zwei K\u00e4tzchen", "\u4e00\u53ea\u732b"]),
        line("./a.png"),
    )
    dataset = captions_folder(tmp_path)
    assert len(dataset) == 5 and dataset.problems == []
    assert [item.caption for item in dataset] == ["a dog", "a cat", "zwei Kätzchen", "一只猫", "a dog"]
    assert [item.source for item in dataset] == [f"captions.jsonl:{n}" for n in (1, 3, 3, 3, 4)]
    assert dataset.names == ("a.png", "b.png", "b.png", "b.png", "a.png")
    for item, expected in zip(dataset, [red, blue, blue, blue, red], strict=True):
        assert item.image.dtype == np.uint8 and (item.image == expected).all()


def test_equal_folders_make_equal_datasets_and_items_are_independent(tmp_path):
    picture(tmp_path)
    write(tmp_path, line(), line(caption="two dogs"))
    first, second = captions_folder(tmp_path), captions_folder(str(tmp_path))
    first[0].image[:] = 0  # a writable copy: spoiling it must not spoil the dataset
    for a, b in zip(first, second, strict=True):
        assert (a.image == b.image).all() and (a.caption, a.source) == (b.caption, b.source)
    assert first[-1].caption == first[np.int64(1)].caption == "two dogs"
    assert pickle.loads(pickle.dumps(first))[1].caption == "two dogs"  # so that workers can be spawned
    with pytest.raises(IndexError):
        first[2]


BAD_LINES = {
    "malformed": (b'{"image": "a.png", "caption": ', "is not valid JSON"),
    "deeply nested": (b"[" * 200_000, "is not valid JSON"),
    "not UTF-8": (b'{"image": "a.png", "caption": "caf\xe9"}', "is not UTF-8"),
    "not an object": (["a.png", "a dog"], "must be a JSON object, got list"),
    "no image": ({"caption": "a dog"}, "has no 'image'"),
    "no caption": ({"image": "a.png"}, "has no 'caption'"),
    "image is a number": (line(image=3), "'image' must be str, got int"),
    "caption is null": (line(caption=None), "'caption' must be str or list, got NoneType"),
    "empty caption": (line(caption=" \t"), "caption is empty"),
    "no captions": (line(caption=[]), "the list of captions is empty"),
    "half a character": (b'{"image": "a.png", "caption": "\\ud83d"}', "half a character"),
    "missing file": (line("none.png"), "image 'none.png' does not exist"),
    "folder": (line("."), "image '.' does not exist"),
    "parent": (line("../outside.png"), "image '../outside.png' lies outside the folder"),
    "detour": (line("x/../../outside.png"), "lies outside the folder"),
    "link": (line("link.png"), "image 'link.png' lies outside the folder (it is a link)"),
    "NUL": (line("a\0.png"), "cannot be read"),
    "very long": (line("a" * 5000), "cannot be read"),
    "text file": (line("text.png"), "is not a picture of a known kind"),
    "empty file": (line("empty.png"), "is not a picture of a known kind"),
    "truncated JPEG": (line("cut.jpg"), "cannot be read (image file is truncated"),
    "truncated PNG": (line("cut.png"), "cannot be read"),
    "wrong checksum": (line("flipped.png"), "cannot be read (broken PNG file"),
    "PostScript": (line("drawing.eps"), "is not a picture of a known kind"),
    "float TIFF": (line("float.tif"), "mode F without a known range"),
}


@pytest.fixture
def folder(tmp_path):
    """A good picture a.png among broken ones, inside a directory with a picture beside it."""
    inside = tmp_path / "set"
    inside.mkdir()
    picture(inside)
    picture(tmp_path, "outside.png")
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "text.png").write_text("not a picture")
    (inside / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "cut.png"):
        whole = noise(inside, name).read_bytes()
        (inside / name).write_bytes(whole[: len(whole) * 2 // 3])
    damaged = bytearray(noise(inside, "flipped.png").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (inside / "flipped.png").write_bytes(damaged)
    Image.new("RGB", (4, 4)).save(inside / "drawing.eps")
    Image.fromarray(np.ones((4, 4), np.float32)).save(inside / "float.tif")
    return inside


@pytest.mark.parametrize("story", BAD_LINES)
def test_a_bad_line_is_reported_by_number_and_skipped_or_refused(folder, story):
    bad, message = BAD_LINES[story]
    write(folder, line(), bad, line(caption="a cat"))
    dataset = captions_folder(folder, on_error="skip")
    assert [item.caption for item in dataset] == ["a dog", "a cat"]
    assert len(dataset.problems) == 1
    assert dataset.problems[0].startswith("captions.jsonl line 2: ") and message in dataset.problems[0]
    with pytest.raises(ValueError) as caught:
        captions_folder(folder, on_error="stop")
    assert str(caught.value) == dataset.problems[0]


def test_all_bad_lines_together_are_all_reported_in_order(folder):
    write(folder, *(bad for bad, _ in BAD_LINES.values()), line())
    dataset = captions_folder(folder)
    assert len(dataset) == 1
    for number, (problem, (_, message)) in enumerate(
        zip(dataset.problems, BAD_LINES.values(), strict=True), 1
    ):
        assert problem.startswith(f"captions.jsonl line {number}: ") and message in problem
    with pytest.raises(ValueError, match=r"captions\.jsonl line 1: "):
        captions_folder(folder, on_error="stop")


def test_names_from_windows_and_with_accents_of_either_form_find_their_files(tmp_path):
    """macOS takes accents apart, é into e and its accent; Windows parts folders by a backslash."""
    (tmp_path / "sub").mkdir()
    composed, apart = "caf\u00e9.png", "cafe\u0301 2.png"
    for name in (composed, apart, "b.png"):
        picture(tmp_path / "sub", name)
    names = [
        "sub/cafe\u0301.png",
        "sub\\caf\u00e9.png",
        "sub/caf\u00e9 2.png",
        "sub\\cafe\u0301 2.png",
        "sub\\b.png",
    ]
    dataset = captions_folder(write(tmp_path, *map(line, names)))
    wanted = [composed, composed, apart, apart, "b.png"]
    assert dataset.problems == [] and list(dataset.names) == [f"sub/{name}" for name in wanted]
    assert len(list(dataset)) == 5
    picture(tmp_path, "sub\\b.png", (1, 2, 3))  # a name that is there as written comes first
    assert captions_folder(tmp_path)[4].image[0, 0].tolist() == [1, 2, 3]
    picture(tmp_path, "outside.png")
    inside = write(tmp_path / "sub", line("b.png"), line("..\\outside.png"))
    assert "lies outside the folder" in captions_folder(inside).problems[0]


def test_damaged_metadata_is_no_fault_of_the_pixels(tmp_path):
    for name in ("a.png", "a.webp", "a.jpg"):
        Image.new("RGB", (9, 9), "red").save(tmp_path / name, exif=b"Exif\x00\x00not a TIFF file", quality=90)
    dataset = captions_folder(write(tmp_path, *(line(f"a.{end}") for end in ("png", "webp", "jpg"))))
    assert dataset.problems == [] and all(item.image.mean(axis=(0, 1))[0] > 240 for item in dataset)


def test_an_absolute_path_is_outside_even_if_it_exists(folder):
    write(folder, line(), line(str(folder.parent / "outside.png")))
    assert "lies outside the folder" in captions_folder(folder).problems[0]


def test_good_captions_of_a_list_survive_bad_ones(tmp_path):
    picture(tmp_path)
    dataset = captions_folder(write(tmp_path, line(caption=["a dog", "", 7, "a hound"])))
    assert [item.caption for item in dataset] == ["a dog", "a hound"]
    assert dataset.problems == [
        "captions.jsonl line 1: caption 2 of the list is empty",
        "captions.jsonl line 1: caption 3 of the list must be str, got int",
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem(tmp_path):
    picture(tmp_path)
    lines = b"\xef\xbb\xbf" + json.dumps(line()).encode() + b"\r\n\r\n" + json.dumps(line()).encode()
    (tmp_path / "captions.jsonl").write_bytes(lines)
    dataset = captions_folder(tmp_path)
    assert len(dataset) == 2 and dataset.problems == []


def test_each_picture_is_decoded_once_for_the_check(tmp_path, monkeypatch):
    from minivlp.data import own as captions

    picture(tmp_path), picture(tmp_path, "b.png")
    decoded, read_rgb = [], captions.read_rgb
    monkeypatch.setattr(captions, "read_rgb", lambda path: decoded.append(Path(path).name) or read_rgb(path))
    captions_folder(write(tmp_path, line(), line(), line("b.png", ["x", "y"]), line()))
    assert decoded == ["a.png", "b.png"]


def test_a_picture_damaged_later_is_named(tmp_path):
    picture(tmp_path)
    dataset = captions_folder(write(tmp_path, line()))
    (tmp_path / "a.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"captions\.jsonl:1: image 'a\.png' can no longer be read"):
        dataset[0]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="path must be a folder"):
        captions_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"path must be a folder with a captions\.jsonl"):
        captions_folder(tmp_path)
    with pytest.raises(ValueError, match="on_error must be"):
        captions_folder(tmp_path, on_error="ignore")
    for lines, first in [
        ((), "got none$"),
        ((line("b.png"), b"?"), "first problem: .* line 1: image 'b.png'"),
    ]:
        with pytest.raises(ValueError, match=f"path must yield at least one good caption, .*{first}"):
            captions_folder(write(tmp_path, *lines))


# Kinds of pictures --------------------------------------------------------------------------------


def loaded(folder: Path, name: str) -> np.ndarray:
    return captions_folder(write(folder, line(name)))[0].image


@pytest.mark.parametrize(
    "mode, name, colour, expected",
    [
        ("L", "a.png", 100, (100, 100, 100)),
        ("1", "a.png", 1, (255, 255, 255)),
        ("RGB", "a.bmp", (1, 2, 3), (1, 2, 3)),
        ("RGB", "a.webp", (0, 0, 255), (0, 0, 255)),
        ("RGBA", "a.png", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", "a.png", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", "a.png", (0, 100, 200, 51), (204, 224, 244)),  # a fifth of it over four fifths of white
        ("LA", "a.png", (0, 0), (255, 255, 255)),
        ("CMYK", "a.tif", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", "a.jpg", (255, 0, 255, 0), (0, 255, 0)),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path, mode, name, colour, expected):
    Image.new(mode, (16, 16), colour).save(tmp_path / name, **({"lossless": True} if "webp" in name else {}))
    image = loaded(tmp_path, name)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).max() <= (3 if name.endswith("jpg") else 0)


def test_a_palette_keeps_its_colours_and_its_transparent_entry_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.gif", transparency=1)
    assert loaded(tmp_path, "plain.png").tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert loaded(tmp_path, "clear.gif").tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path):
    Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert loaded(tmp_path, "a.png")[0, :, 0].tolist() == [0, 0, 1, 128, 255]


# What a camera stores, given the upright picture; the viewer turns or mirrors it back.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = np.zeros((24, 32, 3), np.uint8)
    upright[:8, :16] = 255  # a bright bar in the upper left: different under all eight orientations
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = loaded(tmp_path, "a.jpg")
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 3


def test_an_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert loaded(tmp_path, "a.gif")[0, 0].tolist() == [255, 0, 0]


def test_pillow_knows_every_format():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


# COCO ---------------------------------------------------------------------------------------------


def coco(folder: Path, images: list, annotations: list) -> Path:
    (folder / "captions.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": annotations})
    )
    return folder / "captions.json"


def test_coco_captions_follow_the_annotations(tmp_path):
    (tmp_path / "val").mkdir()
    red, blue = picture(tmp_path / "val"), picture(tmp_path / "val", "b.png", (0, 0, 250))
    images = [{"id": 9, "file_name": "a.png", "width": 5}, {"id": 4, "file_name": "b.png"}]
    annotations = [
        {"id": 1, "image_id": 4, "caption": "blue\n"},
        {"id": 2, "image_id": 9, "caption": "red"},
        {"id": 3, "image_id": 4, "caption": "sky"},
    ]
    dataset = coco_captions(coco(tmp_path, images, annotations), tmp_path / "val")
    assert [item.caption for item in dataset] == ["blue", "red", "sky"]
    assert [item.source for item in dataset] == [f"captions.json:annotations[{i}]" for i in range(3)]
    for item, expected in zip(dataset, (blue, red, blue), strict=True):
        assert (item.image == expected).all()
    assert dataset.problems == []


def test_coco_problems_are_reported_by_entry(tmp_path):
    picture(tmp_path)
    images = [
        {"id": 1, "file_name": "a.png"}, {"id": 2}, {"id": 1, "file_name": "b.png"}, "c.png",
        {"id": 5, "file_name": "none.png"}, {"id": 6, "file_name": "../../secret.png"},
        {"id": True, "file_name": "a.png"},
    ]  # fmt: skip
    annotations = [
        {"image_id": 1, "caption": "good"}, {"image_id": 2, "caption": "x"}, {"image_id": 1},
        {"image_id": 1, "caption": ""}, {"image_id": 5, "caption": "x"}, {"image_id": 6, "caption": "x"},
        {"image_id": 1, "caption": ["x"]}, {"image_id": [1], "caption": "x"},
    ]  # fmt: skip
    path = coco(tmp_path, images, annotations)
    dataset = coco_captions(path, tmp_path)
    assert [item.caption for item in dataset] == ["good"]
    assert dataset.problems == [
        "captions.json images[1]: has no 'file_name'",
        "captions.json images[2]: id 1 occurs twice",
        "captions.json images[3]: must be a JSON object, got str",
        "captions.json images[6]: 'id' must be int or str, got bool",
        "captions.json annotations[1]: image_id 2 is not among the images",
        "captions.json annotations[2]: has no 'caption'",
        "captions.json annotations[3]: caption is empty",
        "captions.json annotations[4]: image 'none.png' does not exist",
        "captions.json annotations[5]: image '../../secret.png' lies outside the folder",
        "captions.json annotations[6]: 'caption' must be str, got list",
        "captions.json annotations[7]: 'image_id' must be int or str, got list",
    ]
    with pytest.raises(ValueError, match=r"captions\.json images\[1\]: has no 'file_name'"):
        coco_captions(path, tmp_path, on_error="stop")


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"images": {}, "annotations": []}', "\ufffe"])
def test_a_file_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "captions.json").write_text(text, encoding="utf-16" if text == "\ufffe" else "utf-8")
    with pytest.raises(ValueError, match=r'json_path must hold {"images"'):
        coco_captions(tmp_path / "captions.json", tmp_path)


def test_coco_refusals(tmp_path):
    with pytest.raises(ValueError, match="json_path must be a file"):
        coco_captions(tmp_path / "none.json", tmp_path)
    path = coco(tmp_path, [], [])
    with pytest.raises(ValueError, match="image_folder must be a folder"):
        coco_captions(path, tmp_path / "none")
    with pytest.raises(ValueError, match="image_folder must yield at least one good caption, got none"):
        coco_captions(path, tmp_path)


# Split --------------------------------------------------------------------------------------------


def many(names: list[str], problems: tuple[str, ...] = ()) -> Captions:
    from minivlp.data.own import Entry

    entries = [Entry(name, f"{name} {k}", "captions.jsonl:1") for k in range(2) for name in names]
    return Captions(Path("."), entries, list(problems))


def test_the_captions_of_a_picture_stay_on_one_side_and_none_is_lost():
    dataset = many([f"{i}.png" for i in range(500)], ("captions.jsonl line 3: caption is empty",))
    train, validation = split(dataset, 0.2)
    assert not set(train.names) & set(validation.names)
    assert sorted(train.names + validation.names) == sorted(dataset.names)
    assert train.problems == validation.problems == dataset.problems
    # 500 pictures, each with probability 0.2: four standard deviations are 4 · √(500 · 0.2 · 0.8) ≈ 36.
    assert abs(len(set(validation.names)) - 100) < 36


def test_a_picture_keeps_its_side_when_others_are_added_or_the_order_changes():
    names = [f"{i}.png" for i in range(300)]
    few, more = split(many(names[:200])), split(many(names[::-1]))
    for side in (0, 1):
        assert set(few[side].names) == set(more[side].names) & set(names[:200])


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
def test_no_side_is_empty(share):
    for n in range(20):
        sides = split(many([f"{n}.png", f"{n + 1}.jpg"]), share)
        assert [len(set(side.names)) for side in sides] == [1, 1]


def test_split_refusals():
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="validation must lie inside"):
            split(many(["a", "b"]), share)
    with pytest.raises(ValueError, match="dataset must hold at least two different images"):
        split(many(["a"]))
