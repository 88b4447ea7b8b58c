"""Questions and statements: true by the boxes, and balanced so that one half of the input is never enough."""

import re
from collections import Counter, defaultdict

import pytest
import torch
from torch import nn

from minivlp.data import CPU_NOUNS
from minivlp.data import questions as q
from minivlp.models.vilt import Vilt, ViltConfig
from minivlp.recipes.nlvr2 import Nlvr2Recipe
from minivlp.recipes.tasks import TaskRecipe
from minivlp.recipes.vilt import ViltSettings
from minivlp.recipes.vqa import VqaRecipe
from minivlp.text import WordPiece
from tests.test_probes import EMOJIVL, holds, stands

NOUNS = EMOJIVL.nouns(CPU_NOUNS[:12])
ANSWERS = q.answers(NOUNS)


@pytest.fixture(scope="module")
def asked() -> list[q.Question]:
    return q.questions(EMOJIVL, NOUNS, 48, 320, pairs="train")


@pytest.fixture(scope="module")
def stated() -> list[q.Statement]:
    return q.statements(EMOJIVL, NOUNS, 48, 320, pairs="train")


@pytest.fixture(scope="module")
def tokenizer(asked, stated) -> WordPiece:
    return WordPiece.train([item.text for item in [*asked, *stated]] * 2, 300)


@pytest.fixture(scope="module")
def model(tokenizer) -> Vilt:
    torch.manual_seed(0)
    sizes = dict(dim=16, layers=1, heads=2, hidden=32, patch=8, image_size=48, max_text_len=20)
    return Vilt(
        ViltConfig(len(tokenizer), **sizes, num_answers=len(ANSWERS), nlvr2=True, image_types=2)
    ).eval()


@pytest.fixture
def recipe(tokenizer):
    """`recipe(VqaRecipe, blind="text")` → the recipe of these nouns, with a small vocabulary."""

    def make(kind: type[TaskRecipe], blind: str | None = None, longest: int = 20) -> TaskRecipe:
        settings = ViltSettings(nouns=CPU_NOUNS[:12], max_text_len=longest)
        return kind(settings, {"blind": blind}, tokenizer.tokens)

    return make


def picture(scene) -> bytes:
    return scene.image.tobytes()


def test_answers_follow_from_the_boxes(asked):
    for item in asked:
        if item.kind == "how many":
            assert q.COUNTS.index(item.answer) + 1 == len(item.scene.boxes)
            assert item.text == f"how many {EMOJIVL.concepts[item.scene.objects[0]].plural}"
        elif item.kind == "what is shown":
            assert item.answer == EMOJIVL.concepts[item.scene.objects[0]].noun
        else:
            relation, noun = re.fullmatch("what is (.+) the (.+)", item.text).groups()
            nouns = [slot.split(" ", 1)[1] for slot in item.scene.slots]
            boxes = dict(zip(nouns, item.scene.boxes, strict=True))
            there = [name for name in boxes if name != noun and stands(boxes[name], boxes[noun]) == relation]
            assert [item.answer] == (there or ["nothing"])


def test_questions_are_balanced(asked):
    kinds = Counter(item.kind for item in asked)
    assert kinds == {"how many": 80, "what is shown": 80, "where": 160}
    counts = Counter(item.answer for item in asked if item.kind == "how many")
    assert counts == dict.fromkeys(q.COUNTS, 20)
    assert sum(item.answer == "nothing" for item in asked) == 80
    relations = Counter(item.text.split()[2] for item in asked if item.kind == "where")
    assert set(relations) == {"left", "right", "above", "below"} and min(relations.values()) > 20
    answers = defaultdict(list)
    for item in asked:
        answers[picture(item.scene)].append(item.answer)
    assert all(len(two) == len(set(two)) == 2 for two in answers.values())
    where = [item.text.rsplit(" ", 1) for item in asked if item.kind == "where"]
    for one, other in zip(where[::2], where[1::2], strict=True):  # the same noun, the opposite relation
        assert one[1] == other[1] and one[0] != other[0]


def test_statements_follow_from_the_boxes(stated):
    for item in stated:
        caption, suffix = re.fullmatch(
            "(.+) in (one picture only|both pictures or in none)", item.text
        ).groups()
        showing = sum(holds(caption, scene) for scene in item.scenes)
        assert item.truth == ((showing == 1) == (suffix == "one picture only"))
        assert item.shown == tuple(holds(caption, scene) for scene in item.scenes)


@pytest.mark.parametrize(
    "reads",
    [
        lambda s: s.text,
        lambda s: tuple(map(picture, s.scenes)),
        lambda s: (s.text, picture(s.scenes[0])),
        lambda s: (s.text, picture(s.scenes[1])),
    ],
    ids=["text", "pictures", "text and left picture", "text and right picture"],
)
def test_half_of_a_statement_is_never_enough(stated, reads):
    truths = defaultdict(list)
    for item in stated:
        truths[reads(item)].append(item.truth)
    assert all(2 * sum(seen) == len(seen) for seen in truths.values())


def test_half_of_the_blocks_cannot_be_told_by_their_objects(stated):
    for start in range(0, len(stated), 8):
        block = stated[start : start + 8]
        objects = {tuple(sorted(scene.objects)) for item in block for scene in item.scenes}
        kind = "same objects" if len(objects) == 1 else "other objects"
        assert {item.kind for item in block} == {kind} == {stated[start].kind}
        assert len(objects) <= 2 and stated[start].pair in objects
    assert Counter(item.kind for item in stated) == {"same objects": 160, "other objects": 160}


def test_items_depend_on_the_seed_alone():
    for make in (q.questions, q.statements):
        first, again, other = (make(EMOJIVL, NOUNS, 48, 16, pairs="train", seed=s) for s in (0, 0, 9))
        assert [item.text for item in first] == [item.text for item in again]
        assert [item.text for item in first] != [item.text for item in other]


def test_batches(asked, stated, recipe):
    batch = recipe(VqaRecipe).collate(asked[:6])
    assert batch.pixels.shape == (6, 3, 48, 48) and batch.targets.shape == (6, len(ANSWERS))
    assert [ANSWERS[k] for k in batch.targets.argmax(1)] == [item.answer for item in asked[:6]]
    assert (batch.targets.sum(1) == 1).all()
    batch = recipe(Nlvr2Recipe).collate(stated[:6])
    assert batch.targets.tolist() == [int(item.truth) for item in stated[:6]]
    assert batch.shown.tolist() == [list(map(int, item.shown)) for item in stated[:6]]
    assert batch.pixels.shape == (6, 2, 3, 48, 48)
    assert not torch.equal(batch.pixels[:, 0], batch.pixels[:, 1])


def test_the_second_picture_is_read_as_the_second(model, stated, recipe):
    task, batch = recipe(Nlvr2Recipe), recipe(Nlvr2Recipe).collate(stated[:6])
    for k, pooled in enumerate(task.pooled(model, batch)):
        alone = model.encode(batch.ids, batch.text_mask, batch.pixels[:, k], image_type=k + 1)
        assert torch.equal(pooled, alone["pooled"])


@pytest.mark.parametrize("kind", [VqaRecipe, Nlvr2Recipe])
def test_blind_batches_hold_one_half(kind, asked, stated, recipe):
    items = asked[:5] if kind is VqaRecipe else stated[:5]
    full = recipe(kind).collate(items)
    for blind in ("image", "text"):
        got = recipe(kind, blind).collate(items)
        if blind == "image":
            assert not got.pixels.any() and torch.equal(got.ids, full.ids)
        else:
            assert got.ids.shape[1] == 2 and torch.equal(got.pixels, full.pixels)
        assert torch.equal(got.targets, full.targets)


@pytest.mark.parametrize("blind", ["image", "text"])
def test_a_blind_model_is_at_one_half_on_statements(blind, model, stated, recipe):
    found = recipe(Nlvr2Recipe, blind).accuracy(model, stated)
    assert {kind: one["value"] for kind, one in found.items()} == dict.fromkeys(found, 0.5)


class Seeing(nn.Module):
    """A model that looks the scene up by its pixels and knows everything about it."""

    def __init__(self, tokenizer, scenes, answer_of):
        super().__init__()
        self.here, self.config = nn.Parameter(torch.zeros(1)), ViltConfig(max_text_len=20)
        self.tokenizer, self.answer_of = tokenizer, answer_of
        self.scenes = {picture(scene): scene for scene in scenes}

    def encode(self, ids, text_mask, pixels, image_type=1):
        images = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        rows = zip(ids.tolist(), images, strict=True)
        known = [self.answer_of(self.tokenizer.decode(i), self.scenes[image.tobytes()]) for i, image in rows]
        return {"pooled": torch.tensor(known)}

    def vqa_logits(self, pooled):
        return nn.functional.one_hot(pooled, len(ANSWERS)).float()

    def nlvr2_logits(self, pooled_a, pooled_b):
        shown, wanted = pooled_a[:, 0] + pooled_b[:, 0], pooled_a[:, 1]
        truth = (shown == 1) == (wanted == 1)
        return torch.stack([~truth, truth], 1).float()


def test_a_model_that_sees_is_always_right(asked, stated, tokenizer, recipe):
    table = {(item.text, picture(item.scene)): ANSWERS.index(item.answer) for item in asked}
    model = Seeing(tokenizer, [item.scene for item in asked], lambda text, s: table[text, picture(s)])
    found = recipe(VqaRecipe).accuracy(model, asked)
    assert {kind: one["value"] for kind, one in found.items()} == dict.fromkeys(found, 1.0)
    assert found["all"]["items"] == 320 and found["where"]["items"] == 160

    def shows(text, scene):
        caption, suffix = text.split(" in ", 1)
        return [int(holds(caption, scene)), int(suffix.startswith("one"))]

    model = Seeing(tokenizer, [scene for item in stated for scene in item.scenes], shows)
    found = recipe(Nlvr2Recipe).accuracy(model, stated)
    assert {kind: one["value"] for kind, one in found.items()} == dict.fromkeys(found, 1.0)


def test_a_model_that_cannot_see_reaches_its_chance_on_questions(asked):
    """The best that one who knows the picture, or the text, but not the other, can do."""
    by_picture, by_text = defaultdict(Counter), defaultdict(Counter)
    for item in asked:
        by_picture[picture(item.scene)][item.answer] += 1
        by_text[item.text][item.answer] += 1
    best = [sum(max(c.values()) for c in one.values()) / len(asked) for one in (by_picture, by_text)]
    assert best[0] == 0.5
    where = [item for item in asked if item.kind == "where"]
    assert sum(item.answer == "nothing" for item in where) == len(where) / 2


def test_a_real_model_trains_on_the_batches(model, asked, stated, recipe):
    vqa, nlvr2 = recipe(VqaRecipe), recipe(Nlvr2Recipe)
    batch = vqa.collate(asked[:4])
    assert vqa.logits(model, batch).shape == batch.targets.shape
    logits = nlvr2.logits(model, nlvr2.collate(stated[:4]))
    assert logits.shape == (4, 2) and logits.requires_grad
    assert vqa.accuracy(model, asked)["all"]["items"] == 320


def test_answers_are_those_of_the_nouns(recipe):
    assert recipe(VqaRecipe).answers == ANSWERS and recipe(VqaRecipe).heads() == {"num_answers": len(ANSWERS)}


def fewer_answers(vqa: VqaRecipe) -> VqaRecipe:
    vqa.answers = ANSWERS[1:]
    return vqa


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a, r: q.questions(EMOJIVL, NOUNS, 48, 24), "n must be a positive multiple of 16"),
        (lambda a, r: q.statements(EMOJIVL, NOUNS, 48, 0), "n must be a positive multiple of 16"),
        (lambda a, r: q.statements(EMOJIVL, NOUNS[:2], 48, 16, pairs="all"), "about other objects"),
        (lambda a, r: fewer_answers(r(VqaRecipe)).collate(a), "answers must hold the answer"),
        (lambda a, r: r(VqaRecipe, "both").collate(a), "blind must be"),
        (lambda a, r: r(VqaRecipe, longest=4).collate(a), "texts must fit the model's 4 tokens"),
    ],
)
def test_refusals(call, message, asked, recipe):
    with pytest.raises(ValueError, match=message):
        call(asked, recipe)
