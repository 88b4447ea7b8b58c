"""The four archetypes: equal budgets, one interface, and a bag of words that knows no order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp.claims.archetypes import (
    ARCHETYPES,
    CONTROL,
    Archetype,
    ArchetypeConfig,
    ConvGrid,
    new_archetype,
    parameters,
)
from minivlp.claims.clock import archetype, parts
from minivlp.claims.settings import FULL, QUICK
from minivlp.claims.world import archetype_loss, world

EVERYONE = (*ARCHETYPES, CONTROL)
SMALL = {"vocab_size": 40, "max_text_len": 12, "dim": 16, "heads": 2, "image_size": 16}


def small(kind: str, seed: int = 0, **changes) -> Archetype:
    return new_archetype(ArchetypeConfig(kind, **SMALL | changes), seed).eval()


def texts(B: int, L: int = 8, seed: int = 0) -> torch.Tensor:
    """[CLS], words, [SEP]."""
    ids = torch.randint(5, 40, (B, L), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = 2, 3
    return ids


def pictures(B: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def full(ids: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


@pytest.mark.parametrize("settings", [FULL, QUICK], ids=["full", "quick"])
def test_the_four_have_equal_budgets(settings):
    """Within a tenth, where they are trained and where they are timed; and they spend it differently."""
    place = world(settings.world, settings.world.train.vocab_size)
    trained = {kind: parameters(new_archetype(place.sizes(kind), 0)) for kind in ARCHETYPES}
    timed = {kind: parameters(archetype(settings.clock, kind, 0)) for kind in ARCHETYPES}
    for budgets in (trained, timed):
        assert max(budgets.values()) <= 1.1 * min(budgets.values()), budgets
    image = {kind: parameters(small(kind).net.image.encoder) for kind in ("heavy", "towers")}
    text = {kind: parameters(small(kind).net.text.encoder) for kind in ("heavy", "towers")}
    assert image["towers"] == text["towers"] and image["heavy"] == 3 * text["heavy"] - 2 * 2 * SMALL["dim"]


@pytest.mark.parametrize("kind", EVERYONE)
def test_a_pair_scores_the_same_whoever_stands_beside_it(kind):
    model, ids, pixels = small(kind), texts(5), pictures(5)
    with torch.no_grad():
        together = model(ids, full(ids), pixels)
        alone = [model(ids[i : i + 1], full(ids[:1]), pixels[i : i + 1]) for i in range(5)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
        assert together.std() > 0


@pytest.mark.parametrize("kind", ARCHETYPES)
def test_padding_says_nothing(kind):
    model, ids, pixels = small(kind), texts(3), pictures(3)
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], 1)
    with torch.no_grad():
        expected, found = model(ids, full(ids), pixels), model(padded, padded > 0, pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_they_are_the_models_that_they_are_made_of():
    ids, pixels = texts(4), pictures(4)
    with torch.no_grad():
        patch, towers = small("patch"), small("towers")
        pooled = patch.net.encode(ids, full(ids), pixels)["pooled"]
        expected = patch.net.itm_logits(pooled).diff(dim=-1)[:, 0]
        torch.testing.assert_close(patch(ids, full(ids), pixels), expected)
        logits = towers.net.logits(towers.net.encode_image(pixels), towers.net.encode_text(ids))
        torch.testing.assert_close(towers(ids, full(ids), pixels), logits.diagonal())


@given(st.integers(0, 1000), st.integers(2, 6), st.integers(2, 6))
def test_a_bag_of_words_gives_one_score_to_all_orders(seed, B, L):
    """To the last bit, wherever in a batch the texts stand."""
    model, rng = small(CONTROL), np.random.default_rng(seed)
    ids = texts(B, L + 2, seed)
    shuffled = ids.clone()
    for row in shuffled:
        row[1:-1] = row[1:-1][torch.from_numpy(rng.permutation(L))]
    with torch.no_grad():
        read = model.read(torch.cat([ids, shuffled.flip(0)]), full(torch.cat([ids, ids])))
        seen = model.look(pictures(B))
        one, other = (model.meet(seen, words, full(ids)) for words in (read[:B], read[B:].flip(0)))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ARCHETYPES)
def test_the_others_can_tell_orders_apart(kind):
    model, ids = small(kind), texts(4)
    turned = torch.cat([ids[:, :1], ids[:, 1:-1].flip(1), ids[:, -1:]], 1)
    with torch.no_grad():
        one, other = (model(x, full(x), pictures(4)) for x in (ids, turned))
    assert (one != other).any()


@pytest.mark.parametrize("patch", [8, 16])
def test_the_grid_is_row_major_and_local(patch):
    """What changes in one place of a picture changes the features there and beside it the most."""
    torch.manual_seed(0)
    grid, side = ConvGrid(12, patch), 6 * patch
    pixels = torch.randn(1, 3, side, side)
    with torch.no_grad():
        before = grid(pixels)
        assert before.shape == (1, 36, 12)
        for row, column in ((1, 4), (4, 1), (2, 3)):
            changed = pixels.clone()
            changed[..., patch * row : patch * (row + 1), patch * column : patch * (column + 1)] += 3
            moved = (grid(changed) - before).norm(dim=-1)[0]
            most = divmod(int(moved.argmax()), 6)
            assert max(abs(most[0] - row), abs(most[1] - column)) <= 1


@pytest.mark.parametrize("kind", EVERYONE)
def test_every_weight_is_trained(kind):
    place = world(QUICK.world, QUICK.world.train.vocab_size)
    batches = place.batches(0, "curriculum")
    model = new_archetype(place.sizes(kind), 0)
    steps = place.size.train.steps
    for step in (0, steps // 4, steps - 1):
        sum(archetype_loss(model, batches(step), 0.1).values()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without <= {"net.text_position.weight"}


def test_a_dot_product_meets_in_a_matrix_and_a_transformer_pair_by_pair():
    done = {
        kind: {part: call() for part, call in parts(QUICK.clock, kind, 0).items()}
        for kind in ("towers", "patch")
    }
    B = QUICK.clock.batch
    assert done["towers"]["meeting"].shape == (B, B) and done["patch"]["meeting"].shape == (B,)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kind": "regions"}, "kind must be one of heavy, towers, grid, patch, bag, got 'regions'"),
        ({"blocks": 2}, "blocks must be even and more than 2, got 2"),
        ({"blocks": 5}, "blocks must be even and more than 2, got 5"),
        ({"kind": "grid", "patch": 4}, "patch must be a multiple of 8, got 4"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        small(**{"kind": "patch"} | wrong)
    assert str(error.value) == message
