"""The exercises: one table, stubs as the library has them, and what a learner is told."""

import importlib
import os
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from minivlp import infonce
from minivlp.recipes import MODELS
from tests import check, course, stubs
from tests.attempts import broken, fault_at_import
from tests.course import ROOT, exercises, find, functions, table, untouched
from tests.laws import BUGS, LAWS, Law, attempt_obeys, load_bugs
from tests.notebook import hold
from tests.watched import load, solution

ALL = pytest.mark.parametrize("one", exercises(), ids=lambda one: one.name)

ONE_DIRECTION = """
B, S = len(images), scale * images @ texts.T
log_P = S - S.max(1, keepdims=True)
log_P -= np.log(np.exp(log_P).sum(1, keepdims=True))
G = (np.exp(log_P) - np.eye(B)) / B
return -log_P.diagonal().mean(), (scale * G @ texts, scale * G.T @ images, (G * (images @ texts.T)).sum())
"""
RIGHT = """
S = scale * images @ texts.T
return (S.logsumexp(1) + S.logsumexp(0) - 2 * S.diagonal()).mean() / 2
"""
NO_UPSTREAM = """
class Ours(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, texts, scale):
        with torch.enable_grad():
            images, texts, scale = (t.detach().requires_grad_() for t in (images, texts, scale))
            S = scale * images @ texts.T
            loss = (S.logsumexp(1) + S.logsumexp(0) - 2 * S.diagonal()).mean() / 2
        ctx.save_for_backward(*torch.autograd.grad(loss, (images, texts, scale)))
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors


return Ours.apply(images, texts, scale)
"""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A learner's folder with fresh stubs."""
    monkeypatch.setattr(course, "FOLDER", tmp_path)
    stubs.write_missing(tmp_path)
    return tmp_path


def write(name: str, body: str) -> None:
    """Put a body in place of `raise Todo`."""
    one = find(name)
    source = one.path.read_text(encoding="utf-8")
    lines, last = source.splitlines(), functions(source)[name].end_lineno
    lines[last - 1 : last] = ["    " + line if line else "" for line in body.strip("\n").splitlines()]
    one.path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def told(name: str, folder=None) -> str:
    """What pytest says of a wrong attempt, with the path that it has in a clone."""
    with pytest.raises(pytest.fail.Exception) as failure:
        attempt_obeys(find(name))
    return str(failure.value).replace(str(folder or ROOT), "chapters/exercises")


def test_the_course_has_at_least_36_exercises_from_easy_to_hard():
    assert len(exercises()) >= 36
    assert {one.difficulty for one in exercises()} == {1, 2, 3}
    assert {"np", "torch", "fused", "plain"} == {one.rung for one in exercises()}


@ALL
def test_the_table_tells_the_truth(one):
    load_bugs(one.concept)
    library = importlib.import_module(f"minivlp.{one.concept}")
    ladder = library.RUNGS.get(one.family, {"plain": getattr(library, one.name, None)})
    assert ladder.get(one.rung) is getattr(library, one.name), f"{one.name} is not the {one.rung} rung"
    assert LAWS.get(one.family), f"{one.family} has no law"
    assert one.chapter in table()[0] and one.minutes >= 5 and one.trains in ("", *MODELS)
    assert len(one.hints) == 3 and all(len(hint) > 15 for hint in one.hints)


@ALL
def test_no_law_gives_the_formula_away(one):
    """The graded hints do; a law that is broken for the first time does not say what the gradient is."""
    load_bugs(one.concept)
    for law in LAWS[one.family].values():
        assert not re.search(r"(?<!/)\bd[a-zA-Z]{1,9} = |\bG = |one-hot", law.hint), law.name


@ALL
def test_an_untouched_stub_is_what_the_library_says(one):
    """Signature and docstring; a stub that the learner has begun is the learner's."""
    if one.path.exists() and untouched(one):
        source = course.read(one.path)
        now = stubs.segment(source, functions(source)[one.name])
        assert now == stubs.stub(one), "the library has changed: run python -m chapters reset --stubs"


def test_stubs_can_be_run_and_do_nothing(desk):
    for concept in {one.concept for one in exercises()}:
        ours = exercises(concept)
        assert fault_at_import(ours[0]) is None
        assert all(untouched(one) for one in ours)


def with_third_hint(name: str):
    """The learner's function after the third hint was pasted; what else is to write in the file is there."""
    one = find(name)
    write(name, one.hints[2])
    function = load(one)
    others = [other for other in exercises(one.concept) if other != one]
    function.__globals__.update({other.name: solution(other) for other in others})
    return one, function


def obeys_or_goes_on(one, laws, function) -> None:
    for law in laws:
        try:
            assert (found := broken(function, one, law, diagnose=False)) is None, found.lines()
        except course.Todo:
            assert one.difficulty == 3 and "raise Todo" in one.hints[2]


@ALL
def test_the_third_hint_runs_when_it_is_pasted(desk, one):
    one, function = with_third_hint(one.name)
    load_bugs(one.concept)
    obeys_or_goes_on(one, list(LAWS[one.family].values())[:1], function)


@ALL
@pytest.mark.slow
def test_the_third_hint_obeys_all_laws_or_goes_on(desk, one):
    one, function = with_third_hint(one.name)
    load_bugs(one.concept)
    obeys_or_goes_on(one, LAWS[one.family].values(), function)


def test_the_readme_shows_what_a_learner_is_told(desk):
    """A wrong attempt: a line of counterexample, the hint, the known mistake; nothing of numpy's insides."""
    write("infonce_np", ONE_DIRECTION)
    message = told("infonce_np", desk)
    lines = message.splitlines()
    assert len(lines) == 4 and "images_and_texts_exchange" in lines[0] and "one_direction" in lines[3]
    assert message in (ROOT / "README.md").read_text(encoding="utf-8"), f"the README must show:\n{message}"


def test_a_right_attempt_passes(desk):
    write("infonce", RIGHT)
    attempt_obeys(find("infonce"))


def test_what_is_not_written_is_skipped_with_its_path_or_fails_when_strict(desk):
    one = find("infonce")
    with pytest.raises(pytest.skip.Exception, match=r"infonce\.py:\d+ infonce"):
        attempt_obeys(one)
    with pytest.raises(pytest.fail.Exception, match="to do: "):
        attempt_obeys(one, strict=True)
    write("infonce", "if len(images) > 2:\n    raise Todo" + RIGHT)
    with pytest.raises(pytest.skip.Exception, match="not finished"):
        attempt_obeys(one)


@pytest.mark.parametrize(
    "name, body, message",
    [
        ("infonce", "images + texts", "your function returned None: is the return missing?"),
        ("infonce", "return 0.5", "your function returned float, expected a tensor"),
        ("infonce_np", "return 0.5, (images, texts)", "your function returned 2 gradients, expected 3"),
        (
            "infonce_np",
            "return 0.5, images, texts",
            "your function returned a tuple of 3, expected (value, gradients)",
        ),
        (
            "infonce_np",
            "images += 1\nreturn 0.0, (images, texts, scale)",
            "your function changed one of its inputs",
        ),
        ("infonce_np", "return images[9], (images, texts, scale)", "raised IndexError in line "),
        ("infonce_fused", NO_UPSTREAM, "multiply by it in backward"),
        ("itm_loss_np", "return 0.5, logits", "(value, array), expected (value, (gradient, …))"),
        (
            "patch_embed_fused",
            "return torch.nn.functional.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2)",
            "your result has shape (1, 1, 2), expected (1, 2, 1)",
        ),
    ],
)
@pytest.mark.slow
def test_a_wrong_form_is_named(desk, name, body, message):
    write(name, body)
    found = told(name)
    assert message in found and len(found.splitlines()) <= 4


NO_UPSTREAM_NP = """
from minivlp.patch import patch_embed_np
return patch_embed_np(images, weight, bias)
"""
MEAN_OVER_NOTHING = """
from minivlp import mlm
asked = targets != -100
value, gradients = mlm.mlm_loss_np(hidden, embedding, bias, targets)
return value + 0 * np.ones(len(hidden))[asked].mean(), gradients
"""
SUM_OF_GRADIENTS = """
log_p = logits - np.logaddexp(logits[:, :1], logits[:, 1:])
one_hot = np.eye(2)[labels]
return -(log_p * one_hot).sum(1).mean(), (np.exp(log_p) - one_hot,)
"""
MINUS_ONE = """
from minivlp import mlm
value, (dhidden, dembedding, dbias) = mlm.mlm_loss_np(hidden, embedding, bias, targets)
return value, (dhidden, -dembedding, dbias)
"""
ONE_DOT = "return (grad - unit * (unit * grad).sum()) / length"


@pytest.mark.parametrize(
    "name, body, messages",
    [
        # The call that went wrong, not the first of its example.
        ("patch_embed_np", NO_UPSTREAM_NP, ["the gradients of patch_embed_np(", "grad=[", " no_upstream:"]),
        ("wordpiece", "return [word]", ["vocab={…, 'a': 5}"]),  # what matters in a vocabulary
        ("mlm_loss_np", MEAN_OVER_NOTHING, ["your result holds NaN"]),  # and no RuntimeWarning
        ("derangement", "return np.roll(np.arange(n), 1)", [" came 900 times, expected about 100 each"]),
        ("to_patches", "return images.reshape(len(images), -1, images.shape[1] * p * p)", ["105], [-0.536"]),
        ("itm_loss_np", SUM_OF_GRADIENTS, ["the gradients of itm_loss_np(", " gradient_of_the_sum:"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_counterexample_can_be_read(desk, name, body, messages):
    write(name, body)
    found = told(name)
    assert all(message in found for message in messages), found
    assert not any(inside in found for inside in ("np.", "Warning", "]]]],   ["))


def test_numbers_that_differ_look_different(desk):
    one = find("unit_grad_np")
    write("unit_grad_np", ONE_DOT)
    load_bugs(one.concept)
    text = broken(load(one), one, LAWS["unit_grad_np"]["a_constant_divisor_does_not_move"]).lines()[1]
    got, expected = re.search(r"got (\S+), expected (\S+) at", text).groups()
    assert got != expected and "length=[[[1e-05]]]" in text


def test_a_law_without_words_shows_what_it_asks():
    def silent(f):
        assert f(np.ones((1, 1)), np.ones((1, 1)), 1.0) == 2

    found = broken(lambda x, y, scale: (x * y).sum(), find("infonce"), Law("infonce", "silent", silent, ""))
    assert found.message == "not so: f(np.ones((1, 1)), np.ones((1, 1)), 1.0) == 2"


def test_a_picture_says_what_it_shows_and_random_draws_have_none(desk, capsys, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.close("all")
    write("derangement", "return np.roll(np.arange(n), 1)")
    check("derangement")
    assert "broken" in capsys.readouterr().out and not plt.get_fignums()
    write("mlm_loss_np", MINUS_ONE)
    check("mlm_loss_np")
    assert plt.gcf().get_suptitle() == "the gradient of embedding"
    plt.close("all")


def test_one_syntax_error_stops_nothing_else(desk):
    path = find("infonce").path
    path.write_text(path.read_text(encoding="utf-8") + "\ndef (:\n", encoding="utf-8")
    assert "cannot be read: invalid syntax" in told("infonce")
    path.write_text("def other(): pass\n", encoding="utf-8")
    assert "has no infonce; was it renamed?" in told("infonce")
    path.write_text(
        "import nowhere\n\ndef infonce(images, texts, scale):\n    return images\n", encoding="utf-8"
    )
    assert ":1 raised ModuleNotFoundError" in told("infonce")
    with pytest.raises(pytest.skip.Exception):
        attempt_obeys(find("nce"))


def test_check_tells_one_line_a_law_and_changes_nothing(desk, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    write("infonce", RIGHT)
    write("infonce_np", ONE_DIRECTION)
    before = {path: path.read_bytes() for path in desk.rglob("*")}
    check("infonce", "infonce_np", "nce")
    out = capsys.readouterr().out
    assert out.count("infonce  ok  ") == len(LAWS["infonce"]) and "infonce_np  broken  images_and" in out
    assert "looks like the known mistake one_direction" in out and "nce: not attempted yet" in out
    assert {path: path.read_bytes() for path in desk.rglob("*")} == before
    with pytest.raises(ValueError, match="no exercise 'infonse'; did you mean infonce"):
        check("infonse")


def test_hold_asks_the_same_laws_of_a_function_that_stands_in_a_cell(capsys):
    load_bugs("infonce")
    wrong = BUGS["infonce"]["one_direction"].function
    hold(infonce.infonce, "infonce")
    assert capsys.readouterr().out.split()[::2] == ["ok"] * len(LAWS["infonce"])
    hold(wrong, "infonce")
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[-3] == "broken  images_and_texts_exchange" and "expected" in lines[-2] and "hint" in lines[-1]
    )
    hold(wrong, "infonce", diagnose=True)
    assert "looks like the known mistake one_direction" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match="no exercise 'infonse'; did you mean infonce"):
        hold(wrong, "infonse")


def test_a_verdict_holds_until_the_function_or_what_it_uses_changes(desk):
    one = find("infonce")
    write("infonce", RIGHT.replace("S = scale * images @ texts.T", "S = helper(images, texts, scale)"))
    source = (
        one.path.read_text(encoding="utf-8") + "\n\ndef helper(x, y, scale):\n    return scale * x @ y.T\n"
    )
    one.path.write_text(source, encoding="utf-8")
    verdict = {"infonce": [course.fingerprint(one), "passed"]}
    write("infonce_np", ONE_DIRECTION)
    assert course.state(one, verdict) == "right"
    one.path.write_text(source.replace("scale * x", "x"), encoding="utf-8")
    assert course.state(one, verdict) == "unchecked"


@pytest.mark.slow
def test_pytest_ends_with_the_map(desk):
    """A whole run in a process of its own: two attempts, one right; the map is the last that it says."""
    write("nce_np", "return 0.0, (score_data, score_noise, logp_data, logp_noise)")
    write("itm_loss", "return torch.nn.functional.cross_entropy(logits, labels.long())")
    command = [sys.executable, "-m", "pytest", "-k", "test_laws and attempt"]
    home = os.environ | {"MINIVLP_EXERCISES": str(desk)}
    done = subprocess.run(
        [*command, "-o", f"cache_dir={desk}/cache"], cwd=ROOT, env=home, capture_output=True
    )
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 1, done.stdout.decode()[-2000:]
    assert lines[-2] == f"1/{len(exercises())} exercises"
    assert lines[-1].startswith(f"next: {desk}/nce.py:") and "hint nce_np" in lines[-1]
    assert any("10 energy to NCE" in line and "x.." in line and "0/3" in line for line in lines)
    assert "Traceback" not in done.stdout.decode()
