"""The claims: verdicts that follow from numbers, work that is not done twice, a table and its pictures."""

import json
import math
import os
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minivlp.__main__ import main
from minivlp.claims import chunks as chunks_module
from minivlp.claims import command, exam, work
from minivlp.claims.archetypes import CONTROL, new_archetype
from minivlp.claims.chunks import chunks
from minivlp.claims.claim import Claim
from minivlp.claims.exam import counterparts, winoground
from minivlp.claims.layers import by_layer, layers
from minivlp.claims.report import merged
from minivlp.claims.settings import FULL, QUICK, ClockSize, Settings, Small
from minivlp.claims.table import CLAIMS, chosen
from minivlp.claims.training import train
from minivlp.claims.verdict import (
    FAILS,
    HOLDS,
    OPEN,
    Interval,
    Sample,
    difference,
    interval,
    student,
    verdict,
)
from minivlp.claims.work import EXPERIMENTS, do_all, done, made_with, results, seeds
from minivlp.claims.world import MASKINGS, ArchetypeRecipe, without_shared_facts, world
from minivlp.data.probes import swapped
from minivlp.mlm import IGNORE
from minivlp.recipes.vilt_batches import stage_at
from minivlp.training.screen import Screen
from tests.course import ROOT
from tests.tiny import told

FEW = {"steps": 3, "batch": 8, "hidden": 16, "warmup": 1, "save_every": 3, "report_every": 3}
NARROW = FEW | {"dim": 16, "heads": 2}


def tiny_part(size: Small) -> Small:
    """A few steps of it, asked about a few pictures."""
    return replace(size, train=replace(size.train, steps=3, batch=8, warmup=1), items=32, sets=1)


TINY = Settings(
    seeds=2,
    many=2,
    world=replace(QUICK.world, train=replace(QUICK.world.train, **NARROW), items=32, sets=1, candidates=4),
    naming=replace(
        QUICK.naming,
        train=replace(
            QUICK.naming.train, **NARROW | {"steps": 2}, embed=16, text_dim=16, text_heads=2, text_hidden=16
        ),
        batches=(4, 8),
    ),
    regions=replace(QUICK.regions, train=replace(QUICK.regions.train, **NARROW, embed=16), items=16),
    clock=ClockSize(dim=24, heads=2, patch=8, image_size=16, batch=2, seconds=0),
    chunks=replace(QUICK.chunks, batch=24, dim=8, blocks=(1, 7, 24), draws=2),
    **{name: tiny_part(getattr(QUICK, name)) for name in ("captions", "codes", "scores", "writing")},
)
numbers = st.floats(-5, 5)


# From numbers to a verdict


@given(numbers, st.floats(0, 3), numbers, st.booleans())
def test_a_verdict_is_the_side_of_the_margin(value, reach, margin, above):
    found = Interval(value, value - reach, value + reach)
    said = verdict(found, margin, above)
    if found.low <= margin <= found.high:
        assert said == OPEN
    else:
        assert said == (HOLDS if (value > margin) == above else FAILS)


@given(numbers, st.floats(0, 3), numbers)
def test_verdicts_are_symmetric(value, reach, margin):
    """The opposite claim has the opposite verdict, and so has the mirror image of the number."""
    found = Interval(value, value - reach, value + reach)
    mirrored = Interval(-value, -found.high, -found.low)
    other = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}
    assert verdict(found, margin, False) == other[verdict(found, margin)]
    assert verdict(mirrored, -margin, False) == verdict(found, margin)


@given(numbers, st.floats(0.01, 3), numbers)
def test_moving_an_interval_across_the_margin_flips_the_verdict(value, reach, margin):
    seen = []
    for shift in (-2 * reach, 0, 2 * reach):
        centre = margin + shift
        seen.append(verdict(Interval(centre, centre - reach, centre + reach), margin))
    assert seen == [FAILS, OPEN, HOLDS]


def drawn(rng, seeds: int, clusters: int, each: int, by_seed=0.3, by_cluster=0.3, mean=0.0) -> list[Sample]:
    """Items with an effect of their seed, of their cluster, and of their own."""
    own = rng.normal(0, by_cluster, clusters).repeat(each)
    ids = np.arange(clusters).repeat(each).tolist()
    return [
        Sample((mean + rng.normal(0, by_seed) + own + rng.normal(0, 0.5, len(ids))).tolist(), ids)
        for _ in range(seeds)
    ]


@pytest.mark.parametrize(
    "seeds, by_seed, by_cluster", [(2, 0.3, 0.3), (3, 0.3, 0), (3, 0, 0.5), (5, 0.3, 0.3)]
)
def test_intervals_cover_the_truth(seeds, by_seed, by_cluster):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        found = interval(drawn(rng, seeds, 20, 10, by_seed, by_cluster, mean=0.7))
        covered += found.low <= 0.7 <= found.high
    assert covered / 300 >= 0.92


def test_intervals_are_students_where_one_source_is_left():
    """Seeds alone: the t interval of their means; and t as the tables have it."""
    found = interval([Sample([x], ["all"]) for x in (1.0, 2.0, 4.0)])
    means = np.array([1.0, 2.0, 4.0])
    reach = 4.303 * means.std(ddof=1) / math.sqrt(3)
    assert found.value == pytest.approx(means.mean()) and found.high - found.value == pytest.approx(reach)
    for freedom, t in ((1, 12.706), (10, 2.228), (11, 2.201), (20, 2.086), (27, 2.052), (200, 1.972)):
        assert student(freedom) == pytest.approx(t, abs=0.01)
    assert all(a > b for a, b in pairwise(map(student, range(1, 40))))


@given(st.integers(0, 999), st.floats(-3, 3), st.floats(0.1, 3))
def test_intervals_move_with_the_numbers(seed, shift, stretch):
    """What is shifted and stretched has its interval shifted and stretched; the order of items is nothing."""
    rng = np.random.default_rng(seed)
    samples = drawn(rng, 3, 4, 3)
    found, order = interval(samples), rng.permutation(12)
    moved = [
        Sample([shift + stretch * s.items[i] for i in order], [s.clusters[i] for i in order]) for s in samples
    ]
    other = interval(moved)
    for key in ("value", "low", "high"):
        assert getattr(other, key) == pytest.approx(shift + stretch * getattr(found, key), abs=1e-9)


def test_pairing_takes_out_what_two_models_share():
    rng = np.random.default_rng(1)
    first = drawn(rng, 3, 20, 5, by_seed=0, by_cluster=2.0)
    second = [Sample([x - 0.2 + rng.normal(0, 0.1) for x in s.items], s.clusters) for s in first]
    paired = interval(difference(first, second))
    assert verdict(paired, 0.1) == HOLDS
    assert paired.high - paired.low < 0.2 * (interval(first).high - interval(first).low)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: interval([Sample([1.0], [0])]),
            "seeds must be at least two, for their spread to be seen, got 1",
        ),
        (
            lambda: interval([Sample([], []), Sample([], [])]),
            "seeds must hold the same test items, at least one",
        ),
        (lambda: interval([Sample([1], [0]), Sample([1, 2], [0, 1])]), "seeds must hold the same test items"),
        (lambda: interval([Sample([1], [0]), Sample([1], [1])]), "seeds must hold the same test items"),
        (lambda: difference([Sample([1], [0])], []), "second must hold the 1 seeds of the first, got 0"),
        (
            lambda: difference([Sample([1], [0])], [Sample([1], [1])]),
            "second must hold the same test items as the",
        ),
        (lambda: student(0), "freedom must be at least 1, got 0"),
        (lambda: chosen(["split", "magic"]), "--only must name some of split, patches, relations,"),
    ],
)
def test_what_cannot_be_told_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_what_nobody_learned_cannot_be_told():
    """Two models at guessing are no evidence that they are equally good."""

    def claim_about(a: float, b: float) -> str:
        found = {name: [{"m": Sample([v] * 4, list("abcd"))}] * 2 for name, v in (("a", a), ("b", b))}
        one = Claim(
            "",
            "",
            "",
            "",
            lambda s: ("a", "m"),
            0.05,
            lambda s: {},
            lambda s: ("b", "m"),
            True,
            lambda s: 0.5,
        )
        return one.verdict(found, TINY)

    assert claim_about(0.5, 0.5) == OPEN and claim_about(0.9, 0.9) == FAILS
    assert claim_about(0.9, 0.5) == HOLDS and claim_about(0.5, 0.9) == FAILS


# The world and its questions


@pytest.fixture(scope="module")
def place():
    return world(TINY.world, TINY.world.train.vocab_size)


def holds(caption: str, scene) -> bool:
    """Is the caption true of the picture, by the boxes alone?"""
    named = dict(zip(scene.slots + scene.unnamed, scene.objects, strict=True))
    box = dict(zip(scene.objects, scene.boxes, strict=True))
    first, relation, second = re.fullmatch("(.*?) (left of|right of|above|below) (.*)", caption).groups()
    if first not in named or (second != "the middle" and second not in named):
        return False
    middle = lambda slot: (box[named[slot]][:2] + box[named[slot]][2:]) / 2  # noqa: E731
    there = np.array(scene.image.shape[1::-1]) / 2 if second == "the middle" else middle(second)
    away = middle(first) - there
    axis = int(abs(away[1]) > abs(away[0]))
    return relation == (("left of", "right of"), ("above", "below"))[axis][int(away[axis] > 0)]


def test_a_contrast_has_no_false_negatives(place):
    """Of the texts and pictures that are contrasted, each text is true of its own picture alone."""
    steps, found = TINY.world.train.steps, 0
    wide = replace(TINY.world, train=replace(TINY.world.train, batch=64))
    batches = world(wide, 512).batches(0, "curriculum")
    batches.steps = 100
    for step in (20, 40, 60, 99):
        (batch,) = batches(step)
        stage, rng = stage_at(batches.stages, step / batches.steps), np.random.default_rng(0)
        scenes = [s for part in stage.parts for s in batches._drawn(part, step, rng).scenes]
        taken = batch.contrast.nonzero()[:, 0].tolist()
        assert len(taken) > 4 and bool((batch.match[taken] != 0).all())
        for i in taken:
            true = [
                j for j in taken if scenes[j].kind == scenes[i].kind and holds(scenes[i].caption, scenes[j])
            ]
            assert true == [i]
            found += 1
    assert found > 60 and steps == FEW["steps"]


def test_of_texts_that_share_a_fact_the_first_is_taken():
    assert without_shared_facts([{1}, {1, 2}, {2}, {3, 1}, {4}], [10, 20, 30, 40, 50]) == [10, 30, 50]


@pytest.mark.parametrize("masking", MASKINGS)
def test_batches_hide_what_they_say(place, masking):
    tiny = world(TINY.world, TINY.world.pieces)
    batches = (place if masking == "curriculum" else tiny).batches(0, masking)
    t, broken, hidden_words = batches.tokenizer, 0, 0
    for step in range(3):
        (batch,) = batches(step)
        assert not (batch.whole == t.mask_id).any()
        asked = batch.match >= 0
        assert (batch.labels[asked] == IGNORE).all() and (batch.labels[~asked] != IGNORE).any()
        for ids, labels, whole in zip(batch.ids, batch.labels, batch.whole, strict=True):
            if masking == "curriculum":
                continue
            shown = torch.where(labels == IGNORE, ids, labels)
            assert torch.equal(shown, whole)
            text = t.decode(whole.tolist())
            numbers = np.array(t.word_ids(text))
            lost = (labels != IGNORE).numpy()[1 : 1 + len(numbers)]
            for word in set(numbers.tolist()):
                hidden_words += lost[numbers == word].any()
                broken += 0 < lost[numbers == word].mean() < 1
    assert hidden_words > 5 or masking == "curriculum"
    assert (broken > 0) == (masking == "pieces")


def test_counterparts_differ_in_order_alone(place):
    couples = counterparts(place.scenes(1), 20)
    for a, b in couples:
        assert holds(a.caption, a) and not holds(a.caption, b)
        assert holds(swapped(a), b) and not holds(swapped(a), a)
    assert len(couples) == 20


def scored(monkeypatch, score) -> None:
    """Let `score(caption, scene)` stand for a model."""

    def scores(model, place, texts, scenes, pairs):
        return np.array([score(texts[t], scenes[s]) for t, s in pairs], float)

    monkeypatch.setattr(exam, "scores", scores)


ASKED = ("retrieval", "swapped", "text", "image", "group", "statements", "order", "matching")


def test_who_reads_the_scene_is_always_right(place, monkeypatch):
    scored(monkeypatch, lambda caption, scene: 1 if told(caption, scene) else -1)
    found = exam.exam(new_archetype(place.sizes(CONTROL), 0), place)
    assert set(found) == set(ASKED) and all(min(found[name].items) == 1 for name in ASKED)


def test_who_does_not_look_gets_what_guessing_gets(place, monkeypatch):
    """Ties are never right; where a yes or no is asked, one answer is right half of the time."""
    scored(monkeypatch, lambda caption, scene: 1)
    found = exam.exam(new_archetype(place.sizes(CONTROL), 0), place)
    means = {name: np.mean(found[name].items) for name in ASKED}
    halves = [means.pop(name) for name in ("statements", "order", "matching")]
    assert halves == [1 / 2] * 3 and not any(means.values())


def test_objects_alone_do_not_tell_order(place, monkeypatch):
    def objects(caption, scene):
        return sum(slot.split()[-1] in caption for slot in scene.slots)

    scored(monkeypatch, objects)
    found = exam.exam(new_archetype(place.sizes(CONTROL), 0), place)
    assert not any(map(max, (found[name].items for name in ("swapped", "text", "image", "group"))))
    scored(monkeypatch, lambda caption, scene: objects(caption, scene) - 1.5)
    found = exam.exam(new_archetype(place.sizes(CONTROL), 0), place)
    assert np.mean(found["order"].items) == 1 / 2 and np.mean(found["statements"].items) == 3 / 4


def test_a_bag_of_words_is_never_right_about_order(place):
    """On strict swapped pairs it scores exactly 0: the harness counts no tie."""
    torch.manual_seed(0)
    model = new_archetype(place.sizes(CONTROL), 0).eval()
    with torch.no_grad():
        model.net.text.word.weight.normal_()
    found = exam.exam(model, place)
    assert sum(found["swapped"].items) == sum(found["text"].items) == sum(found["group"].items) == 0
    assert sum(found["image"].items) == 0  # it may like one picture better, but both captions do
    assert sum(found["retrieval"].items) > 0


def test_an_order_of_words_can_be_told_by_the_harness(place):
    """The same questions, asked of a tower that is not a bag, are sometimes answered."""
    found = winoground(
        new_archetype(place.sizes("towers"), 0).eval(), place, counterparts(place.scenes(1), 60)
    )
    assert sum(found["text"].items) + sum(found["image"].items) > 0


def test_layers_end_in_the_models_states(place):
    model = new_archetype(place.sizes("patch"), 0).eval()
    scenes = [place.scenes(0)[i] for i in range(32)]
    found = layers(model, place, scenes)
    depth = TINY.world.train.layers
    assert len(found) == 3 * (depth + 1) + 1 and len({tuple(s.clusters) for s in found.values()}) == 1
    gap = np.subtract(
        *(np.stack([found[f"layer {k} {w}"].items for k in (0, depth)]) for w in ("true", "wrong"))
    )
    np.testing.assert_allclose(found["deepening"].items, gap[1] - gap[0], atol=1e-6)
    ids = torch.from_numpy(place.tokenizer.batch([scenes[0].caption])[0])
    pixels = exam.scene_pixels(scenes[:1])
    with torch.no_grad():
        states = model.net.encode(ids, torch.ones_like(ids, dtype=torch.bool), pixels)
        words, patches = by_layer(model, ids, pixels)[-1]
    torch.testing.assert_close(words, states["text"][:, 1:-1])
    torch.testing.assert_close(patches, states["image"][:, 1:])


@pytest.mark.parametrize("harm", ["positives", "mean", None])
def test_chunks_are_equal_only_when_they_are(harm, monkeypatch):
    """A positive in every block, or a mean over all pairs, is seen; the right sum is not."""
    right = chunks_module.chunked_loss
    wrong = {
        "positives": lambda x, y, scale, bias, block: right(x, y, scale, bias, block) - (x * y).sum() / 100,
        "mean": lambda x, y, scale, bias, block: right(x, y, scale, bias, block) / len(x),
    }
    if harm:
        monkeypatch.setattr(chunks_module, "chunked_loss", wrong[harm])
    errors = chunks(TINY.chunks, 0)["largest"].items
    assert all((error > -9) == bool(harm) for error in errors)


# Work that is not done twice

ONE = ["chunks"]


def finished(folder) -> dict[str, str]:
    """What each result holds, but for the time it took."""
    kept = {}
    for path in sorted((folder / "results").glob("*.json")):
        content = json.loads(path.read_text())
        kept[path.name] = json.dumps({k: v for k, v in content.items() if k != "seconds"})
    return kept


def test_a_stopped_command_goes_on_and_ends_the_same(tmp_path):
    for _ in do_all(ONE, TINY, tmp_path / "whole"):
        pass
    stopped = do_all(ONE, TINY, tmp_path / "parts")
    assert next(stopped).job == ("chunks", 0)
    stopped.close()
    assert list(finished(tmp_path / "parts")) == ["chunks-0.json"]
    first = (tmp_path / "parts" / "results" / "chunks-0.json").stat().st_mtime_ns
    assert [line.job for line in do_all(ONE, TINY, tmp_path / "parts")] == [("chunks", 1)]
    assert (tmp_path / "parts" / "results" / "chunks-0.json").stat().st_mtime_ns == first
    assert finished(tmp_path / "parts") == finished(tmp_path / "whole")
    assert not list(do_all(ONE, TINY, tmp_path / "parts"))


@pytest.mark.parametrize("place_of_death", ["write", "rename"])
def test_a_killed_write_leaves_no_half_result(tmp_path, monkeypatch, place_of_death):
    def death(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, {"write": "fsync", "rename": "replace"}[place_of_death], death)
        with pytest.raises(KeyboardInterrupt):
            list(do_all(ONE, TINY, tmp_path))
    assert finished(tmp_path) == {} and not done(("chunks", 0), TINY, tmp_path)
    assert len(list(do_all(ONE, TINY, tmp_path))) == 2


def test_other_settings_are_done_again_and_nothing_else_is(tmp_path):
    list(do_all([*ONE, "clock"], TINY, tmp_path))
    other = replace(TINY, chunks=replace(TINY.chunks, draws=3))
    assert not done(("chunks", 0), other, tmp_path) and done(("clock", 0), other, tmp_path)
    with pytest.raises(ValueError, match="results must be complete, got none of chunks, seed 0"):
        results(ONE, other, tmp_path)
    assert {line.job[0] for line in do_all([*ONE, "clock"], other, tmp_path)} == {"chunks"}
    assert len(results(ONE, other, tmp_path)["chunks"][0]["largest"].items) == 3


def test_another_version_of_an_experiment_is_done_again(tmp_path, monkeypatch):
    list(do_all(ONE, TINY, tmp_path))
    monkeypatch.setattr(work, "VERSION", work.VERSION + 1)
    assert not done(("chunks", 0), TINY, tmp_path)


def test_results_depend_on_their_own_part_of_the_settings():
    """A change of one part is a change of the experiments of that part, and of no others."""
    other = replace(TINY, world=replace(TINY.world, items=64))
    changed = {name for name in EXPERIMENTS if made_with(name, TINY) != made_with(name, other)}
    assert changed == {name for name, one in EXPERIMENTS.items() if one.part == "world"}


def test_a_training_with_other_settings_starts_anew(place, tmp_path):
    def weights(about: dict) -> torch.Tensor:
        recipe = ArchetypeRecipe(TINY.world.train, place, "towers", "curriculum")
        model = train(recipe, tmp_path / "t", about)
        return model.net.log_scale.detach().clone()

    first = weights({"a": (1, 2)})
    stamp = (tmp_path / "t" / "checkpoint.pt").stat().st_mtime_ns
    assert torch.equal(weights({"a": [1, 2]}), first)  # over: nothing is trained
    assert (tmp_path / "t" / "checkpoint.pt").stat().st_mtime_ns == stamp
    assert torch.equal(weights({"a": (1, 3)}), first)  # trained again, and deterministic
    assert (tmp_path / "t" / "checkpoint.pt").stat().st_mtime_ns > stamp


# The table, the pictures and the command


def invented(settings: Settings) -> dict:
    """Results of every experiment, all of their measures drawn at random."""
    rng = np.random.default_rng(0)
    wanted = {}
    for claim in CLAIMS.values():
        which = [*claim.deciding(settings), *claim.points(settings).values()]
        which += claim.learned(settings) if claim.learned else []
        for name, measure in which:
            wanted.setdefault(name, {}).setdefault(measure, rng.uniform(0.2, 0.9))
    return {
        name: [
            {m: Sample((rng.random(40) < mean + 0.02 * seed).tolist(), [i // 4 for i in range(40)])
             for m, mean in measures.items()}
            for seed in seeds(name, settings)
        ]
        for name, measures in wanted.items()
    }  # fmt: skip


def test_the_report_has_a_row_and_a_picture_a_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "results", lambda names, settings, folder: invented(settings))
    monkeypatch.setattr(command, "do_all", lambda *args: iter(()))
    monkeypatch.setattr(command, "spent", lambda *args: 754.0)
    command.write_claims(list(CLAIMS), FULL, tmp_path, 1, "python -m minivlp claims", Screen())
    lines = (tmp_path / "claims.md").read_text().splitlines()
    many = f"{FULL.seeds} or {FULL.many} seeds"
    assert f"Written by `python -m minivlp claims`: {many}, 13 minutes of one core's time." in lines
    first = lines.index("|---|---|---|---|---|") + 1
    rows = [line.split("|") for line in lines[first : first + len(CLAIMS)]]
    rows = {row[1].strip(): row[5].strip() for row in rows}
    found = invented(FULL)
    assert rows == {claim.says: claim.verdict(found, FULL) for claim in CLAIMS.values()}
    assert {HOLDS, FAILS, OPEN} >= set(rows.values()) and len(set(rows.values())) > 1
    assert any(line.startswith("is right on") or "swapped captions" in line for line in lines)
    for name in CLAIMS:
        assert f"![{name}](pictures/claim_{name}.png)" in lines
        path = tmp_path / "pictures" / f"claim_{name}.png"
        width, height = Image.open(path).size
        assert abs(width - 902) <= 1 and 150 < height < 600 and path.stat().st_size < 100_000


def test_a_report_keeps_what_it_says_of_other_claims(tmp_path, monkeypatch):
    """Their rows, the control and their sections stay as they are; what is written again is replaced."""
    monkeypatch.setattr(command, "do_all", lambda *args: iter(()))
    monkeypatch.setattr(command, "spent", lambda *args: 60.0)

    def write(names: list[str], said: str, scale: float, keep: bool) -> str:
        def found(needed, settings, folder):
            return {
                name: [{m: Sample([scale * x for x in s.items], s.clusters) for m, s in seed.items()}
                       for seed in rows]
                for name, rows in invented(settings).items() if name in needed
            }  # fmt: skip

        monkeypatch.setattr(command, "results", found)
        command.write_claims(names, FULL, tmp_path, 1, said, Screen(), keep)
        return (tmp_path / "claims.md").read_text()

    old, new = ["patches", "chunks"], ["chunks", "restart"]
    first = write(old, "first", 1.0, True)
    both = write(new, "second", 2.0, True)
    assert write(new, "second", 2.0, True) == both
    alone = write(new, "second", 2.0, False)
    assert "claim_patches" not in alone and merged(first, alone) == both
    lines, chunked = both.splitlines(), CLAIMS["chunks"].says
    commands = [line for line in lines if line.startswith("Written by")]
    assert [line.split(":")[0] for line in commands] == ["Written by `first`", "Written by `second`"]
    titles = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert titles == [CLAIMS[name].says for name in ("patches", "chunks", "restart")]
    kept = [line for line in first.splitlines() if chunked not in line and not line.startswith("Written")]
    section = first.index(f"## {chunked}")
    assert set(first[:section].splitlines()) - {""} & set(kept) <= set(lines)
    assert [line for line in lines if line.startswith(f"| {chunked}")] == [
        line for line in alone.splitlines() if line.startswith(f"| {chunked}")
    ]
    assert sum(line.startswith("The control:") for line in lines) == 1


def test_every_claim_names_what_its_experiments_measure():
    for claim in CLAIMS.values():
        assert set(claim.experiments(FULL)) <= set(EXPERIMENTS)
        assert claim.points(FULL) and claim.says.endswith(".") and claim.source and claim.tested
    assert {e for claim in CLAIMS.values() for e in claim.experiments(FULL)} == set(EXPERIMENTS)
    assert FULL.seeds >= 3 and FULL.many >= 5 and min(QUICK.seeds, QUICK.many) >= 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("claims --only magic", "--only must name some of split, patches, "),
        ("claims --only", "argument --only: expected at least one argument"),
        ("claims --quik", "unrecognized arguments: --quik"),
        ("claims --threads 0", "--threads: must be a whole number from 1 to 256, got '0'"),
        ("claims --only chunks --out README.md", "cannot be written"),
    ],
)
def test_the_command_refuses_in_one_sentence(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("a file")
    try:
        code = main(line.split())
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and re.fullmatch(r"minivlp: [^\n]+\n", err) and message in err and out == ""


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["claims", "--help"])
    assert exit.value.code == 0 and "example: python -m minivlp claims --quick" in capsys.readouterr().out


def test_the_command_tells_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "QUICK", TINY)
    flags = ["claims", "--quick", "--only", "chunks", "--out", str(tmp_path), "--threads", "1"]
    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[ 1/2\] chunks, seed 0 +\d+\.\d s +\d+\.\d min left", lines[1])
    assert lines[-2] == f"The sigmoid loss in chunks equals the whole one. {HOLDS}"
    assert main(flags) == 0
    assert not any("min left" in line for line in capsys.readouterr().out.splitlines())


@pytest.mark.slow
def test_all_claims_end_to_end(tmp_path):
    """Every experiment at a size of seconds, in two processes; the numbers do not depend on how many."""
    command.write_claims(list(CLAIMS), TINY, tmp_path, 2, "command", Screen())
    assert len(list((tmp_path / "pictures").glob("*.png"))) == len(CLAIMS)
    assert not list((tmp_path / "work").glob("*"))
    found = results(EXPERIMENTS, TINY, tmp_path)
    assert not any(map(sum, (seed["swapped"].items for seed in found[CONTROL])))
    for _ in do_all(["towers"], replace(TINY, seeds=1), tmp_path / "again"):
        pass
    assert finished(tmp_path / "again")["towers-0.json"] == finished(tmp_path)["towers-0.json"]


def test_the_report_is_of_these_claims_and_the_readme_counts_its_verdicts():
    chapters = ROOT / "chapters"
    text = (chapters / "claims.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    verdicts = {row[0]: row[-1] for row in rows if row[-1] in (HOLDS, FAILS, OPEN)}
    assert list(verdicts) == [claim.says for claim in CLAIMS.values()]
    assert all((chapters / path).is_file() for path in re.findall(r"\]\((pictures/[^)]+)\)", text))
    counts = [sum(v == one for v in verdicts.values()) for one in (HOLDS, FAILS, OPEN)]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    not_here = f"{counts[1]} {'does' if counts[1] == 1 else 'do'} not hold here"
    assert f"{counts[0]} claims hold here, {not_here}, {counts[2]} cannot be told" in readme
    spent = re.findall(r"(\d+) minutes of one core's time", text)
    assert f"{spent[0]} minutes of one core's time and {' and '.join(spent[1:])} more" in readme
