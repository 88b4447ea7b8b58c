"""Chameleon: published weights, both orders by one table, what is kept, pictures as words."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from minivlp.decoder import Guided, decode
from minivlp.masks import influence, visible
from minivlp.models.chameleon import (
    IMAGE_FIRST,
    TEXT_FIRST,
    Chameleon,
    ChameleonConfig,
    Writing,
    load_chameleon,
    small_init,
)
from minivlp.models.published.safetensors import save_state

CONFIG = ChameleonConfig(
    vocab_size=30, dim=24, layers=2, heads=3, hidden=20, codes=12, places=True, max_text_len=6, patch=4,
    image_size=8,
)  # fmt: skip
N, BEGIN = 4, CONFIG.begin


@pytest.fixture(scope="module")
def model():
    """In float64, every parameter far from its initial value."""
    torch.manual_seed(0)
    made = small_init(Chameleon(CONFIG)).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.4)
    made.codebook.normal_()
    return made


def pairs(B=5, L=6):
    """Texts of several lengths, their mask, pictures."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, BEGIN, (B, L), generator=generator)
    mask = torch.arange(L) < torch.arange(2, 2 + B)[:, None]
    image = torch.randint(BEGIN + 1, 30, (B, N), generator=generator)
    return text * mask, mask, image


# Published weights


@pytest.fixture(scope="module")
def hugging_face():
    """A small model of theirs, with values far from their initial ones."""
    transformers = pytest.importorskip("transformers")
    names = {"<image>": 4, "<racm3:break>": 5, "<eoss>": 6} | {
        f"IMGIMG{c}Z": 10 + i for i, c in enumerate("ABCD")
    }
    sizes = dict(vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=64, rms_norm_eps=1e-4)
    vq = dict(embed_dim=8, num_embeddings=4, latent_channels=8, resolution=16, base_channels=32)
    vq |= dict(channel_multiplier=[1], num_res_blocks=1)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = transformers.ChameleonConfig(**sizes, vocabulary_map=names, vq_config=vq, rope_parameters=rope)
    torch.manual_seed(0)
    theirs = transformers.ChameleonForConditionalGeneration(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return theirs


def test_hidden_states_are_hugging_faces(hugging_face, tmp_path):
    """Their scores of picture ids are −3.4e38 in every forward pass, so states and head are compared."""
    ids, mask = torch.randint(0, 40, (3, 9)), torch.arange(9) < torch.tensor([[9], [6], [1]])
    config = json.loads(hugging_face.config.to_json_string(use_diff=False))
    save_state(tmp_path, hugging_face.state_dict(), config)
    with torch.no_grad():
        expected = hugging_face.model(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = load_chameleon(tmp_path)
        states = ours.states(ids, mask)
        assert (states - expected)[mask].abs().max() < 1e-5
        scores, theirs = ours.scores(states), expected @ hugging_face.lm_head.weight.T
        assert (scores - theirs)[mask].abs().max() < 1e-5
        masked = hugging_face(input_ids=ids).logits
    words = [i for i in range(40) if i not in (10, 11, 12, 13)]
    torch.testing.assert_close(
        ours.scores(ours.states(ids))[..., words], masked[..., words], atol=1e-5, rtol=1e-5
    )
    assert (masked[..., 10:14] < -1e38).all()
    assert ours.config.base == 500 and ours.config.eps == 1e-4 and not ours.config.codes


def test_a_state_dict_alone_has_the_usual_base(hugging_face):
    ours = load_chameleon(hugging_face.state_dict())
    assert ours.config.base == 10_000 and ours.config.eps == 1e-5 and ours.config.heads == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.norm.weight"), "missing model.norm.weight"),
        (lambda s: s.pop("model.layers.1.self_attn.k_proj.weight"), "missing .*k_proj"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
        (lambda s: s.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight must have shape"),
        (lambda s: s.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}), "q_norm.weight must"),
        (lambda s: s.clear(), "source must hold named tensors"),
    ],
)
def test_other_tensors_are_refused(change, message, hugging_face):
    state = dict(hugging_face.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        load_chameleon(state)


@pytest.mark.parametrize(
    "field, value",
    [("swin_norm", True), ("num_key_value_heads", 1), ("model_type", "llama"), ("hidden_act", "gelu")],
)
def test_models_of_another_kind_are_refused(field, value, hugging_face, tmp_path):
    save_state(tmp_path, hugging_face.state_dict(), {field: value})
    with pytest.raises(ValueError, match=f"config.json must have {field}"):
        load_chameleon(tmp_path)
    save_state(tmp_path, hugging_face.state_dict(), {"rope_parameters": {"rope_type": "linear"}})
    with pytest.raises(ValueError, match="rope_type"):
        load_chameleon(tmp_path)


# Both orders


@pytest.mark.parametrize("image_first", [False, True])
def test_states_depend_on_what_the_table_lets_through(image_first, model):
    """Autograd's Jacobian of the stack, and the Boolean power of the mask."""
    text, mask, image = (t[:1] for t in pairs(B=5)[0:3])
    text, mask = text[:, :2], mask[:, :2]
    table, real = (IMAGE_FIRST if image_first else TEXT_FIRST), []
    hook = model.word.register_forward_hook(lambda m, a, out: real.append(out.requires_grad_()) or out)
    states = model.encode(text, mask, image, torch.tensor([image_first]))[0]
    hook.remove()
    reach = influence(visible((2, 1 + N), table, (0, 1)), len(model.blocks))
    for i, state in enumerate(states):
        (slope,) = torch.autograd.grad(state.square().sum(), real[0], retain_graph=True)
        np.testing.assert_array_equal((slope[0] != 0).any(1).numpy(), reach[i])


def test_padding_and_company_change_nothing(model):
    """A row alone, without its padding, has the states that it has in the batch; orders may be mixed."""
    text, mask, image = pairs()
    first = torch.tensor([True, False, True, False, True])
    states = model.encode(text, mask, image, first)
    for b in range(5):
        n = int(mask[b].sum())
        one = model.encode(text[b : b + 1, :n], mask[b : b + 1, :n], image[b : b + 1], first[b : b + 1])[0]
        torch.testing.assert_close(one[:n], states[b, :n])
        torch.testing.assert_close(one[n:], states[b, 6:])


@pytest.mark.parametrize("image_first", [False, True])
def test_writing_with_a_cache_is_reading_the_whole(image_first, model):
    """In either order: the scores of each next token are those of one pass over the layout."""
    text, mask, image = pairs(B=3, L=4)
    text, mask = text[2:], mask[2:]
    image = image[2:]
    n = int(mask.sum())
    states = model.encode(text, mask, image, torch.tensor([image_first]))[0]
    parts = [text[:, :n], model.with_begin(image)]
    order = torch.cat(parts[::-1] if image_first else parts, 1)
    place = torch.cat([torch.arange(4)[:n], 4 + torch.arange(1 + N)])
    place = torch.cat([place[n:], place[:n]]) if image_first else place
    writing, cache = Writing(model, model.layout(n, image_first)), None
    start = 1 + N if image_first else n
    for first, last in [(0, start), *((i, i + 1) for i in range(start, order.shape[1]))]:
        scores, cache = writing.next_scores(order[:, first:last], cache)
        torch.testing.assert_close(scores[0], model.scores(states[place[last - 1]]))


def test_a_picture_is_drawn_of_codes_alone_and_no_order_of_rows_counts(model):
    text, _, _ = pairs(B=3, L=4)
    allowed = torch.zeros(N, 30, dtype=torch.bool)
    allowed[:, BEGIN + 1 :] = True
    prefix = torch.cat([text, torch.full((3, 1), BEGIN)], 1)
    writing = Writing(model, model.layout(4))
    ids, told = decode(writing, prefix, allowed, np.random.default_rng(0))
    assert (ids > BEGIN).all() and model.paint(ids).shape == (3, 3, 8, 8)
    real = torch.ones_like(text, dtype=torch.bool)
    states = model.encode(text, real, ids, torch.zeros(3, dtype=torch.bool))[:, 4:-1]
    scores = model.scores(states).masked_fill(~allowed[0], -torch.inf).log_softmax(-1)
    torch.testing.assert_close(scores.gather(-1, ids[..., None]).sum((1, 2)), told)
    alone = Writing(model, model.layout(0))
    for scale in (0.0, 1.0):
        guided = Guided(writing, alone, torch.tensor([BEGIN]), scale)
        wanted = decode(*((writing, prefix) if scale else (alone, prefix[:, -1:])), allowed)
        assert torch.equal(decode(guided, prefix, allowed)[0], wanted[0])


# Pictures as words


def test_tokenise_and_paint_are_inverse_on_codes(model):
    image = pairs()[2]
    assert torch.equal(model.tokenise(model.paint(image)), image)
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    once = model.tokenise(pixels)
    assert torch.equal(model.tokenise(model.paint(once)), once)
    with pytest.raises(ValueError, match="image must hold ids of picture codes only, got -1 to"):
        model.paint(image * 0 + torch.tensor([BEGIN, 29, 29, 29]))
    with pytest.raises(ValueError, match="pixels must have height and width that are multiples of p=4"):
        model.tokenise(torch.rand(1, 3, 6, 8))


def test_renumbering_codes_and_their_rows_changes_nothing(model):
    text, mask, image = pairs()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    other = Chameleon(CONFIG).double()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for rows in (other.word.weight[BEGIN + 1 :], other.head.weight[BEGIN + 1 :], other.codebook):
            rows.copy_(rows[order])
    renamed = torch.argsort(order)[image - BEGIN - 1] + BEGIN + 1
    first = torch.tensor([True, False] * 2 + [True])
    states = [m.encode(text, mask, i, first) for m, i in ((model, image), (other, renamed))]
    torch.testing.assert_close(*states)
    assert torch.equal(other.paint(renamed), model.paint(image))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": torch.zeros(5, 3, dtype=torch.long)}, "image must have shape"),
        ({"image": torch.full((5, N), 30)}, r"ids must lie in \[0, 30\)"),
        ({"text": torch.full((5, 6), 30)}, r"ids must lie in \[0, 30\)"),
        ({"text": torch.ones(5, 6)}, "ids must have an integer dtype"),
        ({"image_first": torch.zeros(5)}, "image_first must be bool"),
        ({"image_first": torch.zeros(4, dtype=torch.bool)}, "image_first must have shape"),
        ({"text_mask": torch.zeros(5, 6, dtype=torch.bool)}, "text_mask must have a True in every row"),
    ],
)
def test_bad_pairs_are_refused(change, message, model):
    given = dict(zip(("text", "text_mask", "image"), pairs(), strict=True)) | {
        "image_first": torch.zeros(5) > 0
    }
    with pytest.raises(ValueError, match=message):
        model.encode(**given | change)


def test_configurations_that_cannot_be():
    with pytest.raises(ValueError, match="codes must be ≥ 0 and leave ids for words, got 29"):
        replace(CONFIG, codes=29)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch=4, got 9"):
        replace(CONFIG, image_size=9)


def test_a_published_size_needs_no_codebook():
    made = Chameleon(replace(CONFIG, codes=0, places=False))
    assert not hasattr(made, "codebook") and made.place is None
    assert small_init(made).states(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 24)
