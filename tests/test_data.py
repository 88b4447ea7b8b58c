"""EmojiVL: the loader checks what it reads, and the small preset's nouns are the ones drawn most alike."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from minivlp import data
from minivlp.data import CPU_NOUNS, TRAINING_ARTISTS, Scenes, load_emojivl, scenes
from minivlp.data import own as captions


@pytest.fixture(scope="module")
def emojivl():
    return load_emojivl()


def test_the_small_presets_nouns_are_those_drawn_most_alike(emojivl):
    """30 by margin: distance to the nearest other noun, less the distance to other artists' same noun."""
    candidates = [
        c
        for c in emojivl.nouns()
        if c.article == "a" and c.noun.isalpha() and set(TRAINING_ARTISTS) <= set(c.artists)
    ]
    n = len(candidates)
    tiles = np.stack([emojivl.sheets[a][[c.id for c in candidates]] for a in TRAINING_ARTISTS]).astype(float)
    alpha = tiles[..., 3:] / 255
    grey = tiles[..., :3] * alpha + 128 * (1 - alpha)  # (artists, n, 64, 64, 3)
    thumbs = grey.reshape(5, n, 8, 8, 8, 8, 3).mean((3, 5)).reshape(5, n, -1)
    # D[v, i, u, j]: mean squared difference between noun i by artist v and noun j by artist u
    D = np.stack([((thumbs[v, i] - thumbs) ** 2).mean(-1) for v in range(5) for i in range(n)])
    D = D.reshape(5, n, 5, n)
    margin = np.zeros(n)
    for v in range(5):
        to_others = np.delete(D[v], v, axis=1).mean(1)  # (n, n): noun i by v to noun j by the other four
        own = np.diag(to_others).copy()
        np.fill_diagonal(to_others, np.inf)
        margin += (to_others.min(1) - own) / 5
    ranked = [candidates[i].noun for i in np.argsort(-margin, kind="stable")]
    assert ranked[:30] == [noun for noun in CPU_NOUNS if noun not in ("dog", "guitar")]
    assert CPU_NOUNS[:2] == ("dog", "guitar") and len(CPU_NOUNS) == 32
    assert "guitar" in ranked[30:] and "dog" not in ranked  # fxemoji draws no dog


def test_nouns_are_found_by_name_or_refused(emojivl):
    assert [c.noun for c in emojivl.nouns(["guitar", "dog"])] == ["guitar", "dog"]
    every = emojivl.nouns()
    assert len({c.noun for c in every}) == len(every) > 400
    assert all(c.tier == "object" and c.split == "train" and c.countable and c.plural for c in every)
    zero_shot = next(c.noun for c in emojivl.concepts if c.split == "zeroshot" and c.countable)
    for name in (zero_shot, "grinning face", "unicornfish"):
        with pytest.raises(ValueError, match=f"names must be countable training nouns.*{name}"):
            emojivl.nouns(["dog", name])


# The folder ------------------------------------------------------------------------------------------------


def test_the_default_folder_is_read_once_and_read_only(emojivl):
    assert load_emojivl() is emojivl
    assert not any(sheet.flags.writeable for sheet in emojivl.sheets.values())


def test_artists_are_those_of_the_table(emojivl):
    """The column `has` counts for itself: one 0 or 1 per sheet, in the order of meta.json."""
    lines = (data.emojivl.FOLDER / "concepts.tsv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split("\t").index("has")
    for concept, line in zip(emojivl.concepts, lines[1:], strict=True):
        has = line.split("\t")[column]
        assert concept.artists == tuple(a for a, h in zip(emojivl.sheets, has, strict=True) if h == "1")


@pytest.fixture
def folder(tmp_path):
    """Five concepts in tiles of 4 pixels, two columns a sheet; `weaver` did not draw concept 3."""
    header = "id\tchar\tname_en\tname_zh\ttier\tnoun_a\tnoun_pl\tcountable\tsplit\tnear\tkw_en\tkw_zh"
    rows = [
        f"{i}\t{i}\tname {i}\t名\tobject\tan it{i}\tits{i}\t1\ttrain\t{'0,2' if i == 1 else ''}\ta|b\t甲|乙"
        for i in range(5)
    ]
    (tmp_path / "concepts.tsv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    meta = {"tile": 4, "cols": 2, "n": 5, "vendors": []}
    for k, name in enumerate(("noto", "weaver")):
        sheet = np.zeros((12, 8, 4), np.uint8)
        for i in range(5):
            if (i, name) != (3, "weaver"):
                sheet[i // 2 * 4 :, i % 2 * 4 :][:4, :4] = (10 * i, 100 * k, 0, 255)
        Image.fromarray(sheet).save(tmp_path / f"{name}.png")
        sha256 = hashlib.sha256((tmp_path / f"{name}.png").read_bytes()).hexdigest()
        meta["vendors"].append({"name": name, "file": f"{name}.png", "sha256": sha256})
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


def test_a_folder_with_other_artists_is_read(folder):
    e = load_emojivl(str(folder))
    assert list(e.sheets) == ["noto", "weaver"] and e.unseen_artists == ("weaver",)
    for k, sheet in enumerate(e.sheets.values()):
        assert sheet.shape == (5, 4, 4, 4)
        for i in (0, 1, 2, 4):
            assert (sheet[i] == (10 * i, 100 * k, 0, 255)).all()
    assert [c.artists for c in e.concepts[2:4]] == [("noto", "weaver"), ("noto",)]
    first, second = e.concepts[:2]
    assert (second.noun, second.article, second.plural, second.near) == ("it1", "an", "its1", (0, 2))
    assert (first.keywords, first.near, first.name_zh, first.countable) == (("a", "b"), (), "名", True)
    assert Scenes(e, nouns=e.nouns(), pairs="all").artists == ("noto",)
    assert len(Scenes(e, nouns=e.nouns(), artists=["weaver"], pairs="all").nouns) == 4


def rewrite(name, change):
    def damage(folder):
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return damage


def table(change):
    return rewrite("concepts.tsv", change)


def another_size(folder):
    """A sheet of the wrong size whose SHA-256 is right."""
    meta = json.loads((folder / "meta.json").read_text())
    Image.new("RGBA", (8, 8)).save(folder / "weaver.png")
    meta["vendors"][1]["sha256"] = hashlib.sha256((folder / "weaver.png").read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "meta.json").unlink(), FileNotFoundError, "no meta.json"),
        (lambda f: (f / "concepts.tsv").unlink(), FileNotFoundError, "no concepts.tsv"),
        (lambda f: (f / "weaver.png").unlink(), FileNotFoundError, "weaver.png is missing"),
        (rewrite("weaver.png", lambda b: b + b"\0"), ValueError, "weaver.png is damaged: its SHA-256"),
        (rewrite("meta.json", lambda b: b[:-9]), ValueError, "meta.json is not valid JSON"),
        (table(lambda b: b[: b.rindex(b"4\t4")]), ValueError, "concepts.tsv must have 5 rows, got 4"),
        (table(lambda b: b[: b.rindex(b"\t")]), ValueError, "concepts.tsv is damaged"),
        (table(lambda b: b.replace(b"noun_pl", b"plural")), ValueError, "concepts.tsv is damaged"),
        (table(lambda b: b.replace(b"0,2", b"0;2")), ValueError, "concepts.tsv is damaged"),
        (another_size, ValueError, "weaver.png must be 8 × 12 pixels, got 8 × 8"),
    ],
    ids=[
        "no meta", "no table", "no sheet", "other bytes", "broken meta", "a row short", "a row cut",
        "a column renamed", "a bad number", "small sheet",
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_file(folder, damage, error, message):
    load_emojivl(folder)
    damage(folder)
    with pytest.raises(error, match=message) as raised:
        load_emojivl(folder)
    assert str(folder) in str(raised.value)


def test_one_door_leads_to_all_data():
    assert data.captions_folder is captions.captions_folder
    assert data.coco_captions is captions.coco_captions
    assert data.Scenes is scenes.Scenes
