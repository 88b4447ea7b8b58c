"""CoCa: open_clip's numbers, who may see whom in both halves, and decoding with a cache."""

import numpy as np
import pytest
import torch

from minivlp.models.coca import Coca, CocaConfig, load_coca, small_init
from minivlp.models.published.coca import from_published
from minivlp.targets import next_words
from tests.peers import open_clip_coca

SIZES = dict(
    vocab_size=40, max_text_len=9, patch=8, image_size=16, image_dim=48, image_layers=2, image_heads=3,
    image_hidden=96, dim=32, heads=2, hidden=64, text_layers=2, layers=2, queries=6, pool_heads=2,
)  # fmt: skip


def tiny(**changes) -> Coca:
    """A small model whose parameters all matter: near 0, where they start, mistakes hide."""
    torch.manual_seed(0)
    model = Coca(CocaConfig(**SIZES | changes)).eval()
    for name, parameter in model.named_parameters():
        if name != "contrast.log_scale":
            parameter.data += torch.randn(parameter.shape) * 0.2
    return model.requires_grad_(False)


def batch():
    """Three texts of different lengths, and pictures."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [5], [2]])
    return ids * mask, mask, torch.randn(3, 3, 16, 16, generator=generator)


def theirs(width: int, correct_cls_mask: bool = True):
    """open_clip's CoCa of the sizes above, its picture tower of another width or of the text's."""
    torch.manual_seed(0)
    text = dict(context_length=9, vocab_size=40, width=32, heads=2, layers=2)
    picture = dict(
        image_size=16, patch_size=8, width=width, head_width=16, layers=2, attentional_pool=True,
        attn_pooler_queries=6, attn_pooler_heads=2, output_tokens=True,
    )  # fmt: skip
    model = open_clip_coca()(32, text, text | dict(embed_cls=True, output_tokens=True), picture)
    model.text.correct_cls_mask = correct_cls_mask
    torch.nn.init.normal_(model.text_decoder.text_projection)  # the package leaves it empty
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.2
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("width", [32, 48])
def test_equals_open_clip(width):
    """One pooler with a stacked matrix, or with three; texts padded with id 0."""
    peer, (ids, mask, pixels) = theirs(width), batch()
    ours = load_coca(peer.state_dict(), heads=(width // 16, 2, 2)).eval()
    wanted = peer(pixels, ids)
    (x, tokens), (y, words) = ours.encode_image(pixels), ours.encode_text(ids, mask)
    logits = ours.next_logits(words, tokens)
    assert torch.allclose(x, wanted["image_features"], atol=1e-5)
    assert torch.allclose(y, wanted["text_features"], atol=1e-5)
    assert torch.allclose(tokens, peer(pixels)["image_embs"], atol=1e-5)
    assert torch.allclose(ours.scale, wanted["logit_scale"])
    real = mask[:, :-1]  # what stands at padding is never read
    assert torch.allclose(logits[:, :-1][real], wanted["logits"][real], rtol=1e-5, atol=2e-5)
    assert wanted["logits"].std() > 1
    labels = torch.from_numpy(next_words(ids.numpy(), mask.numpy()))
    peers = torch.nn.functional.cross_entropy(wanted["logits"].mT, wanted["labels"], ignore_index=0)
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(own, peers, rtol=1e-5)


def test_the_older_mask_of_open_clip_is_another():
    """Its default hides [CLS] from itself in a padded text and shows it padding: the word there counts."""
    peer, (ids, mask, pixels) = theirs(48, correct_cls_mask=False), batch()
    y, _ = load_coca(peer.state_dict(), heads=(3, 2, 2)).encode_text(ids, mask)
    wanted = peer(pixels, ids)["text_features"]
    assert torch.allclose(y[0], wanted[0], atol=1e-5)  # no padding, no difference
    assert (y[1:] - wanted[1:]).abs().max() > 1e-3
    peer.text.token_embedding.weight[0] += torch.randn(32)
    assert (peer(pixels, ids)["text_features"] - wanted)[1:].abs().max() > 1e-3


def test_padding_changes_nothing():
    model, (ids, mask, pixels) = tiny(), batch()
    _, tokens = model.encode_image(pixels)
    y, words = model.encode_text(ids, mask)
    logits = model.next_logits(words, tokens)
    other_y, other_words = model.encode_text(torch.where(mask, ids, 7), mask)
    assert torch.equal(other_y, y) and torch.equal(other_words[mask], words[mask])
    for b, L in enumerate(mask.sum(1).tolist()):
        row = slice(b, b + 1)
        alone, states = model.encode_text(ids[row, :L], mask[row, :L])
        # [CLS] stands behind the padding: its position is that of the longest text.
        if L == 9:
            assert torch.allclose(alone, y[row], atol=1e-5)
        assert torch.allclose(model.next_logits(states, tokens[row]), logits[row, :L], atol=1e-4)


def influence(function, x):
    """Which inputs (L) move which outputs (L'), of x (1, L, D) → (1, L', D'): by autograd's Jacobian."""
    jacobian = torch.autograd.functional.jacobian(function, x)  # (1, L', D', 1, L, D)
    return jacobian.abs().sum((0, 2, 3, 5)) > 0


def test_no_word_sees_a_later_one_and_no_first_half_sees_the_picture():
    model, (ids, mask, pixels) = tiny(), batch()
    x, tokens = model.encode_image(pixels[:1])
    L = ids.shape[1]
    embedded = model.word(ids[:1])

    def run(z):
        """Both halves from embedded words: what the next words and the text's vector are made of."""
        model.word.forward = lambda ids: z  # encode_text embeds the ids: give it these rows
        y, words = model.encode_text(ids[:1], mask[:1])
        return y, model.next_logits(words, tokens)

    try:
        assert torch.equal(influence(lambda z: run(z)[1], embedded), torch.ones(L, L).tril().bool())
        assert influence(lambda z: run(z)[0][:, None], embedded).all()  # [CLS] has seen every word
    finally:
        del model.word.forward
    _, words = model.encode_text(ids[:1], mask[:1])
    other_x, other_tokens = model.encode_image(pixels[1:2])
    assert (other_x - x).abs().max() > 1e-3
    difference = model.next_logits(words, other_tokens) - model.next_logits(words, tokens)
    assert (difference.abs().amax(-1) > 1e-4).all()  # the second half does look


def test_cls_learns_nothing_from_captions():
    """Without the contrast no gradient reaches [CLS]: words do not look at it."""
    model, (ids, mask, pixels) = tiny().requires_grad_(True), batch()
    (_, tokens), (_, words) = model.encode_image(pixels), model.encode_text(ids, mask)
    model.next_logits(words, tokens).logsumexp(-1)[mask].sum().backward()
    for parameter in (model.text_cls, model.text_project.weight, model.image_project.weight):
        assert parameter.grad is None or not parameter.grad.any()
    assert not model.pool.query.grad[0].any() and model.pool.query.grad[1:].abs().sum(-1).min() > 0
    assert model.word.weight.grad.any() and model.patch.weight.grad.any()


def test_a_cache_changes_nothing():
    model, (ids, mask, pixels) = tiny(), batch()
    _, tokens = model.encode_image(pixels)
    _, words = model.encode_text(ids, mask)
    rows, cache = [], None
    for word in ids.unbind(1):
        scores, cache = model.follow(word, tokens, cache)
        rows.append(scores)
    one_by_one = torch.stack(rows, 1)
    assert torch.allclose(one_by_one[mask], model.next_logits(words, tokens)[mask], atol=1e-4)


def test_the_score_of_a_caption_is_that_of_its_words():
    """The chain rule: over all continuations of a prefix the probabilities sum to the prefix's own."""
    model, (_, _, pixels) = tiny(vocab_size=4), batch()
    _, tokens = model.encode_image(pixels[:1])
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)  # (64, 3)
    ids = torch.cat([torch.zeros(64, 1, dtype=torch.long), every], 1)
    _, words = model.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))
    log_p = model.next_logits(words[:, :-1], tokens.expand(64, -1, -1)).log_softmax(-1)
    whole = log_p.gather(2, ids[:, 1:, None]).sum((1, 2))
    assert whole.exp().sum().item() == pytest.approx(1, abs=1e-5)
    first = log_p[:, 0].gather(1, ids[:, 1:2])[:, 0].exp()
    for k in range(4):
        mine = every[:, 0] == k
        assert whole[mine].exp().sum().item() == pytest.approx(first[mine][0].item(), abs=1e-5)


def test_every_part_learns():
    torch.manual_seed(0)
    model, (ids, mask, pixels) = (
        small_init(Coca(CocaConfig(**SIZES | {"image_dim": 32, "image_heads": 2}))),
        batch(),
    )
    (x, tokens), (y, words) = model.encode_image(pixels), model.encode_text(ids, mask)
    loss = (model.scale * x @ y.T).logsumexp(1).sum() + model.next_logits(words, tokens).logsumexp(-1).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, m, p: (i, m, p[:, :, :8]), r"pixels must be 16 × 16, got \(3, 3, 8, 16\)"),
        (lambda i, m, p: (i, m, p / 0), "pixels must"),
        (lambda i, m, p: (i + 40, m, p), r"ids must lie in \[0, 40\)"),
        (lambda i, m, p: (i, m & (torch.arange(9) > 0), p), "text_mask must"),
        (lambda i, m, p: (i.repeat(1, 2), m.repeat(1, 2), p), "ids must have 1 to 9 words, got 18"),
    ],
)  # fmt: skip
def test_refusals(change, message):
    model = tiny()
    ids, mask, pixels = change(*batch())
    with pytest.raises(ValueError, match=message):
        model.encode_image(pixels)
        model.encode_text(ids, mask)


def test_published_refusals():
    state = theirs(48).state_dict()
    with pytest.raises(ValueError, match="heads must be given"):
        load_coca(state)
    with pytest.raises(ValueError, match="unexpected more"):
        from_published(state | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"logit_scale must hold one number, got \(2,\)"):
        from_published(state | {"logit_scale": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"missing visual\.proj"):
        from_published({k: v for k, v in state.items() if k != "visual.proj"})
    with pytest.raises(ValueError, match="queries must be at least 1"):
        CocaConfig(queries=0)


def test_next_words_of_a_row():
    ids, mask = np.array([[5, 6, 7, 0]]), np.array([[True, True, True, False]])
    assert next_words(ids, mask).tolist() == [[6, 7, -100, -100]]
