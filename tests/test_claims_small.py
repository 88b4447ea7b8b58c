"""The claims of less than a minute: their experiments measure what they say, on small sizes."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch

from minivlp import decoder
from minivlp.claims import writing as writing_module
from minivlp.claims.claim import samples
from minivlp.claims.codes import Plain, Restarted, coded
from minivlp.claims.settings import FULL
from minivlp.claims.small import TEST_SEED, retrieval, trained
from minivlp.claims.verdict import difference
from minivlp.claims.writing import TERMS, Unnormed, captioning, largest, scores, writing
from minivlp.data import Scenes, load_emojivl, scene_pixels
from minivlp.data.probes import meaning, retrieval_sets, swapped
from minivlp.evaluation.reading import fitting_rows
from minivlp.recipes.chameleon import ChameleonRecipe
from minivlp.vq import nearest
from tests.test_claims import TINY


@pytest.fixture(scope="module")
def source():
    emojivl = load_emojivl()
    return Scenes(emojivl, emojivl.nouns(FULL.writing.train.nouns), canvas=32, seed=1)


def test_retrieval_is_first_of_its_set_and_a_tie_is_not(source):
    size = TINY.captions

    def seen(captions, scenes):
        return np.eye(len(scenes))

    assert np.mean(retrieval(seen, source, size).items) == 1
    assert not any(retrieval(lambda captions, scenes: np.ones((len(scenes),) * 2), source, size).items)
    (asked,) = retrieval_sets((source[i] for i in count(size.items)), size.sets, size.candidates)
    assert len({meaning(scene) for scene in asked}) == size.candidates


@pytest.mark.parametrize("losses", TERMS)
def test_a_captioner_is_asked_what_its_losses_teach(losses, tmp_path):
    found = captioning(TINY.captions, 100, tmp_path / "t", losses)
    taught = {"true", "order"} if losses != "contrast" else set()
    taught |= {"order contrast", "retrieval"} if losses != "captions" else set()
    assert set(found) == taught
    lengths = {name: len(sample.items) for name, sample in found.items()}
    assert all(lengths[name] == TINY.captions.items for name in taught - {"retrieval"})


def test_measures_of_one_claim_pair(tmp_path):
    """p(picture | caption) and another model's cosine are of the same test items."""
    drawn = writing(TINY.writing, 100, tmp_path / "w")
    other = captioning(TINY.captions, 100, tmp_path / "c", "contrast")
    results = {"a": [drawn], "b": [other]}
    pairs = difference(samples(results, ("a", "drawn")), samples(results, ("b", "order contrast")))
    assert len(pairs[0].items) == TINY.writing.items


@pytest.mark.parametrize("told, place", [("written", 0), ("drawn", 1)])
def test_order_is_told_by_the_part_that_comes_second(told, place, tmp_path, monkeypatch):
    """A model that knows captions by their pictures alone, or pictures by their captions alone."""

    def nats(model, tokenizer, captions, pixels, image_first):
        true = captions[0] in {scene.caption for scene in scenes}
        found = np.ones((len(captions), 2))
        found[:, place] -= true and image_first == (told == "written")
        return found

    emojivl = load_emojivl()
    scenes = Scenes(emojivl, emojivl.nouns(FULL.writing.train.nouns), canvas=32, seed=TEST_SEED)
    scenes = [scenes[i] for i in range(TINY.writing.items)]
    scenes = [scene for scene in scenes if swapped(scene) != scenes[0].caption]
    monkeypatch.setattr(writing_module, "nats", nats)
    found = writing(TINY.writing, 100, tmp_path / "t")
    assert {name: np.mean(sample.items) for name, sample in found.items()} == {
        "written": told == "written",
        "drawn": told == "drawn",
    }


@pytest.mark.parametrize("kind", [ChameleonRecipe, Unnormed])
def test_the_largest_score_is_that_of_attention(kind, source, monkeypatch):
    """The scores that the blocks themselves give to attention, where its mask lets a token look."""
    recipe = kind(replace(TINY.scores.train, seed=100))
    model, scenes = recipe.model.eval(), [source[i] for i in range(8)]
    for block in model.blocks:  # at first queries are keys, and the largest score is a token's own
        torch.nn.init.normal_(block.qkv.weight)
    texts = [scene.caption for scene in scenes]
    ids, mask = map(torch.from_numpy, fitting_rows(recipe.tokenizer, texts, 16))
    image, seen, attend = model.tokenise(scene_pixels(scenes)), [], decoder.attend

    def watched(q, k, v, keep):
        S = (q @ k.mT / q.shape[-1] ** 0.5).abs()
        real = torch.cat([mask, mask.new_ones(len(ids), S.shape[-1] - mask.shape[1])], 1)
        seen.append(S.masked_fill(~(keep & real[:, None, :, None]), 0).amax((1, 2, 3)))
        return attend(q, k, v, keep)

    found = largest(model, ids, mask, image)
    monkeypatch.setattr(decoder, "attend", watched)
    with torch.no_grad():
        model.encode(ids, mask, image, torch.zeros(len(ids), dtype=torch.bool))
    torch.testing.assert_close(found, torch.stack(seen).amax(0))
    assert len(seen) == len(model.blocks) and not model.blocks[0].q_norm._forward_hooks


def test_scores_without_the_norm_grow_with_the_weights(tmp_path):
    """Twice as large queries and keys: four times the scores without QK-norm, the same with it."""
    for kind, times in ((ChameleonRecipe, 1), (Unnormed, 4)):
        recipe, model, source = trained(kind, TINY.scores, 100, tmp_path / kind.__name__)
        scenes = [source[i] for i in range(4)]
        texts = [scene.caption for scene in scenes]
        rows = [*map(torch.from_numpy, fitting_rows(recipe.tokenizer, texts, 16))]
        image = model.tokenise(scene_pixels(scenes))
        model.blocks = model.blocks[:1]  # of later ones the states change too
        before = largest(model, *rows, image)
        model.blocks[0].qkv.weight.data[: 2 * recipe.settings.dim] *= 2
        torch.testing.assert_close(largest(model, *rows, image), times * before, rtol=1e-3, atol=1e-3)
    found = scores(TINY.scores, 100, tmp_path / "s", Unnormed)
    assert set(found) == {"scores", "nats"} and found["scores"].clusters == found["nats"].clusters


def test_a_restart_moves_dead_codes_onto_vectors_and_no_others():
    for kind in (Plain, Restarted):
        recipe = kind(replace(TINY.codes.train, seed=100))
        model, batches = recipe.model, recipe.batch(0)
        before = model.codes.detach().clone()
        z = model.encode(recipe.patches(batches[0].pixels)).detach()
        used = torch.bincount(nearest(z, before), minlength=len(before)) > 0
        recipe.loss(model, batches)
        after = model.codes.detach()
        assert torch.equal(after[used], before[used]) and not used.all()
        assert bool((torch.cdist(after[~used], z).amin(1) < 1e-3).all()) == kind.restart
        assert torch.equal(after, before) != kind.restart


def test_codes_are_told_by_their_perplexity(tmp_path):
    found = coded(TINY.codes, 100, tmp_path / "t", Restarted)
    assert 1 <= found["perplexity"].items[0] <= TINY.codes.train.codes and found["decibels"].items[0] > 0
