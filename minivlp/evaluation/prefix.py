"""A language model that is told of scenes by a prefix, and says what they show: a Writer for captions.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlp.data import Scene
from minivlp.data.lists import COLON
from minivlp.decoder import decode
from minivlp.evaluation.reading import BATCH, fitting_rows
from minivlp.models.bridge import LanguageModel, Reading
from minivlp.targets import next_words
from minivlp.text import WordPiece


@dataclass(frozen=True)
class PrefixWriter:
    """model: reads [CLS], a prefix, ":", the sentence, [SEP]; prefix(scenes) → (n, P, D)."""

    model: LanguageModel
    tokenizer: WordPiece
    prefix: Callable[[Sequence[Scene]], Tensor]

    @torch.inference_mode()
    def log_p(self, captions: Sequence[str], scenes: Sequence[Scene]) -> np.ndarray:
        """The log probability of caption i with its end, given scene i: (n,), nats."""
        model, t, found = self.model, self.tokenizer, []
        texts = [f"{COLON} {caption}" for caption in captions]
        ids, mask = map(torch.from_numpy, fitting_rows(t, texts, model.config.max_text_len))
        for rows in torch.arange(len(texts)).split(BATCH):
            told = self.prefix([scenes[i] for i in rows])
            words, real = ids[rows].to(told.device), mask[rows].to(told.device)
            log_p = model.scores(model.encode(words, real, told)[:, 1:]).log_softmax(-1)
            labels = next_words(words, real)[:, 1:]  # of [CLS] nothing is asked
            told = log_p.gather(2, labels.clamp_min(0)[..., None])[..., 0] * (labels >= 0)
            found.append(told.sum(1).double().cpu())
        return torch.cat(found).numpy()

    @torch.inference_mode()
    def write(self, scenes: Sequence[Scene]) -> list[str]:
        """The most probable word after each, until the end."""
        parts = [scenes[i : i + BATCH] for i in range(0, len(scenes), BATCH)]
        return [text for part in parts for text, _ in self.sentences(self.prefix(part))]

    @torch.inference_mode()
    def sentences(self, prefix: Tensor, **how: Any) -> list[tuple[str, float]]:
        """A sentence and its log probability for each prefix; how: of `decoder.decode`."""
        t, places = self.tokenizer, self.model.config.max_text_len - 2
        allowed = torch.ones(places, len(t), dtype=torch.bool, device=prefix.device)
        allowed[:, [i for i in t.special_ids if i != t.sep_id]] = False
        begin = torch.tensor([[t.cls_id, *t.encode(COLON)]], device=prefix.device).expand(len(prefix), -1)
        ids, log_p = decode(Reading(self.model, prefix), begin, allowed, end=t.sep_id, **how)
        return [(t.decode(row), value) for row, value in zip(ids.tolist(), log_p.tolist(), strict=True)]
