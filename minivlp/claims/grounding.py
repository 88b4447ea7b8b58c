"""X-VLM with regions and without: the same model and steps, phrases with boxes or captions of whole pictures.

Asked are crowds of two to four of the world's objects, with measures that need no box head: which noun is
the object's region, and which patch is the noun; and for the model with regions, where its box is.

Source: Zeng, Zhang and Li 2022 (X-VLM), section 4 and its ablation of the visual concepts.
Left out: retrieval of whole pictures.
"""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from minivlp.claims.settings import RegionsSize
from minivlp.claims.training import train
from minivlp.claims.verdict import Sample
from minivlp.data import scene_pixels
from minivlp.data.crowds import Crowds
from minivlp.evaluation.point import patches_inside
from minivlp.evaluation.reading import fitting_rows
from minivlp.evaluation.xvlm import ask_phrases, iou, predict_boxes
from minivlp.models.xvlm import Xvlm
from minivlp.recipes.base import Recipe
from minivlp.recipes.xvlm import ABLATIONS, XvlmRecipe
from minivlp.regions import patches_touched, region_tokens

WITH, WITHOUT = "regions", "captions"
TEST_SEED = 1_000_000  # of the test scenes, which no training seed draws


class Grounding(XvlmRecipe):
    """X-VLM, asked at its end alone."""

    check = Recipe.check


def grounding(size: RegionsSize, seed: int, folder: Path, variant: str) -> dict[str, Sample]:
    """Samples "naming", "pointing" and "grounding" of WITH or WITHOUT, each over the same phrases."""
    ablation = ABLATIONS["regions"] if variant == WITHOUT else {}
    recipe = Grounding(replace(size.train, seed=seed, **ablation))
    model = train(recipe, folder, {"variant": variant, "seed": seed, "size": asdict(size)})
    crowds = Crowds(recipe.emojivl, recipe.nouns, canvas=recipe.settings.canvas, seed=TEST_SEED)
    return _asked(model, recipe.tokenizer, crowds, size.items)


@torch.inference_mode()
def _asked(model: Xvlm, tokenizer, crowds: Crowds, items: int) -> dict[str, Sample]:
    asked = ask_phrases(crowds, items)["name"]
    clusters = ["-".join(map(str, sorted(scene.objects[:2]))) for scene, _ in asked]
    ids, mask = fitting_rows(
        tokenizer, [f"{c.article} {c.noun}" for c in crowds.nouns], model.config.max_text_len
    )
    texts = model.text_vector(model.text_words(torch.from_numpy(ids), torch.from_numpy(mask)))  # (nouns, E)
    number = {concept.id: i for i, concept in enumerate(crowds.nouns)}
    right = np.array([number[scene.objects[phrase.row]] for scene, phrase in asked])
    boxes = np.array([scene.boxes[phrase.row] for scene, phrase in asked])  # (n, 4)
    patch, (H, W) = model.config.patch, asked[0][0].image.shape[:2]
    patches = model.image_patches(scene_pixels([scene for scene, _ in asked]))  # (n, N, D)
    touched = torch.from_numpy(patches_touched(boxes, patch, H, W))  # (n, N)
    vectors = model.image_vector(region_tokens(patches, touched)[:, 0])  # (n, E)
    named = (vectors @ texts.T).argmax(1).numpy() == right
    heat = (model.image_vector(patches) @ texts[torch.from_numpy(right)][..., None])[..., 0]  # (n, N)
    inside = np.stack([patches_inside(scene, patch)[phrase.row] for scene, phrase in asked])
    pointed = inside[np.arange(len(asked)), heat.argmax(1).numpy()]
    grounded = iou(predict_boxes(model, tokenizer, asked), boxes.astype(float)) >= 0.5
    found = {"naming": named, "pointing": pointed, "grounding": grounded, "blind": inside.mean(1)}
    return {name: Sample([float(hit) for hit in hits], clusters) for name, hits in found.items()}
