"""Training a dual encoder: which pairs meet in a batch, and what each loss makes of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minivlp.__main__ import MODELS
from minivlp.data import TRAINING_ARTISTS, held_out, load_emojivl, trained_concepts
from minivlp.data.names import name_tokenizer
from minivlp.infonce import infonce
from minivlp.recipes import DUAL, recipe_class
from minivlp.recipes.dual import DualRecipe, DualSettings, PairBatch, PairBatches
from minivlp.training.loop import optimizers, steps
from minivlp.training.run import Run
from tests.test_train import equal, timeless
from tests.tiny import DUAL_SIZES, few

CONFIG = DualSettings(**DUAL_SIZES)
CONCEPTS = trained_concepts(few(), TRAINING_ARTISTS)
TOKENIZER = name_tokenizer(CONCEPTS, "en")


def recipe(name: str, config: DualSettings = CONFIG) -> DualRecipe:
    """A recipe whose data are `few` drawings."""
    made = recipe_class(name)(config, tokens=TOKENIZER.tokens)
    made.emojivl = few()
    return made


def batches(config: DualSettings = CONFIG, fixed: bool = False) -> PairBatches:
    return PairBatches(few(), TOKENIZER, config, fixed)


def fitted(folder, name, config=CONFIG, stop=None) -> Run:
    """Train in a new folder, or on in one that holds a run."""
    run = Run.resume(folder) if (folder / "checkpoint.pt").exists() else Run.begin(folder, {})
    made = recipe(name, config)
    made.check = lambda model: {}

    def batch(step):
        if step == stop:
            raise KeyboardInterrupt
        return made.batches(step)

    made.batch = batch
    list(steps(made, run))
    return run


def test_every_loss_has_its_name_on_the_command_line():
    assert MODELS[: len(DUAL) + 1] == ("vilt", *DUAL)
    assert all(issubclass(recipe_class(name), DualRecipe) for name in DUAL)


def test_zero_shot_concepts_and_the_unseen_artist_are_never_shown():
    emojivl = load_emojivl()
    pairs = PairBatches(emojivl, TOKENIZER, replace(CONFIG, canvas=16))
    assert {c.split for c in pairs.concepts} == {"train"} and len(pairs.concepts) == 1027
    assert tuple(emojivl.seen_artists) == TRAINING_ARTISTS
    assert all(set(a) <= set(TRAINING_ARTISTS) and a for a in pairs._drawn_by.values())
    assert not any(held_out(a.id, b.id) for a, b in pairs._scenes._pairs)
    assert all(a.split == b.split == "train" for a, b in pairs._scenes._pairs)


def test_no_two_pictures_of_a_batch_show_the_same_thing():
    emojivl = load_emojivl()
    pairs = PairBatches(emojivl, TOKENIZER, replace(CONFIG, canvas=16, batch=400, scenes=0))
    assert any(c.near for c in pairs.concepts)
    for seed in range(3):
        chosen = pairs._different(np.random.default_rng(seed))
        ids = [c.id for c in chosen]
        assert len(set(ids)) == 400
        assert not any(set(c.near) & set(ids) for c in chosen)


def test_pairs_depend_on_seed_and_step_alone():
    a, b, c = batches(), batches(), batches(replace(CONFIG, seed=1))
    a(3)
    for x, y, z in zip(a(7), b(7), c(7), strict=True):
        assert equal(vars(x), vars(y)) and not torch.equal(x.pixels, z.pixels)
    assert [len(p.ids) for p in a(7)] == [16, 8] and a(6)[0].share == 0.5


def test_some_words_are_unknown_but_never_the_only_one():
    lost = total = 0
    pairs = batches(replace(CONFIG, unknown=0.3))
    for step in range(20):
        singles, scenes = pairs(step)
        assert not (scenes.ids == TOKENIZER.unk_id).any()
        words = singles.mask.sum(1) - 2
        gone = (singles.ids == TOKENIZER.unk_id).sum(1)
        assert not gone[words == 1].any()
        lost, total = lost + int(gone.sum()), total + int(words[words > 1].sum())
        assert (singles.ids[:, 0] == TOKENIZER.cls_id).all()
        assert ((singles.ids == TOKENIZER.sep_id).sum(1) == 1).all()
    assert lost / total == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize("name", DUAL)
@pytest.mark.slow
def test_every_loss_learns_and_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    run = fitted(tmp_path / "whole", name)
    records = run.records()
    assert [r["step"] for r in records] == [3, 6, 9, 12]
    assert {"names", "scenes"} <= set(records[0]) and records[-1]["names"] < records[0]["names"]
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "cut", name, stop=7)
    again = fitted(tmp_path / "cut", name)
    a, b = run.load(), again.load()
    assert all(equal(a[key], b[key]) for key in ("model", "optimizers", "step", "means"))
    assert timeless(records) == timeless(again.records())


def test_every_loss_has_a_model_at_its_real_size():
    for name in DUAL:
        cls = recipe_class(name)
        config = replace(cls.presets["cpu"], **cls.overrides)
        model = recipe(name, config).model
        pixels = torch.zeros(2, 3, config.canvas, config.canvas)
        assert len(model.image_tokens(pixels)[0][0]) == (16 if name == "filip" else 1)
        assert model.encode_image(pixels).shape == (2, 192 if name == "siglip" else 128)


def test_attention_begins_as_a_mean_of_what_it_sees():
    model = recipe("clip").model
    for block in (*model.image.encoder.blocks, *model.text.encoder.blocks):
        value = block.qkv.weight[2 * CONFIG.dim :]
        assert torch.allclose(block.proj.weight @ value, torch.eye(CONFIG.dim), atol=1e-5)
    far, near = model.encode_image(batches()(0)[0].pixels)[:2].detach(), 0.99
    assert float(far[0] @ far[1]) < near  # two images have two vectors


def test_both_towers_have_their_matrices_in_muon():
    siglip = recipe("siglip")
    model = siglip.model
    muon, adam = optimizers(model, siglip.matrices(model), CONFIG)
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert inside == {
        f"{tower}.encoder.blocks.0.{part}.weight"
        for tower in ("image", "text")
        for part in ("qkv", "proj", "fc1", "fc2")
    }
    count = sum(len(group["params"]) for group in (*muon.param_groups, *adam.param_groups))
    assert count == len(list(model.parameters()))


def test_the_loss_is_weighted_by_pairs():
    clip, two = recipe("clip"), batches()(0)
    model = clip.model
    terms = clip.loss(model, two)
    for name, pairs, share in zip(("names", "scenes"), two, (16 / 24, 8 / 24), strict=True):
        x, y = model.encode_image(pairs.pixels), model.encode_text(pairs.ids, pairs.mask)
        assert torch.allclose(terms[name], share * infonce(x, y, model.scale), atol=1e-6)
    assert set(clip.loss(model, two[:1])) == {"names"}


def test_hinges_begin_with_all_negatives_and_end_with_the_hardest():
    (pairs, _), vse = batches()(0), recipe("vse")

    def loss(share):
        early = PairBatch(pairs.ids, pairs.mask, pairs.pixels, share)
        return float(vse.loss(vse.model, [early])["names"].detach())

    assert loss(0.0) == loss(CONFIG.settle - 0.01) > 2 * loss(CONFIG.settle) == 2 * loss(0.99)


def test_the_scale_is_kept_below_one_hundred():
    clip = recipe("clip")
    with torch.no_grad():
        clip.model.log_scale.fill_(9.0)
    clip.loss(clip.model, batches()(0))
    assert float(clip.model.scale.detach()) == pytest.approx(100)


def test_texts_are_padded_to_one_length_for_siglip():
    assert {p.ids.shape[1] for p in batches(fixed=True)(0)} == {CONFIG.max_text_len}
    assert max(p.ids.shape[1] for p in batches()(0)) < CONFIG.max_text_len


def test_settings_of_another_version_are_refused():
    assert DualSettings.read({"train": {"steps": 7}}).steps == 7
    for settings in ({}, {"train": {"nouns": 3}}):
        with pytest.raises(ValueError, match="are not of this version"):
            DualSettings.read(settings)
