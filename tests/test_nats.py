"""Every family on one axis: exact entropies of the grammar, and measures that prove no more than there is."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from minivlp.bayes import pmi
from minivlp.data import Scenes, load_emojivl, scene_pixels
from minivlp.data.probes import true_captions
from minivlp.data.scenes import SCENE_SIZES
from minivlp.evaluation.chameleon import nats
from minivlp.evaluation.match import Matcher, similarities
from minivlp.evaluation.nats import caption_nats, contrasted, drawn, masked_words, meanings, revealed
from minivlp.information import entropies, infonce_bound
from minivlp.models.chameleon import Chameleon, ChameleonConfig, small_init
from minivlp.recipes.base import load_trained, recipe_of
from minivlp.recipes.coca import CocaWriter
from minivlp.text import WordPiece

PAIRS = ("train", "held_out")


@pytest.fixture(scope="module")
def sources():
    emojivl = load_emojivl()
    return {pairs: Scenes(emojivl, canvas=48, pairs=pairs, seed=11) for pairs in PAIRS}


@pytest.fixture(scope="module")
def tokenizer(sources):
    """One piece a word."""
    words = dict.fromkeys(" ".join(meanings(sources["train"])).split())
    return WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])


@pytest.mark.parametrize("pairs", PAIRS)
def test_entropies_of_the_grammar(sources, tokenizer, pairs):
    source = sources[pairs]
    found, n = caption_nats(source, tokenizer), source.pairs_of_nouns
    assert found["caption"] == pytest.approx(math.log(2 * n * 4))
    assert found["given_picture"] == pytest.approx(math.log(2))
    assert found["information"] == pytest.approx(math.log(4 * n))
    assert found["length"] == pytest.approx(math.log(2))  # "left of" is a word longer than "above"
    lengths = Counter(len(tokenizer.encode(c)) for c in meanings(source))
    assert sorted(lengths) == [5, 6] and len(set(lengths.values())) == 1


def test_the_numbers_of_the_chapter(sources, tokenizer):
    train, held_out = (caption_nats(sources[pairs], tokenizer) for pairs in PAIRS)
    assert round(train["caption"], 3) == 8.168 and round(train["information"], 3) == 7.475
    assert round(held_out["caption"], 3) == 6.087 and round(held_out["information"], 3) == 5.394


def test_every_caption_has_one_other_that_is_true_of_its_pictures(sources):
    for source in sources.values():
        other = meanings(source)
        assert all(other[other[c]] == c != other[c] for c in other)
        for i in range(40):
            scene = source[i]
            assert set(true_captions(scene)) == {scene.caption, other[scene.caption]}


def test_a_contrast_is_the_bound_of_its_loss():
    rng = np.random.default_rng(0)
    S = rng.normal(size=(12, 12)) * 3
    found = contrasted(S, 4)
    for start in range(0, 12, 4):
        s = S[start : start + 4, start : start + 4]
        loss = (np.log(np.exp(s).sum(0)) + np.log(np.exp(s).sum(1))).mean() / 2 - s.diagonal().mean()
        assert found[start : start + 4].mean() == pytest.approx(infonce_bound(loss, 4))
    assert contrasted(S + 1000, 4) == pytest.approx(found)
    assert (contrasted(1e6 * np.eye(12), 12) <= math.log(12) + 1e-9).all()
    assert contrasted(np.zeros((4, 4)), 1) == pytest.approx(0)


@pytest.mark.parametrize("B", [0, 5, -4])
def test_batches_that_do_not_fit_are_refused(B):
    with pytest.raises(ValueError, match=r"^B must be ≥ 1 and divide 12, got"):
        contrasted(np.zeros((12, 12)), B)


def test_the_best_contrast_rises_to_information_and_not_above(sources):
    """A caption and its other form score alike with a picture, all others not at all."""
    source, rng = sources["held_out"], np.random.default_rng(0)
    other, true = meanings(source), math.log(4 * source.pairs_of_nouns)
    shown = np.array([min(c, o) for c, o in other.items()])[rng.integers(len(other), size=1024)]
    S = np.where(shown[:, None] == shown, math.log(220), -1e9)
    sizes = (2, 16, 128, 1024)
    means = [contrasted(S, B).mean() for B in sizes]
    assert means == sorted(means)
    assert all(m <= min(true, math.log(B)) for m, B in zip(means, sizes, strict=True))
    assert means[-1] > 0.95 * true


def exact_words(tokenizer, captions):
    """A masked model that knows the grammar: p(word | the words in view) among captions of this length."""
    rows = [tokenizer.batch([c])[0][0] for c in captions]

    def words(ids, pixels):
        same = np.array([r for r in rows if len(r) == ids.shape[1]])
        logits = torch.full((*ids.shape, len(tokenizer)), -1e9)
        for b, row in enumerate(ids.numpy()):
            fits = same[((same == row) | (row == tokenizer.mask_id)).all(1)]
            for k in range(len(row)):
                for word, count in Counter(fits[:, k].tolist()).items():
                    logits[b, k, word] = math.log(count)
        return logits

    return words


ORDERS = [(), (2,), (1, -1), (-1, -2, -3, -4, -5)]


@pytest.mark.parametrize("first", ORDERS)
def test_the_chain_rule_holds_in_every_order(sources, tokenizer, first):
    """For the true probabilities: Σ log p is −log of the number of captions of this length."""
    captions = list(meanings(sources["held_out"]))
    asked, words = captions[::97], exact_words(tokenizer, captions)
    found = revealed(words, tokenizer, asked, torch.zeros(len(asked), 1), first)
    assert found == pytest.approx(np.full(len(asked), -math.log(220)), abs=1e-5)


def test_words_hidden_alone_have_no_chain(sources, tokenizer):
    captions = list(meanings(sources["held_out"]))
    asked, words = captions[::97], exact_words(tokenizer, captions)
    alone = revealed(words, tokenizer, asked, torch.zeros(len(asked), 1), None)
    assert (alone > -math.log(220) + 0.5).all()  # less is open where the others are seen
    noun, chain = captions[0].split()[1], revealed(words, tokenizer, asked[:1], torch.zeros(1, 1), ())
    assert noun in asked[0] and chain.shape == (1,)


def test_each_word_sees_the_words_before_it_and_no_other(tokenizer):
    seen = []

    def words(ids, pixels):
        seen.append([tokenizer.tokens[i] for i in ids[0, 1:-1].tolist()])
        return torch.zeros(*ids.shape, len(tokenizer))

    found = revealed(words, tokenizer, ["a dog above a guitar"], torch.zeros(1, 1), (2, -1))
    masks = [["[MASK]" if word is None else word for word in row] for row in (
        [None] * 5, [None, None, "above", None, None], [None, None, "above", None, "guitar"],
        ["a", None, "above", None, "guitar"], ["a", "dog", "above", None, "guitar"],
    )]  # fmt: skip
    assert seen == masks and found == pytest.approx(-5 * math.log(len(tokenizer)))


def test_pictures_stay_with_their_captions(tokenizer):
    """Captions of two lengths are asked in two batches."""
    captions = ["a dog above a guitar", "a dog left of a guitar", "a guitar below a dog"]

    def words(ids, pixels):
        word = torch.nn.functional.one_hot(torch.tensor(5), len(tokenizer))
        return (pixels[:, None] * word).expand(-1, ids.shape[1], -1)

    pixels = torch.tensor([[0.0], [3.0], [9.0]])
    one, two, three = revealed(words, tokenizer, captions, pixels, ())
    alone = [revealed(words, tokenizer, [c], p[None], ()) for c, p in zip(captions, pixels, strict=True)]
    assert [one, two, three] == pytest.approx(np.concatenate(alone))


def test_pictures_are_drawn_as_the_model_s_own_nats_say(sources, tokenizer):
    torch.manual_seed(0)
    sizes = {"dim": 16, "layers": 2, "heads": 2, "hidden": 24, "codes": 8, "places": True, "max_text_len": 12}
    model = Chameleon(ChameleonConfig(vocab_size=len(tokenizer) + 9, **sizes, patch=8, image_size=24))
    model.codebook.copy_(torch.randn(model.codebook.shape))
    model = small_init(model).eval()
    pixels, captions = torch.rand(3, 3, 24, 24) * 2 - 1, list(meanings(sources["held_out"]))[:70]
    found = drawn(model, tokenizer, captions, pixels)
    for i in range(3):
        own = nats(model, tokenizer, captions, pixels[i : i + 1].expand(70, -1, -1, -1), image_first=False)
        assert found[i] == pytest.approx(-own[:, 1], abs=1e-3)


def test_a_generator_s_information_is_that_of_its_posterior():
    """E[log q(x | c) − log Σ p(c') q(x | c')] is at most I, whatever q is, and I where q is true."""
    rng = np.random.default_rng(0)
    likely = rng.dirichlet(np.ones(5) / 2, 4)  # p(x | c)
    joint = likely / 4
    true = entropies(joint)["mutual"]
    assert (joint * pmi(np.log(likely.T)).T).sum() == pytest.approx(true)
    for _ in range(20):
        wrong = rng.dirichlet(np.ones(5), 4)
        assert (joint * pmi(np.log(wrong.T)).T).sum() <= true + 1e-12
        apart = rng.dirichlet(np.ones(5))  # a q(x) of its own is no bound
        assert ((joint * np.log(likely / apart)).sum() > true) == (
            (joint.sum(0) * np.log(joint.sum(0) / apart)).sum() > 1e-12
        )


@pytest.mark.slow
@pytest.mark.parametrize("pairs", PAIRS)
def test_no_shipped_model_proves_more_than_there_is(sources, pairs):
    """CLIP and CoCa by comparing, CoCa by writing, FLAVA and MaskVLM by filling in, Chameleon by drawing."""
    source, n, few = sources[pairs], 192, 3
    coca, clip, chameleon = (load_trained(None, name) for name in ("coca", "clip", "chameleon"))
    exact = caption_nats(source, coca.tokenizer)
    scenes = [source[i] for i in range(n)]
    texts, pixels, writer = (
        [s.caption for s in scenes],
        scene_pixels(scenes),
        CocaWriter(recipe_of(coca), coca.model),
    )
    small = Scenes(source.emojivl, source.nouns, canvas=28, pairs=pairs, sizes=SCENE_SIZES, seed=12)
    tiny, matcher = [small[i] for i in range(n)], Matcher(clip.model, clip.tokenizer)
    words = matcher.texts([s.caption for s in tiny])
    compared = {
        "CLIP": float(clip.model.scale.detach()) * similarities(words, matcher.pictures(scene_pixels(tiny))),
        "CoCa": float(coca.model.scale.detach()) * writer.contrast(texts, scenes),
    }
    told = {
        (who, B): (contrasted(S, B).mean(), min(exact["information"], math.log(B)))
        for who, S in compared.items()
        for B in (2, 16, 64, 192)
    }
    told["CoCa writes"] = exact["caption"] + writer.log_p(texts, scenes).mean(), exact["information"]
    by_picture = nats(chameleon.model, chameleon.tokenizer, texts, pixels, image_first=True)[:, 0]
    told["Chameleon writes"] = exact["caption"] - by_picture.mean(), exact["information"]
    for name in ("flava", "maskvlm"):
        trained = load_trained(None, name)
        for first in ORDERS:
            log_q = revealed(masked_words(trained.model), trained.tokenizer, texts, pixels, first)
            left = exact["caption"] - exact["length"]
            told[name, first] = left + log_q.mean(), exact["information"] - exact["length"]
    if pairs == "held_out":
        every = list(meanings(source))
        log_q = drawn(chameleon.model, chameleon.tokenizer, every, pixels[:few])
        own = [every.index(text) for text in texts[:few]]
        told["Chameleon draws"] = pmi(log_q)[np.arange(few), own].mean(), exact["information"]
    above = {who: pair for who, pair in told.items() if pair[0] > pair[1]}
    assert not above and len(told) >= 17
    assert told["CoCa writes"][0] > 0.85 * exact["information"]
