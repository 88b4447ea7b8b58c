"""A reader of lists, and bridges to it: what is frozen stays, and what is told is read."""

import json
import re
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from minivlp.data import Scenes, load_emojivl
from minivlp.data.lists import BINS, COLON, Layouts, facts, list_tokenizer
from minivlp.data.probes import true_captions
from minivlp.decoder import decode
from minivlp.lora import Lora
from minivlp.models.bridge import (
    CONNECTORS,
    READERS,
    Bridge,
    BridgeConfig,
    LanguageConfig,
    LanguageModel,
    Merge,
    Reading,
)
from minivlp.recipes.base import WEIGHTS, load_trained
from minivlp.recipes.bridge import BridgeRecipe, BridgeSettings, begin_with
from minivlp.recipes.listlm import ListRecipe, ListSettings
from minivlp.training import loop
from minivlp.training.run import ReadOnlyRun
from tests.tiny import commands_with, trained

EMOJIVL = load_emojivl()
CONFIG = LanguageConfig(vocab_size=40, dim=24, layers=2, heads=3, hidden=32)
SMALL = BridgeConfig(vocab_size=40, dim=24, layers=2, heads=3, hidden=32, image_dim=16, grid=4, queries=4)
ROWS = {"pooled": 4, "linear": 16, "mlp": 16, "merge": 4, "resampler": 4, "qformer": 4}
every_connector = pytest.mark.parametrize("connector", CONNECTORS)


def texts(B: int = 3, L: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(B + L)
    ids = torch.randint(5, 40, (B, L), generator=generator)
    return ids, torch.arange(L) < torch.tensor([[L], [L - 2], [L - 3]])[:B]


def bridge(**changes) -> Bridge:
    torch.manual_seed(0)
    return Bridge(replace(SMALL, **changes)).eval()


def states(B: int = 3) -> torch.Tensor:
    return torch.randn(B, 16, 16, generator=torch.Generator().manual_seed(B))


# Lists


def test_a_layout_is_the_scene_that_nobody_painted():
    """The same objects at the same places: a drawing lies in its square, and the caption is the same."""
    painted, layouts = (kind(EMOJIVL, canvas=48, pairs="held_out", seed=3) for kind in (Scenes, Layouts))
    for i in range(20):
        scene, layout = painted[i], layouts[i]
        assert (scene.caption, scene.objects) == (layout.caption, layout.objects) and not layout.image.size
        assert (layout.boxes[:, :2] <= scene.boxes[:, :2]).all()
        assert (layout.boxes[:, 2:] >= scene.boxes[:, 2:]).all()


def test_a_fact_is_row_column_noun_and_their_order_is_drawn():
    layouts, rng, firsts = Layouts(EMOJIVL, canvas=48, seed=0, kinds={"pair": 1, "pick": 1}), Random(0), []
    for i in range(60):
        scene = layouts[i]
        words = facts(scene, 48, rng).split()
        nouns = [slot.split(" ", 1)[1] for slot in scene.slots + scene.unnamed]
        found = {words[2]: (words[0], words[1]), words[5]: (words[3], words[4])}
        assert sorted(found) == sorted(nouns) and len(words) == 6
        for noun, (x1, y1, x2, y2) in zip(nouns, scene.boxes, strict=True):
            row, column = map(int, found[noun])
            assert 0 <= row < BINS and row * 6 <= (y1 + y2) / 2 < row * 6 + 6
            assert 0 <= column < BINS and column * 6 <= (x1 + x2) / 2 < column * 6 + 6
        firsts.append(words[2] == nouns[0])
    assert 15 < sum(firsts) < 45


def test_lists_have_one_length_or_their_vocabulary_is_refused():
    nouns = ListRecipe(ListSettings()).nouns
    tokenizer = list_tokenizer(nouns, 512)
    assert {len(tokenizer.encode(c.noun)) for c in nouns} == {1}
    assert tokenizer.unk_id not in tokenizer.encode(f"0 7 {COLON}")
    with pytest.raises(ValueError, match=r"vocab_size must hold every noun as one token.*, got \w+ in parts"):
        list_tokenizer(nouns, 80)


def test_only_what_stands_behind_the_colon_is_asked():
    recipe = ListRecipe(replace(ListSettings(), batch=8))
    for step in (0, 699):
        (b,) = recipe.batch(step)
        colon = recipe.tokenizer.encode(COLON)[0]
        for ids, mask, labels in zip(b.ids, b.text_mask, b.labels, strict=True):
            at, n = int((ids == colon).nonzero()), int(mask.sum())
            assert at == 7 and (labels[:at] == -100).all() and (labels[n - 1 :] == -100).all()
            assert labels[at : n - 1].tolist() == ids[at + 1 : n].tolist()
        said = {bool(re.search("the middle", recipe.tokenizer.decode(row.tolist()))) for row in b.ids}
        assert said == {step == 0}  # picks come first, pairs last


# The language model


def test_padding_and_later_words_change_nothing():
    torch.manual_seed(0)
    model, (ids, mask) = LanguageModel(CONFIG).eval(), texts()
    whole = model.encode(ids, mask)
    other = torch.where(mask, ids, 39)
    torch.testing.assert_close(model.encode(other, mask)[mask], whole[mask])
    torch.testing.assert_close(model.encode(ids[:, :4], mask[:, :4]), whole[:, :4])


def test_a_prefix_of_embedded_words_is_those_words():
    torch.manual_seed(0)
    model, (ids, mask) = LanguageModel(CONFIG).eval(), texts()
    whole = model.encode(ids, mask)
    cut = torch.cat([ids[:, :1], ids[:, 4:]], 1), torch.cat([mask[:, :1], mask[:, 4:]], 1)
    found = model.encode(*cut, model.word(ids[:, 1:4]))
    torch.testing.assert_close(found, torch.cat([whole[:, :1], whole[:, 4:]], 1))


def test_cached_writing_is_uncached_writing():
    torch.manual_seed(0)
    model, prefix = LanguageModel(CONFIG).eval(), torch.randn(2, 5, 24)
    begin, allowed = torch.tensor([[1, 7], [1, 7]]), torch.ones(6, 40, dtype=torch.bool)
    ids, log_p = decode(Reading(model, prefix), begin, allowed, beams=3)
    mask = torch.ones(2, 8, dtype=torch.bool)
    told = model.scores(model.encode(torch.cat([begin, ids], 1), mask, prefix))[:, 1:-1].log_softmax(-1)
    torch.testing.assert_close(told.double().gather(2, ids[..., None]).sum((1, 2)), log_p)


# Bridges


@every_connector
def test_each_connector_makes_rows_that_the_words_read(connector):
    model, (ids, mask), image = bridge(connector=connector), texts(), states().requires_grad_()
    assert model.prefix(image).shape == (3, ROWS[connector], 24)
    out = model.encode(ids, mask, image)
    assert out.shape == (3, 7, 24)
    (slope,) = torch.autograd.grad(out[0, -1].sum(), image)
    assert (slope[0].abs().amax(1) > 0).all() and not slope[1:].any()  # all patches of one's own picture


@every_connector
def test_order_of_patches_counts_where_a_connector_says_so(connector):
    """Without places of its own a connector cannot know where a patch stood; merge joins neighbours."""
    model, order = bridge(connector=connector), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    image = states(1)
    one, two = model.prefix(image), model.prefix(image[:, order])
    same = torch.allclose(one, two, atol=1e-5)
    assert same == (connector in ("pooled", "qformer"))
    if connector in ("linear", "mlp"):
        torch.testing.assert_close(two, one[:, order])
    if connector == "resampler":
        resampler, places = model.connector.resampler, model.connector.places
        moved = resampler(image[:, order], places[order])
        torch.testing.assert_close(moved, resampler(image, places))


def test_merge_joins_four_neighbours_in_raster_order():
    merge = Merge(SMALL)
    image = states(1).requires_grad_()
    (slope,) = torch.autograd.grad(merge(image)[0, 1].sum(), image)
    assert slope[0].abs().sum(1).nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("reader", READERS)
def test_a_bridge_begins_with_what_its_reader_knows(reader):
    torch.manual_seed(1)
    taught, (ids, mask) = LanguageModel(CONFIG).eval(), texts()
    model = bridge(reader=reader)
    begin_with(model, taught)
    assert torch.equal(model.reader.encode(ids, mask), taught.encode(ids, mask))


@pytest.mark.parametrize("reader", READERS)
def test_training_moves_what_learns_and_nothing_else(reader):
    """Five steps with weight decay. A frozen reader's bytes stay, and what it says of text alone."""
    settings = replace(BridgeSettings(), steps=5, batch=4, reader=reader, report_every=9, weight_decay=0.1)
    recipe = BridgeRecipe(settings)
    recipe.check = lambda model: {}
    model, (ids, mask) = recipe.model, texts()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = model.reader.encode(ids, mask)
    list(loop.steps(recipe, ReadOnlyRun("nowhere", {})))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == learns and any(name.startswith("connector.") for name in moved)
    readers = {name for name in moved if name.startswith("reader.")}
    assert all(name.endswith((".up", ".down")) for name in readers) or reader == "tuned"
    assert bool(readers) == (reader != "frozen")
    assert torch.equal(said, model.reader.encode(ids, mask)) == (reader == "frozen")
    assert model.train().reader.training == (reader == "tuned")
    if reader == "lora":
        assert all(isinstance(block.qkv, Lora) for block in model.reader.blocks)


@cache
def shipped(name: str):
    return load_trained(WEIGHTS / f"{name}_tiny.safetensors")


def test_the_shipped_reader_says_lists_of_pairs_that_it_never_read():
    recipe, model = (
        ListRecipe(ListSettings(), tokens=shipped("listlm").tokenizer.tokens),
        shipped("listlm").model,
    )
    source = Layouts(EMOJIVL, recipe.nouns, canvas=48, pairs="held_out", seed=9)
    scenes = [source[i] for i in range(100)]
    said = recipe.writer(model).write(scenes)
    assert np.mean([text in true_captions(scene) for text, scene in zip(said, scenes, strict=True)]) > 0.9


def test_the_shipped_bridge_is_small_and_stands_on_the_shipped_reader():
    model, reader = shipped("bridge").model, shipped("listlm").model.state_dict()
    assert (WEIGHTS / "bridge_tiny.safetensors").stat().st_size < 300_000
    assert all(torch.equal(tensor, reader[name]) for name, tensor in model.reader.state_dict().items())


@pytest.mark.parametrize("reader, sent_along", [("tuned", 1), ("lora", None), ("frozen", 0)])
def test_what_learned_of_a_reader_ships_with_its_bridge(reader, sent_along):
    """Of a tuned reader the tensor that moved; of one with LoRA also what lies under other names."""
    torch.manual_seed(0)
    model = BridgeRecipe(replace(BridgeSettings(), reader=reader)).model
    if reader == "tuned":
        with torch.no_grad():
            model.reader.head.weight.add_(1)
    sent = BridgeRecipe.to_published(model)
    readers = {name for name in sent if name.startswith("reader.")}
    assert sent_along is None or len(readers) == sent_along
    assert reader != "lora" or {name.rpartition(".")[2] for name in readers} >= {"up", "down"}
    back = BridgeRecipe.from_published(model, sent)
    assert set(back) == set(model.state_dict())
    assert all(torch.equal(back[name].half(), tensor.half()) for name, tensor in model.state_dict().items())


def test_a_blind_bridge_sees_one_picture():
    recipe = BridgeRecipe(replace(BridgeSettings(), blind=True, batch=2))
    (b,) = recipe.batch(0)
    assert not b.image.any()
    seen = BridgeRecipe(replace(BridgeSettings(), batch=2)).batch(0)[0].image
    torch.testing.assert_close(seen.var(-1, correction=0), torch.ones(2, 36), atol=1e-3, rtol=0)


# The commands


@pytest.fixture
def command(monkeypatch):
    return commands_with(monkeypatch)


def test_a_run_leaves_its_results_and_tells_of_pictures_and_lists(command, tmp_path, capsys):
    run = trained("bridge")
    results = json.loads((run / "eval.json").read_text())
    assert {"true", "objects", "order", "axis"} <= set(results["seen"]) and "lists" in results["details"]
    assert "Of lists of held-out pairs" in (run / "report.md").read_text()
    Image.fromarray(Scenes(EMOJIVL, canvas=48, seed=0)[0].image).save(tmp_path / "a.png")
    assert command("demo", tmp_path / "a.png", "--run", run) == 0
    assert "log probability" in capsys.readouterr().out
    assert command("demo", "2 5 dog 4 0 guitar", "--model", "listlm") == 0
    assert re.search(r"a (dog|guitar) \w+( of)? a (dog|guitar)", capsys.readouterr().out)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("demo", "2 5 zebra", "--model", "listlm"), "query must be a list of facts"),
        (("demo", "no.png", "--model", "bridge"), "picture must be a file with a picture"),
        (("train", "--reader", "tuned"), "--reader must come with --model bridge, got vilt"),
        (("train", "--model", "bridge", "--without", "boxes"), "--without must be picture or reading"),
    ],
)
def test_other_requests_are_refused(flags, message, command, capsys):
    assert command(*flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("minivlp: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"connector": "rope"}, "connector must be one of pooled, linear"),
        ({"reader": "asleep"}, "reader must be one of frozen, lora, tuned"),
        ({"connector": "merge", "grid": 3}, "grid must hold a multiple of four patches for merge"),
        ({"connector": "resampler", "queries": 6}, "queries must be a square for the resampler, got 6"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        bridge(**change)


def test_inputs_are_looked_at():
    model, (ids, mask), image = bridge(), texts(), states()
    for bad, message in (
        ((ids, mask, image[:, :9]), "image must have shape"),
        ((ids, mask, image.long()), "image must have a floating dtype"),
        ((ids, mask, image[:2]), "prefix must have"),
        ((ids + 40, mask, image), r"ids must lie in \[0, 40\)"),
        ((ids, mask.long(), image), "text_mask must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(*bad)
