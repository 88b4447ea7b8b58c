"""What models that write know and do: CoCa with two losses and with one, and a small Chameleon.

Of CoCa, with as many steps for each,

    order            the caption is more probable than the same words with the nouns exchanged
    order contrast   its cosine with the picture is larger than that of the exchanged one
    true             the caption that the model writes, the likeliest word after each, is true of the picture
    retrieval        by cosine, the caption's picture is strictly the first of its set

of a Chameleon

    drawn            a picture is more probable after its caption than after the exchanged one
    written          the caption is more probable after the picture than the exchanged one

and of one at high rates, with QK-norm and without,

    scores           log of the largest |q · k| / √d of a pair, over layers, heads and tokens that may look
    nats             of the caption and of the picture's codes after it

Sources: Yu et al. 2022 (CoCa), section 4.4, for one loss against two; Tschannen et al. 2023 and Lin et al.
2023 (VisualGPTScore) for p(caption | picture); Li et al. 2023 (Diffusion Classifier) for p(picture |
caption); Dehghani et al. 2023 (ViT-22B), section 2, and Chameleon team 2024, section 2.3, for QK-norm.
Left out: equal time, of which captions take more than the contrast; the loss that diverges without QK-norm in
the sources, after far more steps than these.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.claims.settings import Small
from minivlp.claims.small import retrieval, sample, trained
from minivlp.claims.verdict import Sample
from minivlp.data import scene_pixels
from minivlp.data.probes import swapped, true_captions
from minivlp.decoder import turn, turns
from minivlp.evaluation.chameleon import nats
from minivlp.evaluation.reading import fitting_rows
from minivlp.masks import real_keys
from minivlp.models.chameleon import Chameleon
from minivlp.recipes.chameleon import ChameleonRecipe
from minivlp.recipes.coca import CocaRecipe, CocaWriter

TERMS = {"both": {}, "captions": {"contrast_weight": 0.0}, "contrast": {"caption_weight": 0.0}}


def captioning(size: Small, seed: int, folder: Path, losses: str) -> dict[str, Sample]:
    """The samples that the losses, one of TERMS, teach."""
    recipe, model, source = trained(CocaRecipe, size, seed, folder, **TERMS[losses])
    writer, scenes = CocaWriter(recipe, model), [source[i] for i in range(size.items)]
    texts, exchanged = [scene.caption for scene in scenes], [swapped(scene) for scene in scenes]
    found = {}
    if losses != "contrast":
        written = zip(writer.write(scenes), scenes, strict=True)
        found["true"] = sample((text in true_captions(scene) for text, scene in written), scenes)
        found["order"] = sample(writer.log_p(texts, scenes) > writer.log_p(exchanged, scenes), scenes)
    if losses != "captions":
        own, other = (writer.contrast(t, scenes).diagonal() for t in (texts, exchanged))
        found["order contrast"] = sample(own > other, scenes)
        found["retrieval"] = retrieval(writer.contrast, source, size)
    return found


def writing(size: Small, seed: int, folder: Path) -> dict[str, Sample]:
    """Samples "drawn" and "written"."""
    recipe, model, source = trained(ChameleonRecipe, size, seed, folder)
    scenes, found = [source[i] for i in range(size.items)], {}
    texts = [scene.caption for scene in scenes], [swapped(scene) for scene in scenes]
    for name, column in (("written", 0), ("drawn", 1)):
        told = (nats(model, recipe.tokenizer, t, scene_pixels(scenes), not column) for t in texts)
        found[name] = sample(np.less(*told)[:, column], scenes)
    return found


class Unnormed(ChameleonRecipe):
    """Chameleon without QK-norm."""

    def new_model(self) -> Chameleon:
        model = super().new_model()
        for block in model.blocks:
            block.q_norm, block.k_norm = nn.Identity(), nn.Identity()
        return model


NORMS = {"norm": ChameleonRecipe, "plain": Unnormed}


def scores(size: Small, seed: int, folder: Path, kind: type[ChameleonRecipe]) -> dict[str, Sample]:
    """Samples "scores" and "nats" of the decoder with QK-norm or without, one of NORMS."""
    recipe, model, source = trained(kind, size, seed, folder)
    scenes = [source[i] for i in range(size.items)]
    captions, pixels = [scene.caption for scene in scenes], scene_pixels(scenes)
    rows = map(torch.from_numpy, fitting_rows(recipe.tokenizer, captions, size.train.max_text_len))
    told = nats(model, recipe.tokenizer, captions, pixels, False).sum(1)
    found = {"scores": largest(model, *rows, model.tokenise(pixels)).log(), "nats": told}
    return {name: sample(values, scenes) for name, values in found.items()}


@torch.no_grad()
def largest(model: Chameleon, text: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
    """The largest |score| of attention in each pair, read with the text first: (B,)."""
    caught: list[Tensor] = []
    norms = [norm for block in model.blocks for norm in (block.q_norm, block.k_norm)]
    hooks = [norm.register_forward_hook(lambda *call: caught.append(call[-1])) for norm in norms]
    model.encode(text, text_mask, image, torch.zeros(len(text), dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    n, width = caught[0].shape[2:]
    angles = turns(model.layout(text.shape[1]), width, model.config.base, caught[0])
    real = torch.cat([text_mask, text_mask.new_ones(len(text), n - text.shape[1])], 1)
    seen = real_keys(torch.ones(n, n, dtype=torch.bool).tril(), real) & real[:, None, :, None]  # (B, 1, n, n)
    q, k = (turn(torch.stack(caught[i::2]), *angles) for i in (0, 1))  # (layers, B, H, n, d)
    return (q @ k.mT / width**0.5 * seen).abs().amax((0, 2, 3, 4))
