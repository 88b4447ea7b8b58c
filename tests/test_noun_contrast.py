"""Words and patches read apart: neither sees the other, and the loss is InfoNCE of what one noun finds."""

import math
from dataclasses import replace

import pytest
import torch

from minivlp.data import Scenes, scene_pixels
from minivlp.data.probes import hide_slots
from minivlp.recipes.noun_contrast import SCALE, encode_separately, noun_contrast_loss
from minivlp.recipes.vilt_batches import Part, SceneBatches, Stage, Wrong
from tests.test_train import CONFIG, EMOJIVL, NOUNS, TOKENIZER, new_model

DEEP = replace(CONFIG, layers=3)


def model(config=DEEP):
    return new_model(config).double()


def batch(B=5, L=7, padded=2):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(TOKENIZER), (B, L), generator=g)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[1, L - padded :] = False
    noun = torch.zeros(B, L, dtype=torch.bool)
    noun[:, 2], noun[0, 3] = True, True  # the first has two pieces
    return ids, mask, noun, torch.randn(B, 3, 48, 48, generator=g, dtype=torch.float64)


def stage_batches(*parts, contrast=1.0, step=0, batch=40):
    return SceneBatches(EMOJIVL, NOUNS, TOKENIZER, (Stage(1.0, parts, contrast),), 20, batch, 0)(step)


def test_neither_sees_the_other():
    net, (ids, mask, _, pixels) = model(), batch()
    words, patches = encode_separately(net, ids, mask, pixels, 2)
    other_words, _ = encode_separately(net, ids, mask, -pixels, 2)
    _, other_patches = encode_separately(net, ids.flip(1), mask, pixels, 2)
    assert torch.equal(words, other_words) and torch.equal(patches, other_patches)
    assert words.shape == (5, 7, 16) and patches.shape == (5, 36, 16)


def test_they_pass_the_blocks_that_read_pairs():
    """With one kind of token kept from the other, a pair's states are those read apart."""
    net, (ids, mask, _, pixels) = model(), batch()
    text, (image, _) = net.embed_text(ids, mask), net.embed_image(pixels)
    kind = torch.arange(7 + 37) < 7
    keys = (kind[:, None] == kind) & torch.cat([mask, mask.new_ones(5, 37)], 1)[:, None, None]
    z = torch.cat([text, image], 1)
    for layers in (1, 2, 3):
        z = net.encoder.blocks[layers - 1](z, keys)
        words, patches = encode_separately(net, ids, mask, pixels, layers)
        torch.testing.assert_close(words, z[:, :7])
        torch.testing.assert_close(patches, z[:, 8:])  # without the image's [CLS]


def by_hand(net, ids, mask, noun, pixels):
    """The definition, one caption, one picture and one piece of its noun at a time."""
    words, patches = encode_separately(net, ids, mask, pixels, 2)  # half of 3 blocks
    words, patches = (z - z.mean(-1, keepdim=True) for z in (words, patches))
    cos = torch.nn.functional.cosine_similarity
    B, S = len(ids), torch.zeros(len(ids), len(ids), dtype=torch.float64)
    for b in range(B):
        for a in range(B):
            found = [cos(words[b, n], patches[a], dim=-1).max() for n in noun[b].nonzero().flatten()]
            S[b, a] = SCALE * sum(found) / len(found)
    loss = 0.0
    for i in range(B):
        rivals = [j for j in range(B) if j == i or not torch.equal(ids[i], ids[j])]
        loss += (S[i, rivals].logsumexp(0) + S[rivals, i].logsumexp(0) - 2 * S[i, i]) / (2 * B)
    return float(loss.detach())


@pytest.mark.parametrize("equal", [(), (0, 1), (0, 1, 2, 3, 4)])
def test_it_is_infonce_of_what_nouns_find(equal):
    """Also when captions are equal: they are no rivals of each other."""
    net, (ids, mask, noun, pixels) = model(), batch()
    ids[list(equal)] = ids[0].clone()
    loss = float(noun_contrast_loss(net, ids, mask, noun, pixels).detach())
    assert math.isclose(loss, by_hand(net, ids, mask, noun, pixels), abs_tol=1e-6)
    assert (loss > 0.1) == (len(equal) < 5)


def test_other_words_say_nothing_by_themselves():
    """The gradient reaches another word only through the blocks, and what passes no block gets none."""
    net, (ids, mask, noun, pixels) = model(), batch()
    for block in net.encoder.blocks:
        torch.nn.init.zeros_(block.proj.weight)  # no word sees another
    noun_contrast_loss(net, ids, mask, noun, pixels).backward()
    felt = {int(i) for i in net.word.weight.grad.abs().sum(1).nonzero()}
    assert felt == set(ids[noun].tolist())
    assert net.pooler.weight.grad is None and net.encoder.blocks[2].qkv.weight.grad is None


def test_gradients_pull_a_noun_to_its_picture():
    net, data = model(), batch()
    before = noun_contrast_loss(net, *data)
    before.backward()
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad
    assert noun_contrast_loss(net, *data).item() < before.item()


PARTS = (
    Part("one", 0.3, canvas=24),
    Part("pick", 0.3),
    Part("pair", 0.4, wrong=Wrong(0.3, 0.2, 0.2)),
)


def test_captions_are_true_of_the_picture_in_their_example():
    """Whatever is asked of the example: hidden words and wrong pairs change its text, not what is true of it.

    One noun is marked, and no other shows.
    """
    scenes = {p: Scenes(EMOJIVL, NOUNS, canvas=p.canvas, kinds={p.kind: 1}, sizes=p.sizes) for p in PARTS}
    drawn = [scenes[p][40 * 3 + i] for p in PARTS for i in range(round(p.share * 40))]
    shown = {scene_pixels([scene]).numpy().tobytes(): scene for scene in drawn}
    exchanged, looked = 0, [0, 0]
    for examples in stage_batches(*PARTS, step=3):
        for i, caption in enumerate(examples.contrast_ids):
            scene = shown[examples.pixels[i].numpy().tobytes()]
            noun = TOKENIZER.decode(caption[examples.noun[i]].tolist())
            which = [slot.split(" ", 1)[1] for slot in scene.slots].index(noun)
            looked[which] += 1
            said = scene.caption if len(scene.slots) == 1 else hide_slots(scene, [1 - which], TOKENIZER)[0]
            assert caption[examples.contrast_mask[i]].tolist() == TOKENIZER.batch([said])[0][0].tolist()
            exchanged += int(examples.align[i] == -1)
    assert exchanged and looked[0] > looked[1] > 3  # of a pair either noun, by chance


def test_a_stage_decides_whether_its_examples_are_read_separately():
    whole, half, without = (stage_batches(*PARTS, contrast=share) for share in (1.0, 0.5, 0.0))
    for a, h, b in zip(whole, half, without, strict=True):
        read = h.noun.any(1)
        assert a.noun.any(1).all() and int(read.sum()) == math.ceil(len(read) / 2)
        assert b.contrast_ids is None and b.contrast_mask is None and b.noun is None
        assert all(torch.equal(getattr(a, k), v) for k, v in vars(b).items() if torch.is_tensor(v))


@pytest.mark.parametrize("layers", [0, 4])
def test_a_model_has_no_such_block(layers):
    net, (ids, mask, _, pixels) = model(), batch()
    with pytest.raises(ValueError, match=rf"layers must lie in \[1, 3\], got {layers}"):
        encode_separately(net, ids, mask, pixels, layers)


def test_a_caption_without_a_noun_is_refused():
    net, (ids, mask, noun, pixels) = model(), batch()
    noun[3] = False
    with pytest.raises(ValueError, match="x_mask"):
        noun_contrast_loss(net, ids, mask, noun, pixels)


def test_a_model_of_one_block_has_a_half():
    assert math.isfinite(noun_contrast_loss(model(CONFIG), *batch()).item())
