"""Evaluation: one who sees gets everything, one who sees half of the input gets exactly its chance."""

import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from minivlp.data import CPU_NOUNS, RELATIONS, EmojiVL, Scenes, scene_pixels
from minivlp.data.probes import hide_slots, retrieval_sets
from minivlp.evaluation import point as pointing
from minivlp.evaluation import rank as ranking
from minivlp.evaluation import vilt as ev
from minivlp.evaluation.interval import interval
from minivlp.models.vilt import Vilt, ViltConfig
from minivlp.text import WordPiece
from tests.test_probes import EMOJIVL, holds

NOUNS = EMOJIVL.nouns(CPU_NOUNS)
SIZES = dict(dim=16, layers=1, heads=2, hidden=32, patch=8, image_size=48, max_text_len=20)


class Recorded(Scenes):
    """Scenes that remember every picture they gave out, for the models below to look it up."""

    pictures: dict = {}  # noqa: RUF012

    def __getitem__(self, index):
        scene = super().__getitem__(index)
        return self.pictures.setdefault(scene.image.tobytes(), scene)


@pytest.fixture(scope="module")
def tokenizer() -> WordPiece:
    words = " ".join(c.noun for c in NOUNS)
    return WordPiece.train([f"a {words} {' '.join(RELATIONS)}"] * 9, 400)


@pytest.fixture(scope="module")
def tiny(tokenizer) -> Vilt:
    torch.manual_seed(0)
    return Vilt(ViltConfig(len(tokenizer), **SIZES))


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    monkeypatch.setattr(ev, "CANDIDATES", 16)
    monkeypatch.setattr(ev, "Scenes", Recorded)


class Stub(nn.Module):
    """What `evaluate` needs of a ViLT, with states made from the ids and the bytes of the picture."""

    def __init__(self, tokenizer):
        super().__init__()
        self.here, self.config, self.tokenizer = nn.Parameter(torch.zeros(1)), ViltConfig(patch=8), tokenizer

    def encode(self, ids, text_mask, pixels):
        assert text_mask.all()
        images = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        states = [self.states(row, image.tobytes()) for row, image in zip(ids.tolist(), images, strict=True)]
        text, image, pooled = (torch.stack(part) for part in zip(*states, strict=True))
        return {"text": text, "image": image, "pooled": pooled}

    def states(self, ids, image):
        V, N = len(self.tokenizer), 36
        match = torch.tensor([1.0 if self.accepts(ids, image) else -1.0])
        return torch.zeros(len(ids), V + N), torch.eye(N + 1, V + N), match

    def mlm_logits(self, text):
        return text[:, : len(self.tokenizer)]

    def itm_logits(self, pooled):
        return torch.cat([-pooled, pooled], -1)


class Oracle(Stub):
    """Reads the scene: fills masks, accepts what is true, and spreads a noun over the patches of its box."""

    def accepts(self, ids, image):
        text = self.tokenizer.decode(ids)
        return "[MASK]" not in text and holds(text, Recorded.pictures[image])

    def states(self, ids, image):
        tok, scene = self.tokenizer, Recorded.pictures[image]
        V, N = len(tok), 36
        text, patches = torch.zeros(len(ids), V + N), torch.zeros(N + 1, V + N)
        patches[1:, V:] = torch.eye(N)
        a, b = scene.slots
        true = [f"{x} {r} {y}" for r in RELATIONS for x, y in ((a, b), (b, a))]
        true = [tok.encode(caption) for caption in true if holds(caption, scene)]
        true += [[i for i in caption if i != tok.vocab["of"]] for caption in true]  # a phrase under one mask
        for row in ([tok.cls_id, *caption, tok.sep_id] for caption in true):
            if len(row) == len(ids) and all(a in (b, tok.mask_id) for a, b in zip(ids, row, strict=True)):
                text[range(len(row)), row] = 1
        for slot, (x1, y1, x2, y2) in zip(scene.slots, scene.boxes, strict=True):
            noun = tok.encode(slot)[-1]
            centres = [(8 * c + 4, 8 * r + 4) for r in range(6) for c in range(6)]
            inside = torch.tensor([float(x1 <= x < x2 and y1 <= y < y2) for x, y in centres])
            for position in [k for k, i in enumerate(ids) if i == noun]:
                text[position, V:] = 9 * inside
        return text, patches, torch.tensor([1.0 if self.accepts(ids, image) else -1.0])


class Hashed(Stub):
    """Accepts or not by a hash of what it reads: an arbitrary but fixed opinion."""

    def __init__(self, tokenizer, reads):
        super().__init__(tokenizer)
        self.reads = reads

    def accepts(self, ids, image):
        return hashlib.sha256(repr(self.reads(ids, image)).encode()).digest()[0] % 2


def run(model, tokenizer, emojivl=EMOJIVL, items=40, sets=1, **more):
    return ev.evaluate(model, tokenizer, emojivl, NOUNS, 48, items, sets, **more)


def only(*artists) -> EmojiVL:
    """A data folder that holds these sheets."""
    concepts = tuple(
        dataclasses.replace(c, artists=tuple(a for a in c.artists if a in artists)) for c in EMOJIVL.concepts
    )
    return EmojiVL(concepts, {a: EMOJIVL.sheets[a] for a in artists})


def test_one_who_sees_gets_everything(tokenizer):
    results = run(Oracle(tokenizer), tokenizer)
    for split in ("seen", "unseen"):
        assert results[split] == dict.fromkeys(ev.MEASURES, 1.0)
        assert results["details"][split]["pointing_any"]["value"] == 1
        assert results["details"][split]["masked_both"]["value"] == 1
        for one in results["details"][split].values():
            assert one["low"] < one["high"] == 1 and 0 < one["chance"] <= one["objects"] <= 1
    assert results["details"]["artists"]["unseen"] == ["fluent"]


def test_a_noun_is_right_when_all_its_pieces_are(tokenizer):
    class FirstPiece(Oracle):
        """Knows the first of several hidden pieces."""

        def states(self, ids, image):
            text, *rest = super().states(ids, image)
            for k in range(1, len(ids)):
                text[k] *= not ids[k - 1] == ids[k] == self.tokenizer.mask_id
            return text, *rest

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*tokenizer.tokens[:5], "left", "right", "above", "below", "of", *letters]
    spelling = WordPiece(words + [f"##{letter}" for letter in letters])
    for reader, value in ((Oracle, 1), (FirstPiece, 0)):
        results = run(reader(spelling), spelling, only("fluent"))
        assert results["unseen"]["masked_object"] == value
        assert results["unseen"]["masked_relation"] == 1


@pytest.mark.parametrize(
    "reads, blind_to",
    [
        (lambda ids, image: (sorted(ids), image), ["itm_swapped"]),
        (lambda ids, image: image, ["itm_swapped", "itm_random"]),
        (lambda ids, image: ids, ["itm_random"]),
    ],
    ids=["bag of words", "picture", "text"],
)
def test_one_who_sees_half_is_at_one_half(reads, blind_to, tokenizer):
    results = run(Hashed(tokenizer, reads), tokenizer, only("fluent"))
    assert all(results["unseen"][name] == 0.5 for name in blind_to)


def test_a_tie_is_no_hit(tokenizer):
    results = run(Hashed(tokenizer, lambda ids, image: 0), tokenizer, only("fluent"))
    assert results["unseen"]["retrieval_r1_64"] == 0
    assert results["unseen"]["masked_object"] == results["unseen"]["masked_relation"] == 0


def test_one_who_knows_the_objects_reaches_the_ceiling_of_objects(tokenizer):
    """Accepts a caption when the picture shows its two objects, wherever they are."""

    class Objects(Stub):
        def accepts(self, ids, image):
            slots = re.split(" (?:left of|right of|above|below) ", self.tokenizer.decode(ids))
            return set(slots) == set(Recorded.pictures[image].slots)

    details = run(Objects(tokenizer), tokenizer, only("fluent"), items=100, sets=2)["details"]["unseen"]
    for name in ("itm_random", "itm_swapped"):
        assert details[name]["value"] == pytest.approx(details[name]["objects"])
    assert details["itm_random"]["objects"] < 1 > details["retrieval_r1_64"]["objects"]


def test_a_real_model_gives_numbers_for_json(tiny, tokenizer):
    calls = []
    results = run(tiny, tokenizer, progress=lambda done, total: calls.append((done, total)))
    assert json.loads(json.dumps(results)) == results
    assert set(results) == {"seen", "unseen", "details"}
    for split in ("seen", "unseen"):
        assert tuple(results[split]) == ev.MEASURES
        for name, one in results["details"][split].items():
            assert 0 <= one["low"] <= one["value"] <= one["high"] <= 1
            assert one["items"] == (16 if name.startswith("retrieval") else 40)
    assert calls == sorted(calls) and calls[-1] == (calls[-1][1], calls[-1][1])
    assert run(tiny, tokenizer) == results, "equal seeds must give equal results"
    other = run(tiny, tokenizer, seed=2)["details"]
    assert other["seen"]["pointing"]["chance"] != results["details"]["seen"]["pointing"]["chance"]


@pytest.mark.parametrize(
    "artists, measured, absent", [(["fluent"], "unseen", "seen"), (["noto"], "seen", "unseen")]
)
def test_data_of_one_kind_of_artist(artists, measured, absent, tiny, tokenizer):
    results = run(tiny, tokenizer, only(*artists), items=8)
    assert results[absent] == {} and tuple(results[measured]) == ev.MEASURES
    text = ev.report(results)
    assert f"No {absent} artists" in text and f"{measured.capitalize()} artists: {artists[0]}" in text


def test_the_report_shows_every_number(tiny, tokenizer):
    results = run(tiny, tokenizer, items=8)
    lines = ev.report(results).splitlines()
    for split in ("seen", "unseen"):
        for name, one in results["details"][split].items():
            cells = [f"{one[key]:.3f}" for key in ("value", "low", "high", "chance", "objects")]
            rows = [line for line in lines if line.startswith(f"| {ev.NAMES[name]} |")]
            assert len(rows) == 2 and any(re.findall(r"\d\.\d{3}", row) == cells for row in rows)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_ranking_adds_both_heads_in_any_batch(tiny, tokenizer):
    """log p(match) and log p(each hidden piece), by each head's own softmax."""
    source = Scenes(EMOJIVL, NOUNS)
    scenes = [source[i] for i in range(70)]
    pixels = scene_pixels(scenes)
    caption, text = "a dog left of a guitar", "a [MASK] left of a [MASK]"
    hidden = tokenizer.encode("dog") + tokenizer.encode("guitar")
    assert len(hidden) == 2
    scores = ranking.rank(tiny, tokenizer, caption, (text, hidden), scenes)
    odds = ranking.match_odds(tiny, tokenizer, [caption] * 70, scenes)

    def read(text):
        ids = torch.from_numpy(tokenizer.batch([text])[0]).expand(70, -1)
        return ids[0], tiny.encode(ids, torch.ones_like(ids, dtype=torch.bool), pixels)

    with torch.no_grad():
        match = tiny.itm_logits(read(caption)[1]["pooled"])
        ids, states = read(text)
        words = tiny.mlm_logits(states["text"]).log_softmax(-1)[:, ids == tokenizer.mask_id]
    assert np.allclose(odds, match[:, 1] - match[:, 0], atol=1e-6)
    expected = match.log_softmax(-1)[:, 1] + words[:, 0, hidden[0]] + words[:, 1, hidden[1]]
    assert np.allclose(scores, expected, atol=1e-5)
    alone = ranking.rank(tiny, tokenizer, "above", ("above", []), scenes)
    odds = ranking.match_odds(tiny, tokenizer, ["above"] * 70, scenes)
    assert (alone == ranking.both_heads(odds, np.zeros(70))).all(), "a caption without nouns"
    assert np.isfinite(ranking.both_heads(np.float32([-1e4, 1e4]), np.zeros(2))).all()


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0], ids=["ties", "a little", "a lot"])
def test_few_second_passes_find_the_same_winners_as_all(spread, tiny, tokenizer, monkeypatch):
    """Both heads read every caption with every picture: the winners are the same, the passes are not."""
    scenes = retrieval_sets(Scenes(EMOJIVL, NOUNS, pairs="held_out"), 1, 16)[0]
    hidden = [hide_slots(scene, [0, 1], tokenizer) for scene in scenes]
    odds = np.random.default_rng(1).normal(size=(16, 16)) * spread + spread * np.eye(16)
    words = [ranking.word_scores(tiny, tokenizer, [text] * 16, scenes) for text in hidden]
    scores = ranking.both_heads(odds, np.stack(words))
    others = np.where(np.eye(16, dtype=bool), -np.inf, scores)
    expected = scores.diagonal() > others.max(1)
    read, word_scores = [], ranking.word_scores

    def counted(model, tok, texts, pictures):
        read.append(len(texts))
        return word_scores(model, tok, texts, pictures)

    monkeypatch.setattr(ranking, "word_scores", counted)
    assert ranking.wins(tiny, tokenizer, hidden, scenes, odds).tolist() == expected.tolist()
    assert 16 <= sum(read) <= 256 and (spread < 30 or sum(read) < 200)
    read.clear()
    assert ranking.wins(tiny, tokenizer, hidden, scenes, 1e4 * (2 * np.eye(16) - 1)).all()
    assert read == [16], "when all others are refused, only the own pictures are read again"


def test_no_log_probability_of_words_is_above_zero(tokenizer):
    """What `wins` rests on, for a model that is sure of every word."""

    class Sure(Oracle):
        def mlm_logits(self, text):
            return 1e4 * super().mlm_logits(text)

    source = Recorded(EMOJIVL, NOUNS, pairs="held_out")
    scenes = [source[i] for i in range(40)]
    hidden = [hide_slots(scene, [0, 1], tokenizer) for scene in scenes]
    scores = ranking.word_scores(Sure(tokenizer), tokenizer, hidden, scenes)
    assert scores.max() == 0 and (ranking.both_heads(np.zeros(40), scores) <= np.log(0.5)).all()


def test_retrieval_needs_both_heads_to_agree(tokenizer):
    """One whose matching head accepts all finds pictures by words, and none by that head alone."""

    class Words(Oracle):
        def accepts(self, ids, image):
            return True

    details = run(Words(tokenizer), tokenizer, only("fluent"))["details"]["unseen"]
    assert details["retrieval_r1_64"]["value"] == 1 and details["retrieval_itm"]["value"] == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model, tok: run(model, tok, items=7), "items must be even"),
        (lambda model, tok: ev.evaluate(model, tok, EMOJIVL, NOUNS[:7], 48, 4, 1), "16 different meanings"),
        (
            lambda model, tok: ranking.match_odds(model, tok, ["a dog " * 10], [Scenes(EMOJIVL)[0]]),
            "20 tokens",
        ),
        (lambda model, tok: pointing.plan(model, tok, Scenes(EMOJIVL)[0], " "), "at least one word"),
        (lambda model, tok: interval([], []), "at least one hit"),
        (lambda model, tok: interval([1, 0], [1]), "one a cluster"),
    ],
)
def test_refusals(call, message, tiny, tokenizer):
    with pytest.raises(ValueError, match=message):
        call(tiny, tokenizer)


# Pointing


def test_patches_inside_a_box():
    """Centres are at 4, 12, 20 …; a box holds its left and upper edge, not the others."""
    boxes = np.array([[4, 12, 13, 21], [0, 0, 48, 48], [5, 4, 12, 13], [4, 5, 13, 12]])
    scene = dataclasses.replace(Scenes(EMOJIVL)[0], boxes=boxes)
    inside = pointing.patches_inside(scene, 8).reshape(4, 6, 6)
    assert np.argwhere(inside[0]).tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert inside[1].all() and not inside[2:].any()


def test_the_plan_of_a_scene(tiny, tokenizer):
    scene = Scenes(EMOJIVL, NOUNS)[0]
    words, plan = pointing.plan(tiny, tokenizer, scene)
    assert words == scene.caption.split() and plan.shape == (len(words), 6, 6)
    assert np.allclose(plan.sum((1, 2)), 1 / len(words), atol=1e-6)
    for iters, differs in ((50, False), (1000, True)):
        again = pointing.plan(tiny, tokenizer, scene, iters=iters)[1]
        assert np.array_equal(again, plan) != differs


def test_words_of_several_pieces_are_added_up_and_unknown_words_stand_alone(tiny, tokenizer):
    letters = WordPiece([*tokenizer.tokens[:5], "a", "d", "##o", "##g", "of"])
    model = Vilt(ViltConfig(len(letters), **SIZES))
    words, plan = pointing.plan(model, letters, Scenes(EMOJIVL)[0], "a dog [MASK] ox ox of")
    assert words == ["a", "dog", "[MASK]", "[UNK]", "[UNK]", "of"]
    assert np.allclose(plan.sum((1, 2)) * 8, [1, 3, 1, 1, 1, 1], atol=1e-5)


# Intervals


def test_an_interval_of_independent_items_is_wilsons():
    stats = pytest.importorskip("scipy.stats", reason="scipy holds Wilson's interval for independent items")
    for hits, n in ((700, 1000), (3, 1000), (0, 400), (1000, 1000)):
        expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
        found = interval([1] * hits + [0] * (n - hits), range(n))
        assert np.allclose(found, expected, atol=3e-4)


def test_copies_of_an_item_add_nothing():
    rng = np.random.default_rng(0)
    hits = rng.random(60) < 0.7
    once = interval(hits, range(60))
    assert np.allclose(interval(np.repeat(hits, 20), np.repeat(np.arange(60), 20)), once, atol=1e-9)
    assert interval([1, 1, 0, 1], ["one pair"] * 4)[1] - interval([1, 1, 0, 1], "abcd")[0] > 0.5


def test_intervals_cover_the_truth_when_items_of_a_pair_hang_together():
    """Beta-binomial clusters with mean 0.8: 95 of 100 intervals hold it, of naive ones far fewer."""
    rng, covered, naive, runs = np.random.default_rng(0), 0, 0, 400
    for _ in range(runs):
        sizes = rng.integers(10, 30, 50)
        hits = np.concatenate([rng.random(n) < p for n, p in zip(sizes, rng.beta(4, 1, 50), strict=True)])
        low, high = interval(hits, np.repeat(np.arange(50), sizes).tolist())
        covered += low <= 0.8 <= high
        low, high = interval(hits, range(len(hits)))
        naive += low <= 0.8 <= high
    assert 0.925 < covered / runs < 0.975 and naive / runs < 0.75
