"""Similarities of pictures and texts, prompts in an ensemble, and ranks that count no tie as a hit."""

import numpy as np
import pytest
import torch

from minivlp.data.names import PROMPTS, name_tokenizer, named
from minivlp.evaluation.match import Matcher, ranks, similarities
from minivlp.recipes import recipe_class
from minivlp.recipes.dual import DualSettings
from tests.tiny import DUAL_SIZES, few

CONCEPTS = [c for c in few().concepts if c.artists][:12]
NAMES = [named(c, "en") for c in CONCEPTS]
TOKENIZER = name_tokenizer(CONCEPTS, "en")
PIXELS = torch.rand(5, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


def matcher(objective: str) -> Matcher:
    model = recipe_class(objective)(DualSettings(**DUAL_SIZES), tokens=TOKENIZER.tokens).model.eval()
    return Matcher(model, TOKENIZER, objective == "filip")


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_vectors_are_compared_by_their_cosine(objective):
    m = matcher(objective)
    (x, x_mask), (y, _) = m.pictures(PIXELS), m.texts(NAMES)
    assert x.shape == (5, 1, 16) and x_mask.all() and y.shape == (12, 1, 16)
    assert np.allclose(similarities((x, x_mask), m.texts(NAMES)), x[:, 0] @ y[:, 0].T, atol=1e-6)


@pytest.mark.parametrize("objective", ["clip", "siglip", "filip"])
def test_a_text_means_the_same_beside_a_longer_one(objective):
    m = matcher(objective)
    pictures = m.pictures(PIXELS)
    alone, beside = (similarities(pictures, m.texts(t))[:, 0] for t in (NAMES[:1], NAMES))
    assert np.allclose(alone, beside, atol=1e-5)


def test_chunks_make_no_difference():
    m = matcher("filip")
    x, y = m.pictures(PIXELS.repeat(60, 1, 1, 1)), m.texts(NAMES * 20)
    whole = similarities(x, y)
    assert whole.shape == (300, 240) and np.allclose(whole[:5, :12], whole[5:10, 12:24], atol=1e-5)


def test_an_ensemble_of_one_is_the_prompt_bit_for_bit():
    for objective in ("clip", "filip"):
        m = matcher(objective)
        (one,) = m.ensembles(NAMES, PROMPTS["en"][1:2])
        plain = m.texts([PROMPTS["en"][1].format(name) for name in NAMES])
        assert torch.equal(one[0], plain[0]) and torch.equal(one[1], plain[1])


def test_an_ensemble_of_vectors_is_their_mean_with_length_one():
    m = matcher("clip")
    ((mean, _),) = m.ensembles(NAMES, PROMPTS["en"])
    parts = torch.stack([m.texts([p.format(n) for n in NAMES])[0] for p in PROMPTS["en"]])
    assert torch.allclose(mean.norm(dim=-1), torch.ones(12, 1))
    assert torch.allclose(mean * parts.mean(0).norm(dim=-1, keepdim=True), parts.mean(0), atol=1e-6)
    assert len(matcher("filip").ensembles(NAMES, PROMPTS["en"])) == len(PROMPTS["en"])


def test_ranks():
    scores = np.array([[0.1, 0.9, 0.5], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]])
    own = np.eye(3, dtype=bool)
    assert ranks(scores, own).tolist() == [2, 1, 2], "a tie counts against"
    near = own.copy()
    near[0, 1] = True
    assert ranks(scores, near).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ranks(np.ones((1, 2)), np.zeros((1, 2), bool)), "right must have a True in every row"),
        (lambda: matcher("clip").texts(["dog " * 30]), "must fit the model's 24 tokens"),
        (lambda: matcher("clip").ensembles(NAMES, ()), "prompts must hold at least one"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
