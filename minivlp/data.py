"""One door to all data: EmojiVL and the scenes composed from it, and your own pictures with captions."""

from minivlp.captions import CaptionedImage, captions_folder, coco_captions
from minivlp.emojivl import CPU_NOUNS, FOLDER, TRAINING_ARTISTS, Concept, EmojiVL, load_emojivl
from minivlp.scenes import NUMBERS, RELATIONS, Scene, Scenes, held_out

__all__ = [
    "CPU_NOUNS",
    "FOLDER",
    "NUMBERS",
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
]
