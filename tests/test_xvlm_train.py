"""X-VLM's batches and its loss: no wrong pair is true, no box no box loss, and one batch can be learned."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minivlp.boxes import cxcywh_to_xyxy
from minivlp.data import load_emojivl
from minivlp.data.names import scene_tokenizer
from minivlp.data.probes import first_of_each, meaning
from minivlp.models.xvlm import Xvlm, whole_picture
from minivlp.recipes.xvlm import (
    ABLATIONS,
    RegionBatch,
    RegionBatches,
    XvlmRecipe,
    XvlmSettings,
    matching_pairs,
    xvlm_loss,
)
from minivlp.training.loop import optimizers, steps
from minivlp.training.run import Run

EMOJIVL = load_emojivl()
CONFIG = replace(
    XvlmRecipe.presets["cpu"], dim=16, image_layers=1, text_layers=1, cross_layers=1, heads=2, hidden=32,
    embed=16, steps=6, batch=12, warmup=2, save_every=3, report_every=3,
)  # fmt: skip
NOUNS = EMOJIVL.nouns(CONFIG.nouns)
TOKENIZER = scene_tokenizer(NOUNS, CONFIG.vocab_size)


def source(config: XvlmSettings = CONFIG, **changes) -> RegionBatches:
    return RegionBatches(EMOJIVL, NOUNS, TOKENIZER, replace(config, **changes))


def recipe(config: XvlmSettings = CONFIG) -> XvlmRecipe:
    return XvlmRecipe(config, tokens=TOKENIZER.tokens)


def new_model(config: XvlmSettings = CONFIG) -> Xvlm:
    return recipe(config).model


REGIONS, CAPTIONS = source(regions=1.0), source(regions=0.0)


def texts(rows: RegionBatch) -> list[str]:
    return [TOKENIZER.decode(row) for row in rows.ids.numpy()]


def words(text: str) -> str:
    return text.removeprefix("[CLS] ").split(" [SEP]")[0]


# Batches


def test_batches_depend_on_seed_and_step_alone():
    one, two = source(), source()
    one(3), one(4)
    for step in (5, 6):
        a, b, c = (s(step)[0] for s in (one, two, source(seed=1)))
        for name, tensor in vars(a).items():
            assert torch.equal(tensor, vars(b)[name]) if torch.is_tensor(tensor) else tensor == step
        assert a.pixels.shape == c.pixels.shape and not torch.equal(a.pixels, c.pixels)


def test_both_kinds_of_batches_come_at_their_share():
    kinds = [
        bool(source(batch, regions=0.5)(step)[0].located.any()) for batch in [CONFIG] for step in range(24)
    ]
    assert 6 <= sum(kinds) <= 18
    assert all(REGIONS(step)[0].located.all() for step in range(3))
    captions = source(replace(CONFIG, **ABLATIONS["regions"]))
    assert not any(captions(step)[0].located.any() for step in range(8))


def test_a_region_is_what_its_phrase_names():
    (rows,) = REGIONS(1)
    assert len(rows.ids) > 24 and rows.pixels.shape == (12, 3, 48, 48)
    corners = cxcywh_to_xyxy(rows.boxes).numpy() * 48
    assert np.allclose(corners, corners.round(), atol=1e-4)
    for (x1, y1, x2, y2), inside in zip(corners.round().astype(int), rows.inside.view(-1, 6, 6), strict=True):
        assert inside.sum() == inside[y1 // 8 : -(-y2 // 8), x1 // 8 : -(-x2 // 8)].sum() > 0
    nouns = {c.id: f"{c.article} {c.noun}" for c in NOUNS}
    for text, same in zip(map(words, texts(rows)), rows.same.tolist(), strict=True):
        named = same >= 0
        assert (text == nouns[same]) if named else any(r in text for r in ("of", "above", "below"))


def test_a_caption_is_about_the_whole_picture():
    (rows,) = CAPTIONS(1)
    assert rows.inside.all() and (rows.boxes == torch.tensor([0.5, 0.5, 1, 1])).all() and rows.match.all()
    assert torch.equal(rows.picture, torch.arange(12))
    meanings = [meaning(CAPTIONS._pairs[12 + i]) for i in range(12)]
    equal = np.array([[a == b for b in meanings] for a in meanings])
    assert ((rows.same[:, None] == rows.same).numpy() == equal).all()


def test_no_text_in_the_contrast_is_true_of_another_region():
    for step in range(8):
        for (rows,) in (REGIONS(step), CAPTIONS(step)):
            same = rows.same[rows.contrast]
            assert len(same) > 8 and len(set(same.tolist())) == len(same) and (same >= 0).all()


def test_words_are_hidden_whole_and_rightly_labelled():
    (rows,) = REGIONS(2)
    masked = rows.labels >= 0
    assert masked.any() and torch.equal(rows.labels[masked], rows.ids[masked])
    assert torch.equal(rows.hidden[~masked], rows.ids[~masked])
    assert not masked[~rows.text_mask].any()


def test_first_of_each():
    assert first_of_each(["a", None, "b", "a"], [4, 5, 6, 7]) == [4, 6]


# Matching


@pytest.mark.parametrize("kind", [REGIONS, CAPTIONS])
def test_no_negative_is_of_the_same_picture_or_true(kind):
    seen = 0
    for step in range(12):
        (rows,) = kind(step)
        x, y = torch.randn(2, len(rows.ids), 8)
        text, region, labels = matching_pairs(x, y, torch.tensor(5.0), rows, seed=0)
        M = int(rows.match.sum())
        assert (
            labels.tolist() == [1] * M + [0] * 2 * M and rows.match[text].all() and rows.match[region].all()
        )
        assert torch.equal(text[:M], region[:M])
        wrong = labels == 0
        assert (rows.picture[text[wrong]] != rows.picture[region[wrong]]).all()
        assert (rows.same[text[wrong]] != rows.same[region[wrong]]).all()
        assert torch.equal(text[M : 2 * M], text[:M]) and torch.equal(region[2 * M :], region[:M])
        seen += M
    assert seen > 60


def test_negatives_are_hard_and_drawn_by_the_step():
    """With one other text close to every region, that is the one that is drawn."""
    (rows,) = CAPTIONS(0)
    x = torch.zeros(12, 12)
    x[:, 3] = 1.0
    y = torch.eye(12)
    _, region, _ = matching_pairs(torch.eye(12), x, torch.tensor(50.0), rows, seed=0)
    assert region[12:24].tolist().count(3) >= 11 - (rows.same == rows.same[3]).sum() + 1
    draws = [matching_pairs(y, y, torch.tensor(1.0), replace(rows, step=s), 0)[1] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_batch_of_one_name_has_no_wrong_pair():
    (rows,) = REGIONS(0)
    rows = replace(rows, same=torch.zeros_like(rows.same))
    x = torch.randn(len(rows.ids), 8)
    assert all(len(found) == 0 for found in matching_pairs(x, x, torch.tensor(1.0), rows, 0))
    assert "itm" not in xvlm_loss(new_model(), [rows], CONFIG)


def test_a_batch_without_names_has_no_contrast():
    (rows,) = REGIONS(0)
    nothing = torch.zeros_like(rows.contrast)
    rows = replace(rows, contrast=nothing, match=nothing)
    assert set(xvlm_loss(new_model(), [rows], CONFIG)) == {"mlm", "box"}


# The loss


def test_every_parameter_gets_a_gradient():
    model = new_model()
    terms = xvlm_loss(model, REGIONS(0), CONFIG)
    assert set(terms) == {"itc", "itm", "mlm", "box"} and all(t.isfinite() for t in terms.values())
    sum(terms.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_batch_without_boxes_has_no_box_loss_and_no_gradient_of_it():
    model = new_model()
    term = xvlm_loss(model, CAPTIONS(0), CONFIG)["box"]
    assert term.item() == 0.0
    term.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_box_loss_can_be_left_out():
    model = new_model()
    without = xvlm_loss(model, REGIONS(0), replace(CONFIG, **ABLATIONS["boxes"]))
    whole_loss = xvlm_loss(model, REGIONS(0), CONFIG)
    assert set(without) == {"itc", "itm", "mlm"} and all(
        torch.equal(without[k], whole_loss[k]) for k in without
    )
    twice = xvlm_loss(model, REGIONS(0), replace(CONFIG, box_weight=2.0))
    assert torch.allclose(twice["box"], 2 * whole_loss["box"])


def test_the_box_is_read_from_the_whole_picture():
    """What lies outside the object's box matters to where it is said to be."""
    model, (rows,) = new_model(), REGIONS(0)
    first = rows.picture == 0
    one = {k: v[first] for k, v in vars(rows).items() if torch.is_tensor(v) and k != "pixels"}
    rows = RegionBatch(**one, pixels=rows.pixels[:1], step=0)
    states = []
    model.cross.register_forward_pre_hook(lambda module, inputs: states.append(inputs[1]))
    xvlm_loss(model, [rows], CONFIG)
    expected = whole_picture(model.image_patches(rows.pixels)).expand(int(first.sum()), -1, -1)
    assert torch.allclose(states[-1], expected, atol=1e-6)


def test_the_terms_of_several_batches_add_up():
    model = new_model()
    a, b = (xvlm_loss(model, kind(0), CONFIG) for kind in (REGIONS, CAPTIONS))
    both = xvlm_loss(model, [*REGIONS(0), *CAPTIONS(0)], CONFIG)
    assert all(torch.allclose(both[k], a[k] + b[k]) for k in both)


def test_one_batch_can_be_learned():
    model, rows = new_model(replace(CONFIG, dim=32)), source(batch=3, regions=1.0)(0)
    muon, adam = optimizers(model, recipe().matrices(model), replace(CONFIG, lr=4e-3))
    first = None
    for _ in range(40):
        terms = xvlm_loss(model, rows, CONFIG)
        first = first or {k: float(v.detach()) for k, v in terms.items()}
        model.zero_grad()
        sum(terms.values()).backward()
        muon.step(), adam.step()
    last = {k: float(v.detach()) for k, v in terms.items()}
    assert last["box"] < 0.4 * first["box"] and last["itc"] < 0.2 * first["itc"]
    assert last["mlm"] < 0.2 * first["mlm"] and last["itm"] < 0.5 * first["itm"]


def test_matrices_between_hidden_values_are_muons():
    model = new_model()
    muon, adam = optimizers(model, recipe().matrices(model), CONFIG)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert {name.split(".")[0] for name in taken} == {"image", "text", "cross", "mlm"}
    assert "cross.blocks.0.q.weight" in taken and "cross.blocks.0.kv.weight" in taken
    rest = [id(p) for group in adam.param_groups for p in group["params"]]
    assert len(taken) + len(rest) == len(names)


def test_a_run_that_stops_ends_in_the_same_weights(tmp_path):
    def trained(folder, stop=None):
        began = (folder / "checkpoint.pt").exists()
        run = Run.resume(folder) if began else Run.begin(folder, {"train": {}})
        made = recipe()
        made.check = lambda model: {}

        def until(step):
            if step == stop:
                raise KeyboardInterrupt
            return made.batches(step)

        made.batch = until
        list(steps(made, run))
        return run.load()["model"]

    expected = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", stop=4)
    found = trained(tmp_path / "cut")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_settings_of_another_version_are_refused():
    assert XvlmSettings.read({"train": {"steps": 7}}).steps == 7
    for settings in ({}, {"train": {"speed": 3}}):
        with pytest.raises(ValueError, match="are not of this version"):
            XvlmSettings.read(settings)
