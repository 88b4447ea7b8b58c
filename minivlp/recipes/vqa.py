"""VQA: a question about one picture, answered by one of the words that are answers.

Sources: Goyal et al. 2017 (VQA v2); Kim, Son and Kim 2021 (ViLT), section 4.3.
"""

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from minivlp.core.require import fail
from minivlp.data.questions import Question, answers, questions
from minivlp.models.vilt import Vilt
from minivlp.recipes.tasks import TaskBatch, TaskRecipe
from minivlp.training.workers import ONE_PROCESS, Workers


class VqaRecipe(TaskRecipe):
    """ViLT learns to answer questions."""

    terms = ("vqa",)
    overrides = {"steps": 1600, "lr": 5e-4}

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """All answers, in the order of the logits."""
        return answers(self.nouns)

    def heads(self) -> dict[str, Any]:
        return {"num_answers": len(self.answers)}

    def items(self, n: int, pairs: str, seed: int, artists: Sequence[str] | None = None) -> list[Question]:
        return questions(self.emojivl, self.nouns, self.settings.canvas, n, artists, pairs, seed)

    def collate(self, items: Sequence[Question]) -> TaskBatch:
        """Targets (B, answers) of 0 and 1. Raises ValueError for an answer that is not among the answers."""
        number = {answer: k for k, answer in enumerate(self.answers)}
        targets = torch.zeros(len(items), len(self.answers))
        for row, item in zip(targets, items, strict=True):
            if item.answer not in number:
                fail("answers", "must hold the answer of every question", repr(item.answer))
            row[number[item.answer]] = 1
        ids, mask, pixels = self.inputs([q.text for q in items], [[q.scene for q in items]])
        return TaskBatch(ids, mask, pixels[:, 0], targets)

    def logits(self, model: Vilt, batch: TaskBatch) -> Tensor:
        """(B, answers)."""
        return model.vqa_logits(model.encode(batch.ids, batch.text_mask, batch.pixels)["pooled"])

    def loss(
        self, model: Vilt, batches: Sequence[TaskBatch], workers: Workers = ONE_PROCESS
    ) -> dict[str, Tensor]:
        """The sum over answers of one binary cross-entropy each, a mean over questions."""
        (batch,) = batches
        loss = binary_cross_entropy_with_logits(self.logits(model, batch), batch.targets)
        return {"vqa": len(self.answers) * loss}

    def right(self, model: Vilt, batch: TaskBatch) -> Tensor:
        return self.logits(model, batch).argmax(-1) == batch.targets.argmax(-1)

    def kinds(self, items: Sequence[Question]) -> tuple[list[str], list[Hashable], dict, dict]:
        chances = {"all": 1 / 2, "how many": 1 / 4, "what is shown": 1 / len(self.nouns), "where": 1 / 2}
        ceilings = {"all": 3 / 4, "how many": 1, "what is shown": 1, "where": 1 / 2}
        clusters = [tuple(sorted(set(item.scene.objects))) for item in items]
        return [item.kind for item in items], clusters, chances, ceilings
