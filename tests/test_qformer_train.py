"""BLIP-2's first stage as it is trained here: its three terms, its wrong pairs, its measures."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from minivlp.data import Scenes, load_emojivl, scene_pixels
from minivlp.data.probes import meaning, swapped
from minivlp.models.qformer import Qformer
from minivlp.recipes.base import WEIGHTS, load_trained, recipe_of
from minivlp.recipes.qformer import QformerRecipe, QformerSettings, QformerWriter
from minivlp.targets import next_words
from tests.tiny import QFORMER_SIZES, commands_with, trained

EMOJIVL = load_emojivl()


@pytest.fixture
def command(monkeypatch):
    return commands_with(monkeypatch)


def recipe(**changes) -> QformerRecipe:
    return QformerRecipe(replace(QformerSettings(), **(QFORMER_SIZES | {"batch": 6} | changes)))


def test_a_batch_has_captions_their_exchange_and_states_of_the_frozen_encoder():
    mine = recipe(batch=40)
    (b,), source = mine.batch(3), Scenes(EMOJIVL, mine.nouns, canvas=48, seed=0)
    scenes = [source[3 * 40 + i] for i in range(40)]
    for i, scene in enumerate(scenes):
        words, wrong = (
            x[i][m[i]].tolist() for x, m in ((b.ids, b.text_mask), (b.exchanged, b.exchanged_mask))
        )
        assert mine.tokenizer.decode(words) == scene.caption
        assert mine.tokenizer.decode(wrong) == swapped(scene)
    meanings = [meaning(scene) for scene in scenes]
    assert int(b.contrast.sum()) == len(set(meanings))
    assert (b.same[:, None] == b.same).tolist() == [[m == n for n in meanings] for m in meanings]
    torch.testing.assert_close(b.image.mean(-1), torch.zeros(40, 36), atol=1e-5, rtol=0)
    assert not b.image.requires_grad and b.step == 3


def test_the_terms_are_those_of_the_tables(monkeypatch):
    """Contrast and captions from the queries alone; matching of true pairs and of wrong ones, half each."""
    mine, seen = recipe(), []
    (b,), model, encode = mine.batch(0), mine.model, Qformer.encode
    monkeypatch.setattr(Qformer, "encode", lambda self, *a: seen.append(a) or encode(self, *a))
    terms = mine.loss(model, [b])
    assert set(terms) == {"contrast", "captions", "matching"}
    queries, kept = model.read(b.image)
    told, labels = model.write(b.ids, b.text_mask, kept)[0], next_words(b.ids, b.text_mask)
    log_p = model.mlm_logits(told).log_softmax(-1)
    nats = [-log_p[i, j, labels[i, j]] for i, j in (labels >= 0).nonzero().tolist()]
    torch.testing.assert_close(terms["captions"], torch.stack(nats).mean())
    words = model.read_words(b.ids, b.text_mask)[b.contrast]
    torch.testing.assert_close(terms["contrast"], model.contrast_loss(queries[b.contrast], words))
    ((ids, mask, image, table),) = seen
    assert table == "matching" and torch.equal(image, torch.cat([b.image, b.image]))
    assert torch.equal(ids[:6], b.ids) and torch.equal(ids[6::2], b.exchanged[::2])
    for i in range(1, 6, 2):  # another caption of the batch, which does not mean the same
        others = [j for j in range(6) if torch.equal(ids[6 + i], b.ids[j])]
        assert others and all(b.same[j] != b.same[i] for j in others)
    logits = model.itm_logits(encode(model, ids, mask, image, table)[0]).log_softmax(1)
    torch.testing.assert_close(terms["matching"], -(logits[:6, 1].mean() + logits[6:, 0].mean()) / 2)


def test_every_part_learns():
    mine = recipe()
    sum(mine.loss(mine.model, mine.batch(0)).values()).backward()
    assert {name for name, p in mine.model.named_parameters() if p.grad is None} == set()


def test_what_is_written_has_the_probability_that_it_is_given():
    mine = recipe()
    writer = QformerWriter(mine, mine.model.eval())
    source = Scenes(EMOJIVL, mine.nouns, canvas=48, seed=1)
    scenes = [source[i] for i in range(3)]
    told = writer.sentences(mine.look(scene_pixels(scenes)))
    short = [i for i, (text, _) in enumerate(told) if len(mine.tokenizer.encode(text)) < 20]
    again = writer.log_p([told[i][0] for i in short], [scenes[i] for i in short]) if short else []
    for i, value in zip(short, again, strict=True):
        assert abs(value - told[i][1]) < 1e-4


def test_a_run_leaves_its_results_and_writes_about_a_picture(command, tmp_path, capsys):
    run = trained("qformer")
    results = json.loads((run / "eval.json").read_text())
    assert {"true", "order", "order_contrast", "order_match", "first_of_64"} <= set(results["unseen"])
    assert "by the matching head" in (run / "report.md").read_text()
    Image.fromarray(Scenes(EMOJIVL, canvas=48, seed=0)[0].image).save(tmp_path / "a.png")
    assert command("demo", tmp_path / "a.png", "--run", run) == 0
    assert re.search(r"log probability -\d", capsys.readouterr().out)
    assert command("demo", tmp_path / "none.png", "--run", run) == 2
    assert "picture must be a file with a picture" in capsys.readouterr().err


@pytest.mark.slow
def test_three_tables_of_the_shipped_weights_do_three_things():
    """Exchanged nouns: the queries' captions and the matching tell them apart, the contrast cannot."""
    shipped = load_trained(WEIGHTS / "qformer_tiny.safetensors")
    mine = recipe_of(shipped)
    found = mine.check(shipped.model)
    assert found["order"] > 0.85 and found["order_match"] > 0.85 and 0.35 < found["order_contrast"] < 0.65
