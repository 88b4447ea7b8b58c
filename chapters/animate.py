"""`python -m chapters animate`: the main job learning, as a picture that moves.

The command trains the main job once more, eleven minutes on one core, and draws a frame at each of its looks.
For three pictures of pairs that training never shows, by the unseen artist, a frame has the probabilities of
five nouns for the hidden one, and where the first noun of the caption points.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from minivlp.core.files import whole_file
from minivlp.data import Scene, Scenes, scene_pixels
from minivlp.data.probes import article_and_noun, hide_slots, text_rows
from minivlp.evaluation.point import plan
from minivlp.models.vilt import Vilt
from minivlp.pictures.figures import BLUE
from minivlp.recipes.vilt import PRESETS, ViltRecipe
from minivlp.training import loop
from minivlp.training.run import ReadOnlyRun

PATH = Path(__file__).parent / "pictures" / "learning.gif"
LARGEST = 500_000  # bytes
ROWS, OTHERS = 3, 4  # scenes, and nouns beside the right one
MILLISECONDS, LAST = 500, 3000  # that a frame is shown, and the last one


def shown(recipe: ViltRecipe) -> list[Scene]:
    """The first scenes of a seed: they were not chosen."""
    artists = recipe.emojivl.unseen_artists
    scenes = Scenes(recipe.emojivl, recipe.nouns, artists, recipe.settings.canvas, pairs="held_out", seed=21)
    return [scenes[i] for i in range(ROWS)]


@torch.inference_mode()
def frame(model: Vilt, recipe: ViltRecipe, step: int) -> Image.Image:
    """What the model says after so many steps."""
    figure = Figure(figsize=(5.2, 4.6), dpi=100, layout="constrained")
    figure.suptitle(f"step {step:,} of {recipe.settings.steps:,}", fontsize=11)
    tokenizer, rng = recipe.tokenizer, np.random.default_rng(0)
    for (picture, bars, where), scene in zip(figure.subplots(ROWS, 3), shown(recipe), strict=True):
        text, answer = hide_slots(scene, [0], tokenizer)
        ids, mask, labels = text_rows(tokenizer, [text], [answer])
        states = model.encode(ids, mask, scene_pixels([scene]))["text"]
        share = model.mlm_logits(states[labels >= 0][:1])[0].softmax(-1)
        first = [tokenizer.encode(c.noun)[0] for c in recipe.nouns]
        others = rng.choice([k for k in first if k != answer[0]], OTHERS, replace=False)
        picture.imshow(scene.image)
        picture.set_title(text, fontsize=8)
        bars.barh(range(OTHERS + 1), share[[answer[0], *others]], color=["#7FB8D8"] + ["#CCCCCC"] * OTHERS)
        bars.set(xlim=(0, 1), ylim=(OTHERS + 0.6, -0.6), yticks=[], xticks=[0, 1])
        for y, k in enumerate((answer[0], *others)):
            bars.text(0.03, y, tokenizer.tokens[k], va="center", fontsize=8)
        said, heat = plan(model, tokenizer, scene, iters=1000)
        noun = article_and_noun(scene.slots[0])[1]
        z = heat[said.index(noun)]
        canvas, (x1, y1, x2, y2) = recipe.settings.canvas, scene.boxes[0]
        z = (z - z.mean()) / (z.std() + 1e-9)
        where.imshow(z, cmap="OrRd", vmin=0, vmax=4, extent=(0, canvas, canvas, 0))
        where.add_patch(_box(x1, y1, x2, y2))
        where.set_title(f"where “{noun}” points", fontsize=8)
        for ax in (picture, where):
            ax.set(xticks=[], yticks=[])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


def _box(x1: float, y1: float, x2: float, y2: float):
    from matplotlib.patches import Rectangle

    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=BLUE, linewidth=1.5)


def frames(recipe: ViltRecipe) -> Iterator[Image.Image]:
    """Train, and draw at the start and at every look."""
    yield frame(recipe.model.eval(), recipe, 0)
    for record in loop.steps(recipe, ReadOnlyRun("nowhere", {})):
        if "masked_object" in record:
            print(f"step {record['step']}", flush=True)
            yield frame(recipe.model.eval(), recipe, record["step"])
            recipe.model.train()


def write(images: list[Image.Image], path: Path = PATH) -> Path:
    """One GIF of all frames with one palette. Raises ValueError when it is larger than LARGEST."""
    palette = images[-1].quantize(96, dither=Image.Dither.NONE)
    first, *rest = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    file, times = io.BytesIO(), [MILLISECONDS] * (len(images) - 1) + [LAST]
    first.save(file, "gif", save_all=True, append_images=rest, duration=times, loop=0, optimize=True)
    if len(file.getvalue()) > LARGEST:
        raise ValueError(f"the animation has {len(file.getvalue()):,} bytes, at most {LARGEST:,} are allowed")
    with whole_file(path) as out:
        out.write(file.getvalue())
    return path


def animate(threads: int | None = None) -> int:
    """Train the main job and write the animation; 0."""
    torch.set_num_threads(threads or 1)
    recipe = ViltRecipe(PRESETS["cpu"], {"preset": "cpu"})
    print(f"wrote {write(list(frames(recipe)))}")
    return 0
