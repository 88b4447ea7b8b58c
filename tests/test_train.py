"""The training loop: what a step is; it stops at the first NaN, and goes on as if it had not stopped."""

import json
import re
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import pytest
import torch

from minivlp.__main__ import PRESETS as PRESET_NAMES
from minivlp.data import RELATIONS, Scenes, load_emojivl, scene_pixels
from minivlp.data.names import scene_tokenizer
from minivlp.data.questions import COUNTS, WORDS
from minivlp.mlm import IGNORE
from minivlp.recipes import RECIPES, recipe_class
from minivlp.recipes.captions import CaptionsRecipe
from minivlp.recipes.vilt import PRESETS, ViltRecipe, ViltSettings, pretraining_loss
from minivlp.recipes.vilt_batches import STAGES, Part, SceneBatches, Stage, Wrong, stage_at
from minivlp.text import split_words
from minivlp.training.loop import optimizers, rate, steps
from minivlp.training.run import Run
from tests.tiny import SIZES

EMOJIVL = load_emojivl()
CONFIG = replace(PRESETS["cpu"], **SIZES)
NOUNS = EMOJIVL.nouns(CONFIG.nouns)
TOKENIZER = scene_tokenizer(NOUNS, CONFIG.vocab_size)
STAGES_OF_PAIRS = (
    Stage(0.5, (Part("place", 1.0),)),
    Stage(1.0, (Part("one", 0.3, canvas=24), Part("pair", 0.7, wrong=Wrong(0.3, 0.2, 0.3))), contrast=0.5),
)
LOSS = partial(pretraining_loss, wpa_weight=CONFIG.wpa_weight)


class Short(ViltRecipe):
    """ViLT in two stages, with a check that costs nothing."""

    @cached_property
    def batches(self) -> SceneBatches:
        s = self.settings
        return SceneBatches(EMOJIVL, NOUNS, TOKENIZER, STAGES_OF_PAIRS, s.steps, s.batch, s.seed)

    def check(self, model):
        return {"seen": 1.0}


def recipe(config: ViltSettings = CONFIG, **parts) -> Short:
    """The recipe, with parts of it (batch, loss, model) in place of its own."""
    made = Short(config, tokens=TOKENIZER.tokens)
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def batches(config: ViltSettings = CONFIG) -> SceneBatches:
    return recipe(config).batches


def new_model(config: ViltSettings = CONFIG):
    return recipe(config).model


def trained(folder, **parts) -> tuple[Run, list[dict]]:
    """Train in a new folder, or on in one that holds a run."""
    began = (folder / "checkpoint.pt").exists()
    run = Run.resume(folder) if began else Run.begin(folder, {"train": {}})
    return run, list(steps(recipe(**parts), run))


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "composing")} for record in records]


def equal(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list | tuple) else a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Run, list[dict]]:
    """An uninterrupted run."""
    return trained(tmp_path_factory.mktemp("whole") / "run")


# What a step sees and does


def test_every_word_of_scenes_and_questions_is_one_token():
    frames = {
        "a",
        "of",
        "the",
        "middle",
        "between",
        "and",
        *COUNTS,
        *(w for r in RELATIONS for w in r.split()),
    }
    words = frames | {c.noun for c in NOUNS} | {w for text in WORDS for w in split_words(text)}
    assert {word for word in words if len(TOKENIZER.encode(word)) != 1} == set()
    assert all(TOKENIZER.unk_id not in TOKENIZER.encode(c.plural) for c in NOUNS)


def test_every_preset_has_its_name_on_the_command_line():
    presets = {preset for name in RECIPES for preset in recipe_class(name).presets}
    assert set(PRESET_NAMES) == presets == set(CaptionsRecipe.presets)
    assert set(STAGES) == set(PRESETS) and set(STAGES) | {"captions"} == presets


def test_stages_fill_the_run_and_their_shares_the_batch():
    for stages in STAGES.values():
        assert [s.until for s in stages] == sorted({s.until for s in stages}) and stages[-1].until == 1
        assert all(abs(sum(part.share for part in stage.parts) - 1) < 1e-9 for stage in stages)
        assert stage_at(stages, 0.0) is stages[0] and stage_at(stages, 0.999) is stages[-1]


def test_batches_depend_on_seed_and_step_alone():
    again, other = batches(), batches(replace(CONFIG, seed=2))
    source = batches()
    source(3), source(8)
    for a, b, c in zip(source(7), again(7), other(7), strict=True):
        assert equal(vars(a), vars(b)) and not torch.equal(a.pixels, c.pixels)
    assert [len(b.ids) for b in source(7)] == [5, 11] and source(7)[0].pixels.shape[2:] == (24, 24)


def test_written_captions_have_the_next_word_for_a_label():
    """In the first stage: whole captions, true of their pictures, which serve nothing else."""
    source = SceneBatches(EMOJIVL, NOUNS, TOKENIZER, STAGES["cpu"], 100, 16, 0)
    (b,), (later,) = source(3), source(60)
    assert b.written and not later.written and (later.ids == TOKENIZER.mask_id).any()
    assert not b.paired.any() and not b.align.any() and b.contrasted == 16
    scenes = Scenes(EMOJIVL, NOUNS, canvas=48, seed=0)
    for row in range(16):
        words = b.ids[row][b.text_mask[row]].tolist()
        assert TOKENIZER.decode(words) == scenes[3 * 16 + row].caption
        assert b.labels[row].tolist() == words[1:] + [IGNORE] * (len(b.ids[row]) - len(words) + 1)


def test_the_loss_of_written_captions_is_the_cross_entropy_of_their_next_words():
    (b,) = SceneBatches(EMOJIVL, NOUNS, TOKENIZER, STAGES["cpu"], 100, 8, 0)(0)
    model = new_model()
    terms = LOSS(model, [b])
    assert set(terms) == {"next", "apart"}
    states = model.encode(b.ids, b.text_mask, b.pixels, writing=True)["text"]
    log_p = model.mlm_logits(states).log_softmax(-1)
    told = [
        -log_p[row, i, b.ids[row, i + 1]] for row in range(8) for i in range(int(b.text_mask[row].sum()) - 1)
    ]
    torch.testing.assert_close(terms["next"], torch.stack(told).mean())


def test_without_contrast_the_batches_are_the_same_and_a_term_is_missing():
    flags = {"batch": 8, "steps": 10}
    whole, part = (ViltRecipe.of(ViltRecipe.begin(flags | more)) for more in ({}, {"without": "contrast"}))
    for step in (0, 9):
        for b, c in zip(whole.batch(step), part.batch(step), strict=True):
            assert torch.equal(b.pixels, c.pixels) and torch.equal(b.ids, c.ids)
            assert b.noun is not None and c.noun is None
        assert set(whole.loss(whole.model, whole.batch(step))) - {"apart"} == set(
            part.loss(part.model, part.batch(step))
        )


def test_a_small_batch_has_an_example_of_every_part():
    assert [len(b.ids) for b in batches(replace(CONFIG, batch=2))(11)] == [1, 1]


@pytest.mark.parametrize("wrong", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
def test_a_wrong_pair_is_wrong_in_the_way_that_its_part_says(wrong):
    """Read from the words of examples and the nouns of pictures, which alone tell what a wrong pair is."""
    part = Part("pair", 1.0, matching=1.0, wrong=Wrong(*wrong))
    source = SceneBatches(EMOJIVL, NOUNS, TOKENIZER, (Stage(1.0, (part,)),), 1, 40, 0)
    scenes = Scenes(EMOJIVL, NOUNS, canvas=48, seed=0)
    (batch,) = source(0)
    assert 10 < int((batch.match == 0).sum()) < 30
    for i in np.flatnonzero(batch.match.numpy() == 0):
        said = TOKENIZER.decode(batch.ids[i, 1 : int(batch.text_mask[i].sum()) - 1].tolist())
        own = scenes[int(i)]
        first, relation, second = re.fullmatch(f"(.+) ({'|'.join(RELATIONS)}) (.+)", said).groups()
        kept = sum(slot in own.slots for slot in (first, second))
        found = (
            (first, second) == own.slots[::-1] and relation == own.relation,
            (first, second) == own.slots and relation != own.relation,
            kept == 1 and relation == own.relation,
        )
        assert found == tuple(map(bool, wrong)), f"{own.caption} became {said}"
        # Another scene's picture keeps the caption, and is the only kind that the alignment pushes apart.
        same_picture = torch.equal(batch.pixels[i], scene_pixels([own])[0])
        assert same_picture == any(wrong) and batch.align[i] == (0 if any(wrong) else -1)


def test_the_loss_is_the_mean_over_all_batches():
    """However examples are split into batches; some of these have one hidden word, some have two.

    What is read apart is compared with all that its batch holds, so there batches count.
    """
    batch = max(batches()(11), key=lambda b: len(b.ids))
    assert set((batch.labels >= 0).sum(1).tolist()) == {0, 1, 2}
    model = new_model()
    parts = [batch.part(0, 3), batch.part(1, 3), batch.part(2, 3)]
    one, two = LOSS(model, [batch]), LOSS(model, parts)
    assert set(one) == {"mlm", "itm", "wpa", "apart"}
    assert two.pop("apart").item() < one.pop("apart").item()  # a third of the rivals
    for name, term in one.items():
        assert torch.allclose(term, two[name], atol=1e-6), name


def test_alignment_can_be_left_out():
    without = recipe(replace(CONFIG, wpa_weight=0.0))
    assert set(without.loss(without.model, batches()(0))) == {"mlm", "itm"}


def test_every_parameter_has_one_optimizer_and_small_ones_no_decay():
    model = new_model()
    muon, adam = optimizers(model, recipe().matrices(model), CONFIG)
    groups = [*muon.param_groups, *adam.param_groups]
    taken = [id(p) for group in groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[id(p)] for p in muon.param_groups[0]["params"]}
    blocks = {n for n, p in model.named_parameters() if n.startswith("encoder.blocks") and p.ndim == 2}
    assert in_muon == blocks | {"pooler.weight", "mlm.dense.weight"}
    assert all(p.ndim >= 2 for g in groups if g["weight_decay"] for p in g["params"])


def test_what_requires_no_gradient_has_no_optimizer_and_stays_as_it_is(tmp_path):
    """Of matrices and vectors, of Muon's and AdamW's, with much decay."""
    made = recipe(replace(CONFIG, weight_decay=0.5, steps=4))
    names = ("patch.weight", "patch.bias", "encoder.blocks.0.qkv.weight", "word.weight", "encoder.norm.bias")
    parts = dict(made.model.named_parameters())
    frozen = {name: parts[name].requires_grad_(False) for name in names}
    before = {name: p.detach().numpy().tobytes() for name, p in made.model.named_parameters()}
    tuned = optimizers(made.model, made.matrices(made.model), made.settings)
    taken = {id(p) for optimizer in tuned for group in optimizer.param_groups for p in group["params"]}
    assert taken == {id(p) for p in parts.values()} - {id(p) for p in frozen.values()}
    list(steps(made, Run.begin(tmp_path / "run", {})))
    same = {name for name, p in made.model.named_parameters() if p.detach().numpy().tobytes() == before[name]}
    assert same == set(frozen)


def test_the_rate_rises_stays_and_falls():
    config = replace(CONFIG, steps=100, warmup=10, cooldown=0.4)
    rates = [rate(config, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:60] == [1.0] * 51 and rates[61] == 1 - 1 / 40 and rates[99] == 1 / 40
    assert rate(replace(config, warmup=0, cooldown=0.0), 99) == 1.0


def test_training_lowers_the_loss(whole):
    run, records = whole
    assert [r["step"] for r in records] == [3, 6, 9, 12] == [r["step"] for r in run.records()]
    assert records[-1]["rows"] == 12 * 16 and all(r["seen"] == 1 for r in records)
    assert records[1]["mlm"] < records[0]["mlm"]
    before = new_model().state_dict()
    assert all(not torch.equal(before[k], v) for k, v in run.load()["model"].items() if k != "segment.weight")


def test_every_step_is_told(tmp_path):
    told = []
    short = recipe(replace(CONFIG, steps=3))
    list(steps(short, Run.begin(tmp_path, {}), tick=lambda *now: told.append(now)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)] and not short.model.training


# It goes on as if it had not stopped


@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_that_stops_ends_in_the_same_weights(stop, whole, tmp_path):
    source = batches()

    def interrupted(step):
        if step == stop:
            raise KeyboardInterrupt
        return source(step)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", batch=interrupted)
    run, _ = trained(tmp_path / "run", model=new_model(replace(CONFIG, seed=5)))
    a, b = whole[0].load(), run.load()
    for key in ("model", "optimizers", "step", "means"):
        assert equal(a[key], b[key])
    assert timeless(run.records()) == timeless(whole[0].records())


def test_a_finished_run_does_nothing_more(whole):
    run, records = whole
    before = run.checkpoint.read_bytes()
    assert trained(run.folder)[1] == [] and run.checkpoint.read_bytes() == before and run.records() == records


# It stops when something breaks


def broken(step: int, name: str, how):
    """The loss, with one term changed at one step."""
    calls = []

    def loss(model, batches, workers):
        calls.append(None)
        terms = LOSS(model, batches)
        return terms | {name: how(terms[name])} if len(calls) == step + 1 else terms

    return loss


@pytest.mark.parametrize(
    "name, how, message",
    [
        ("itm", lambda t: t * torch.nan, "step 5: loss term itm is nan"),
        ("wpa", lambda t: t + torch.inf, "step 5: loss term wpa is inf"),
        ("mlm", lambda t: t + (t - t).sqrt(), "step 5: the norm of the gradient is nan"),
    ],
)
def test_a_nan_stops_the_run_and_the_last_checkpoint_is_kept(name, how, message, whole, tmp_path):
    with pytest.raises(FloatingPointError, match=f"{message}; the checkpoint of step 4 is kept in .*run"):
        trained(tmp_path / "run", loss=broken(5, name, how))
    kept = Run.resume(tmp_path / "run").load()
    assert kept["step"] == 4 and all(v.isfinite().all() for v in kept["model"].values())
    run, _ = trained(tmp_path / "run")  # the fault was mended
    assert equal(run.load()["model"], whole[0].load()["model"])


def test_a_nan_inside_the_model_stops_the_run(tmp_path):
    model = new_model()
    with torch.no_grad():
        model.encoder.norm.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 0: .* is nan; the checkpoint of step 0"):
        trained(tmp_path / "run", model=model)


def test_other_errors_pass_as_they_are(tmp_path):
    def loss(model, batches, workers):
        raise ValueError("ids must lie in [0, 4), got 7")

    with pytest.raises(ValueError, match=r"^ids must lie in \[0, 4\), got 7$"):
        trained(tmp_path / "run", loss=loss)


def test_settings_of_another_version_are_refused():
    assert ViltSettings.read({"train": {"steps": 7}}).steps == 7
    for settings in ({}, {"train": {"speed": 3}}):
        with pytest.raises(ValueError, match="are not of this version"):
            ViltSettings.read(settings)


def test_metrics_are_json(whole):
    lines = (whole[0].folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 9, 12]
