"""The dual encoder's evaluation: one who sees gets everything, one who sees nothing its chance."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from minivlp.data import TRAINING_ARTISTS, EmojiVL, trained_concepts
from minivlp.data.drawings import Portraits
from minivlp.data.names import PROMPTS, name_tokenizer, named
from minivlp.evaluation import dual as ev
from minivlp.evaluation.match import Matcher
from minivlp.recipes import recipe_class
from minivlp.recipes.dual import Clip, DualSettings
from tests.tiny import DUAL_SIZES, few

EMOJIVL = few()
KNOWN = trained_concepts(EMOJIVL, TRAINING_ARTISTS)
TOKENIZER = name_tokenizer(KNOWN, "en")


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    monkeypatch.setattr(ev, "CANDIDATES", 4)


class Sees:
    """A matcher that knows each drawing by its pixels, each name in a prompt by its text, and no scenes."""

    def __init__(self, blind: bool = False):
        self.blind, self.model = blind, type("M", (), {"config": type("C", (), {"image_size": 32})})
        drawings = [(c, a) for c in EMOJIVL.concepts for a in c.artists]
        pixels = Portraits(EMOJIVL, 32).plain([c.id for c, _ in drawings], [a for _, a in drawings])
        self.of_picture = {x.numpy().tobytes(): c.id for x, (c, _) in zip(pixels, drawings, strict=True)}
        self.of_text = {p.format(named(c, "en")): c.id for c in EMOJIVL.concepts for p in PROMPTS["en"]}

    def pictures(self, pixels):
        return self._sets([self.of_picture.get(x.numpy().tobytes(), 0) for x in pixels])

    def texts(self, texts):
        return self._sets([self.of_text.get(text, 0) for text in texts])

    def ensembles(self, names, prompts):
        return [self.texts([prompts[-1].format(name) for name in names])]

    def _sets(self, ids):
        sets = torch.eye(len(EMOJIVL.concepts))[[0 if self.blind else i for i in ids]][:, None]
        return sets, torch.ones(sets.shape[:2], dtype=torch.bool)


def run(matcher, emojivl=EMOJIVL, language="en", **more) -> dict:
    return ev.evaluate_dual(matcher, emojivl, language, sets=2, **more)


def test_one_who_sees_gets_everything_and_one_who_is_blind_nothing():
    seeing, blind = run(Sees()), run(Sees(blind=True))
    for split in ("seen", "unseen"):
        for name, value in seeing[split].items():
            if not name.startswith(("scene", "pixels")):
                assert value == 1, name
                assert blind[split][name] == 0 or not name.endswith("r1"), "a tie is no hit"
        assert {m["value"] for tier in seeing["details"]["tiers"][split].values() for m in tier.values()} == {
            1
        }


def test_a_name_that_looks_the_same_counts_but_not_as_the_exact_one():
    a, b, c = KNOWN[:3]
    a = dataclasses.replace(a, near=(b.id,))
    scores = np.array([[0.5, 0.9, 0.7]])
    answers = ev.Answers.of(scores, [a], [a, b, c])
    assert answers.rank.tolist() == [0] and answers.exact.tolist() == [2]
    assert answers.measures("x")["x_r1"]["value"] == 1
    assert answers.measures("x", exact=True)["x_r1"]["value"] == 0
    assert answers.measures("x")["x_r1"]["chance"] == pytest.approx(2 / 3)
    assert answers.tiers()[a.tier]["near_r1"]["value"] == 1 == answers.tiers()[a.tier]["exact_r5"]["value"]


def test_the_floor_finds_the_nearest_drawing():
    portraits = Portraits(EMOJIVL, 32)
    drawings = [(c, "noto") for c in KNOWN]
    pixels = portraits.plain([c.id for c in KNOWN], ["noto"] * len(KNOWN))
    assert (ev.nearest_pixels(portraits, drawings, pixels, KNOWN, ["noto", "twemoji"]).rank == 0).all()
    answers = ev.nearest_pixels(portraits, drawings, pixels, KNOWN, ["twemoji"])
    assert 0.1 < (answers.rank == 0).mean() < 1


@pytest.mark.parametrize("objective", ["clip", "siglip", "filip"])
def test_a_real_model_gives_numbers_for_json_and_a_report_of_all(objective):
    model = recipe_class(objective)(DualSettings(**DUAL_SIZES), tokens=TOKENIZER.tokens).model.eval()
    calls = []
    matcher = Matcher(model, TOKENIZER, objective == "filip")
    results = run(matcher, progress=lambda done, total: calls.append((done, total)))
    assert json.loads(json.dumps(results)) == results and run(matcher) == results
    assert calls == [(i, 8) for i in range(1, 9)]
    assert "pixels_r1" in results["unseen"] and "pixels_r1" not in results["seen"]
    text = ev.report_dual(results)
    for split in ("seen", "unseen"):
        assert {m["items"] for n, m in results["details"][split].items() if n.startswith("scene")} == {8}
        for m in results["details"][split].values():
            assert 0 <= m["low"] <= m["value"] <= m["high"] <= 1 and 0 < m["chance"] <= 1
            assert f"{m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f}" in text
    zeroshot = results["details"]["unseen"]
    assert zeroshot["zeroshot_r1"]["items"] == zeroshot["zeroshot_all_r1"]["items"] < len(KNOWN)
    assert zeroshot["zeroshot_r1"]["chance"] > zeroshot["zeroshot_all_r1"]["chance"]


def test_data_without_an_unseen_artist():
    concepts = tuple(
        dataclasses.replace(c, artists=tuple(a for a in c.artists if a == "noto")) for c in EMOJIVL.concepts
    )
    results = run(Sees(), EmojiVL(concepts, {"noto": EMOJIVL.sheets["noto"]}))
    assert results["unseen"] == {} and results["seen"]["classification_r1"] == 1
    assert "## No unseen artists" in ev.report_dual(results)


def test_chinese_names_have_no_scenes():
    tokenizer = name_tokenizer(KNOWN, "zh")
    matcher = Matcher(Clip(DualSettings(**DUAL_SIZES), tokens=tokenizer.tokens).model.eval(), tokenizer)
    results = run(matcher, language="zh")
    assert "scenes_r1" not in results["unseen"] and "classification_r1" in results["unseen"]
