"""X-VLM's evaluation: a model that knows the boxes gets 1, one that guesses what is said to be chance."""

import numpy as np
import pytest
import torch

from minivlp.data import CPU_NOUNS, held_out, load_emojivl, scene_pixels
from minivlp.data.crowds import KINDS, Crowds, phrases
from minivlp.data.names import scene_tokenizer
from minivlp.evaluation import vilt as vilt_evaluate
from minivlp.evaluation.point import patches_inside
from minivlp.evaluation.xvlm import (
    CONSTANTS,
    NAMES,
    _similarity,
    ask_phrases,
    best_guess,
    evaluate_xvlm,
    iou,
    predict_boxes,
    report_xvlm,
)
from minivlp.models.xvlm import Xvlm, XvlmConfig
from minivlp.pictures.sheets import grounding_sheet

EMOJIVL = load_emojivl()
NOUNS = EMOJIVL.nouns(
    ("dog", "guitar", "baseball", "bathtub", "tomato", "panda", "saxophone", "key", "horse")
)
TOKENIZER = scene_tokenizer(NOUNS, 512)


def small() -> Xvlm:
    torch.manual_seed(0)
    sizes = dict(dim=16, image_layers=1, text_layers=1, cross_layers=1, heads=2, hidden=32, embed=16)
    return Xvlm(XvlmConfig(len(TOKENIZER), **sizes)).eval()


def test_iou():
    a = np.array([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1]])
    b = np.array([[1.0, 1, 3, 3], [0, 0, 2, 2], [2, 0, 3, 1]])
    assert np.allclose(iou(a, b), [1 / 7, 1, 0])
    assert iou(a[:, None], b).shape == (3, 3)


def test_the_best_guess_is_that_of_one_box():
    true = np.array([[0.0, 0, 2, 2]] * 3 + [[10.0, 10, 12, 12]] * 7)
    assert best_guess(true) == pytest.approx(0.7)
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((CONSTANTS, 2, 2)), 1).reshape(-1, 4)
    slow = max(np.mean([iou(one, other) >= 0.5 for other in corners]) for one in corners)
    assert best_guess(corners) == pytest.approx(slow)


def test_questions_are_phrases_of_held_out_pairs():
    asked = ask_phrases(Crowds(EMOJIVL, NOUNS, pairs="held_out", seed=1), 30)
    assert set(asked) == set(KINDS)
    for kind, items in asked.items():
        assert len(items) == 30 and len({id(scene) for scene, _ in items}) == 30
        for scene, phrase in items:
            assert phrase.kind == kind and phrase in phrases(scene)
            assert held_out(*scene.objects[:2])


def test_a_box_is_asked_for_each_phrase_in_its_own_scene():
    """Alone or among others of other lengths, in pixels of its picture."""
    model, asked = small(), ask_phrases(Crowds(EMOJIVL, NOUNS, pairs="held_out", seed=1), 4)
    items = [item for some in asked.values() for item in some]
    with torch.inference_mode():
        found = predict_boxes(model, TOKENIZER, items)
        alone = np.concatenate([predict_boxes(model, TOKENIZER, [item]) for item in items])
    assert (
        np.allclose(found, alone, atol=1e-3) and found[:, 2:].max() < 96 and np.ptp(found, axis=0).max() > 0
    )


class Knowing(Xvlm):
    """Reads the true boxes off a list, as `boxes` is asked for them in the order of the questions."""

    def boxes(self, pooled):
        return self.truth[pooled[:, 0].long()]

    def encode(self, ids, text_mask, pixels, pixel_mask=None):
        numbers = [
            self.numbers[(row.tobytes(), some.tobytes())]
            for row, some in zip(ids.numpy(), pixels.numpy(), strict=True)
        ]
        return {"pooled": torch.tensor(numbers, dtype=torch.float32)[:, None]}


def test_who_knows_the_boxes_gets_one_and_who_knows_names_the_ceiling():
    def knowing(split, twins: bool):
        artists = None if split == "seen" else EMOJIVL.unseen_artists
        items = [
            i
            for some in ask_phrases(Crowds(EMOJIVL, NOUNS, artists, pairs="held_out", seed=1), 40).values()
            for i in some
        ]
        for scene, phrase in items:
            rows = [k for k, other in enumerate(scene.objects) if other == scene.objects[phrase.row]]
            row = rows[0] if twins else phrase.row
            ids = TOKENIZER.batch([phrase.text])[0][0]
            model.numbers[(ids.tobytes(), scene_pixels([scene])[0].numpy().tobytes())] = len(boxes)
            x1, y1, x2, y2 = scene.boxes[row] / 48
            boxes.append([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])

    for twins in (False, True):
        model = Knowing(small().config).eval()
        model.numbers, boxes = {}, []
        for split in ("seen", "unseen"):
            knowing(split, twins)
        model.truth = torch.tensor(boxes)
        results = evaluate_xvlm(model, TOKENIZER, EMOJIVL, NOUNS, 48, items=40)
        for split in ("seen", "unseen"):
            found = results["details"][split]
            for name in ("ground_name", "ground_place", "ground_relation"):
                objects = found[name]["objects"]
                assert objects == (1.0 if name == "ground_name" else 0.5)
                assert abs(results[split][name] - (objects if twins else 1.0)) <= (0.25 if twins else 0)
                assert found[name]["items"] == 40 and 0 < found[name]["chance"] < 0.5
            assert found["grounding"]["items"] == 120 and found["grounding"]["objects"] == pytest.approx(
                2 / 3
            )


def test_results_and_report():
    told = []
    results = evaluate_xvlm(
        small(), TOKENIZER, EMOJIVL, NOUNS, 48, items=12, progress=lambda *now: told.append(now)
    )
    assert set(results) == {"seen", "unseen", "details"} and set(results["seen"]) == set(NAMES)
    assert told[-1] == (96, 96) and results["details"]["artists"]["unseen"] == ["fluent"]
    for found in results["details"]["seen"].values():
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    text = report_xvlm(results)
    assert text.count("| a box for a phrase |") == 2 and "## Unseen artists: fluent" in text
    assert results == evaluate_xvlm(small(), TOKENIZER, EMOJIVL, NOUNS, 48, items=12)
    with pytest.raises(ValueError, match="items must be at least 1"):
        evaluate_xvlm(small(), TOKENIZER, EMOJIVL, NOUNS, 48, items=0)


def test_naming_and_pointing_of_a_model_whose_patches_are_texts():
    """When the picture's patches carry the noun's own vector inside the box, both are always right."""
    model = small()
    items = ask_phrases(Crowds(EMOJIVL, NOUNS, pairs="held_out", seed=1), 20)["name"]
    source = Crowds(EMOJIVL, NOUNS, pairs="held_out", seed=1)

    numbers = {concept.id: i for i, concept in enumerate(source.nouns)}
    vectors = torch.eye(len(numbers))
    scenes = {scene_pixels([scene])[0].numpy().tobytes(): (scene, phrase) for scene, phrase in items}

    def patches(pixels):
        out = torch.zeros(len(pixels), 36, len(numbers))
        for b, picture in enumerate(pixels.numpy()):
            scene, _ = scenes[picture.tobytes()]
            for k in range(len(scene.objects)):
                out[b, patches_inside(scene, 8)[k]] = vectors[numbers[scene.objects[k]]]
        return out

    model.image_patches, model.image_vector = patches, lambda z: torch.nn.functional.normalize(z, dim=-1)
    model.text_vector = lambda words: vectors
    found = _similarity(model, TOKENIZER, source, items, lambda passes: None)
    assert found["naming"]["value"] == found["pointing"]["value"] == 1.0
    assert 0.02 < found["pointing"]["chance"] < 0.3 and found["naming"]["chance"] == 1 / len(source.nouns)
    model.text_vector = lambda words: vectors.roll(1, 0)
    found = _similarity(model, TOKENIZER, source, items, lambda passes: None)
    assert found["naming"]["value"] < 0.3 and found["pointing"]["value"] < 0.7


def test_what_measures_vilt_measures_it_too(monkeypatch):
    monkeypatch.setattr(vilt_evaluate, "CANDIDATES", 4)
    nouns = EMOJIVL.nouns(CPU_NOUNS)
    words = scene_tokenizer(nouns, 512)
    torch.manual_seed(0)
    model = Xvlm(
        XvlmConfig(len(words), dim=16, image_layers=1, text_layers=1, cross_layers=1, heads=2)
    ).eval()
    results = vilt_evaluate.evaluate(model, words, EMOJIVL, nouns, 48, items=16, sets=1)
    assert set(results["unseen"]) == set(vilt_evaluate.MEASURES)


def test_the_sheet_is_written(tmp_path):
    scene = Crowds(EMOJIVL, NOUNS)[0]
    grounding_sheet(tmp_path / "g.png", [(scene.image, "a dog", scene.boxes[0], scene.boxes[1] / 2)] * 6)
    assert (tmp_path / "g.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="answers must hold at least one"):
        grounding_sheet(tmp_path / "h.png", [])
