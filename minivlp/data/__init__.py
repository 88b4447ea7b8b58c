"""One door to all data: EmojiVL and the scenes composed from it, and your own pictures with captions."""

from minivlp.data.emojivl import CPU_NOUNS, TRAINING_ARTISTS, Concept, EmojiVL, load_emojivl, trained_concepts
from minivlp.data.own import CaptionedImage, captions_folder, coco_captions
from minivlp.data.scenes import RELATIONS, Scene, Scenes, held_out, scene_pixels

__all__ = [
    "CPU_NOUNS",
    "RELATIONS",
    "TRAINING_ARTISTS",
    "CaptionedImage",
    "Concept",
    "EmojiVL",
    "Scene",
    "Scenes",
    "captions_folder",
    "coco_captions",
    "held_out",
    "load_emojivl",
    "scene_pixels",
    "trained_concepts",
]
