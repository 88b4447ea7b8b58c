"""What a learner is told: in time, by name, by the most telling law, and whatever the bytes of a file are."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from chapters.__main__ import main
from tests import course, limit, stubs
from tests.attempts import broken, fault_at_import, verdict
from tests.course import ROOT, exercises, fault, find, state
from tests.laws import LAWS, Subject, close, load_bugs
from tests.test_course import desk, told, write  # noqa: F401, desk is a fixture
from tests.watched import load

# No end.

NO_ELSE = """
pieces, start = [], 0
while start < len(word):
    for end in range(len(word), start, -1):
        piece = "##" * (start > 0) + word[start:end]
        if piece in vocab:
            pieces.append(piece)
            start = end
            break
return pieces
"""
FOREVER = {
    "wordpiece": NO_ELSE,  # as it was met: without the `else` of the inner loop
    "derangement": "while True:\n    pass",
    "infonce": "while True:\n    try:\n        images = images + 1\n    except Exception:\n        pass",
    "itm_loss": "import time\nwhile True:\n    time.sleep(60)",
}
IN_BACKWARD = """
class Ours(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, texts, scale):
        return images.sum() * 0 + torch.tensor(len(images), dtype=images.dtype).log()

    @staticmethod
    def backward(ctx, upstream):
        while True:
            pass


return Ours.apply(images, texts, scale)
"""


@pytest.mark.parametrize("name", FOREVER)
def test_an_endless_loop_is_stopped_and_told_with_its_line(desk, name, monkeypatch):  # noqa: F811
    monkeypatch.setattr(limit, "SECONDS", 0.3)
    write(name, FOREVER[name])
    began = time.monotonic()
    lines = told(name).splitlines()
    assert time.monotonic() - began < 30
    assert len(lines) == 3 and "no end after 0.3 seconds; it stood in line " in lines[1], lines
    assert "hint: Does every way through the loop come nearer to its end?" in lines[2]
    source = find(name).path.read_text(encoding="utf-8").splitlines()
    number, text = lines[1].split("it stood in line ")[1].split(": ", 1)
    assert source[int(number) - 1].strip() == text
    attempt_of_another = find("nce")
    with pytest.raises(pytest.skip.Exception):
        told(attempt_of_another.name)


def test_a_loop_in_a_backward_pass_and_in_the_diagnosis_is_stopped(desk, monkeypatch):  # noqa: F811
    monkeypatch.setattr(limit, "SECONDS", 0.3)
    write("infonce", IN_BACKWARD)
    one = find("infonce")
    load_bugs("infonce")
    assert broken(load(one), one, LAWS["infonce"]["gradients_are_the_slopes"]).kind == "slow"

    def sometimes(images, texts, scale):  # wrong at once, and endless where a known mistake is looked for
        while len(images) > 3:
            pass
        return images.sum() * scale

    found = broken(sometimes, one, LAWS["infonce"]["equal_scores_cost_log_B"])
    assert found.kind == "wrong" and found.mistake is None
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_slow_search_for_a_smaller_example_keeps_the_one_it_has(monkeypatch):
    monkeypatch.setattr(limit, "SECONDS", 0.5)
    one = find("infonce")
    load_bugs("infonce")

    def slow(images, texts, scale):
        for _ in range(200):
            time.sleep(0.001)
        return images.sum() * scale

    assert broken(slow, one, LAWS["infonce"]["equal_scores_cost_log_B"]).kind == "wrong"


def test_the_laws_own_time_is_not_the_learners(monkeypatch):
    """The signal may come while a law is at work: nothing happens."""
    clock = limit.Clock("another file", 0.01)
    with clock.running():
        time.sleep(0.1)


def test_check_stops_at_the_law_that_takes_too_long(desk, capsys, monkeypatch):  # noqa: F811
    from tests import check

    monkeypatch.setattr(limit, "SECONDS", 0.3)
    write("wordpiece", NO_ELSE)
    check("wordpiece", "learn_vocab")
    out = capsys.readouterr().out
    assert out.count("no end after") == 1 and "learn_vocab: not attempted yet" in out


IN_C = "def wordpiece(word, vocab, unknown='[UNK]', longest=100):\n    return sum(iter(int, 1))\n"


@pytest.mark.parametrize("soft", [True, False])
def test_a_call_of_c_that_never_returns_ends_the_process_with_its_line(tmp_path, soft):
    """So does any endless loop where there is no signal, on Windows."""
    source = IN_C if soft else IN_C.replace("return sum(iter(int, 1))", "while True: pass")
    (tmp_path / "text.py").write_text(source)
    program = "" if soft else "import signal; del signal.setitimer; "
    program += "from tests import check; check('wordpiece')"
    home = os.environ | {"MINIVLP_EXERCISES": str(tmp_path), "MINIVLP_LIMIT": "0.2"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=home, capture_output=True, timeout=300
    )
    assert done.returncode == 1
    assert f'File "{tmp_path}/text.py", line 2 in wordpiece' in done.stderr.decode()


# Which gradient.


def test_the_gradient_that_differs_is_named(desk):  # noqa: F811
    one = find("infonce_np")
    write(
        "infonce_np",
        "from minivlp.infonce import infonce_np as right\n"
        "value, (dx, dy, dscale) = right(images, texts, scale)\n"
        "return value, (dx, dy, 2 * dscale)",
    )
    load_bugs("infonce")
    found = broken(load(one), one, LAWS["infonce"]["gradients_are_the_slopes"])
    assert found.message.startswith("dscale: got ")


def test_a_gradient_knows_its_name_until_somebody_calculates_with_it():
    subject = Subject(lambda x, scale: (x * scale).sum(), "torch")
    dx, dscale = subject.grads(np.ones((2, 2)), 3.0)
    assert (dx.name, dscale.name, dx[0].name) == ("dx", "dscale", "dx")
    assert type(dx + dx) is np.ndarray and type(dscale * 1.0) is not type(dscale)
    with pytest.raises(AssertionError, match=r"^dx: got 3, expected 0 at \(0, 0\)$"):
        close(dx, np.zeros((2, 2)))
    with pytest.raises(AssertionError, match=r"^dx has shape \(2, 2\), expected \(2,\)$"):
        close(dx, np.zeros(2))


# The most telling law.

DDOF = """
r = 1 / np.sqrt(x.var(-1, ddof=1, keepdims=True) + eps)
centred = (x - x.mean(-1, keepdims=True)) * r
G = np.ones_like(x) if grad is None else grad
g, rows = weight * G, tuple(range(x.ndim - 1))
dx = r * (g - g.mean(-1, keepdims=True) - centred * (g * centred).mean(-1, keepdims=True))
return weight * centred + bias, (dx, (G * centred).sum(rows), G.sum(rows))
"""
MASKED = """
ordinary = np.setdiff1d(np.arange(vocab_size), [*special_ids, mask_id])
fate = rng.random(ids.shape)
{coin}
chosen = (coin < p) & (word_ids >= 0) & ~np.isin(ids, special_ids) & (ids != mask_id)
inputs, labels = ids.copy(), np.where(chosen, ids, -100)
inputs[chosen & (fate < 0.8)] = mask_id
swapped = chosen & (fate >= 0.9)
inputs[swapped] = rng.choice({pool}, swapped.sum())
return inputs, labels
"""
BY_WORD = "coin = np.take_along_axis(rng.random((len(ids), 99)), word_ids.clip(0), 1)\n"
BY_WORD += "coin = coin if whole_word else rng.random(ids.shape)"
BY_PIECE = "coin = rng.random(ids.shape)"
SAME_ROWS = "coin = rng.random(99)[word_ids.clip(0)] if whole_word else rng.random(ids.shape[1])[None]"
SWEEPS = """
from minivlp.sinkhorn import log_weights_np, logsumexp_np
log_a, log_b = log_weights_np(a, row_mask, cost.shape[-2]), log_weights_np(b, col_mask, cost.shape[-1])
u = np.zeros_like(log_a)
for _ in range(iters):
    v = eps * (log_b - logsumexp_np(u[..., None] - cost / eps, -2))
    u = eps * (log_a - logsumexp_np(v[..., None, :] - cost / eps, -1))
return np.exp(u[..., None] + v[..., None, :] - cost / eps)
"""
UNROLLED = """
from minivlp.sinkhorn import sinkhorn as solve, cosine
C = 1 - cosine(x, y)
return (solve(C, a, b, eps, iters) * C).sum()
"""
ONE_SHIFT = """
S = scale * images @ texts.T
B, E = len(S), np.exp(S - S.max())
value = S.max() + ((np.log(E.sum(1)) + np.log(E.sum(0))) / 2 - S.diagonal()).mean()
G = (E / E.sum(1, keepdims=True) + E / E.sum(0) - 2 * np.eye(B)) / (2 * B)
return value, (scale * G @ texts, scale * G.T @ images, (G * (images @ texts.T)).sum())
"""
BY_CHOICE = """
weights = np.exp(similarity - similarity.max(1, keepdims=True))
weights /= weights.sum(1, keepdims=True)
return np.array([rng.choice(len(row), p=row) for row in weights])
"""
CYCLE = """
order = rng.permutation(n)
index = np.empty(n, dtype=np.int64)
index[order] = np.roll(order, 1)
return index
"""


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name, body, mistake",
    [
        ("layer_norm_np", DDOF, "unbiased"),
        ("layer_norm_np", DDOF.replace("np.sqrt(x.var(-1, ddof=1, keepdims=True) + eps)",
                                       "(x.std(-1, keepdims=True) + eps)"), "eps_outside"),
        slow("mask_tokens", MASKED.format(coin=SAME_ROWS, pool="ordinary"), "rows_alike"),
        slow("mask_tokens", MASKED.format(coin=BY_WORD, pool="vocab_size"), "any_replacement"),
        slow("mask_tokens", MASKED.format(coin=BY_PIECE, pool="ordinary"), "always_pieces"),
        slow("sinkhorn_np", SWEEPS, "unscaled_potentials"),
        ("sinkhorn_np", SWEEPS.replace("- cost / eps)\n", "- cost) / eps)\n")
         .replace("np.exp(u", "np.exp((u"), "unscaled_potentials_in_the_sums"),
        slow("sinkhorn_cost", UNROLLED, "unrolled"),
        ("infonce_np", ONE_SHIFT, "one_shift_for_all"),
        slow("hard_negatives", BY_CHOICE, "diagonal_left_in"),
        slow("derangement", "return rng.random(n).argsort()", "permutation"),
        ("derangement", CYCLE, "one_cycle"),
    ],
)  # fmt: skip
def test_a_known_mistake_is_recognised_in_other_words_and_its_law_speaks(desk, name, body, mistake):  # noqa: F811
    write(name, body)
    one = find(name)
    found = verdict(load(one), one)
    assert found.mistake and found.mistake.name == mistake
    assert found.law.name == found.mistake.caught_by


def test_right_functions_and_other_mistakes_are_given_no_name(desk):  # noqa: F811
    write("mask_tokens", MASKED.format(coin=BY_WORD, pool="ordinary"))
    write(
        "layer_norm_np", DDOF.replace(", ddof=1", "").replace("weight * centred + bias", "weight * centred")
    )
    assert verdict(load(find("mask_tokens")), find("mask_tokens")) is None
    assert verdict(load(find("layer_norm_np")), find("layer_norm_np")).mistake is None


def test_the_first_counterexample_is_wide_and_whole(desk):  # noqa: F811
    """D ≥ 2 and numbers that can be checked by hand, and no NaN of a variance over one number."""
    write("layer_norm_np", DDOF)
    line = told("layer_norm_np").splitlines()[1]
    assert "x=[" in line and "NaN" not in line
    numbers = [float(n) for n in line.split("x=[")[1].split("]")[0].split(",")]
    assert len(numbers) >= 2 and all(n == round(n) for n in numbers), line


@pytest.mark.slow
def test_a_result_without_a_number_is_told_by_a_law_that_has_one(desk):  # noqa: F811
    """NaN under one law, a wrong number under the next: the number says more."""
    body = """
S = scale * images @ texts.T
if (S == 0).all() and len(S) > 2:
    return S.sum() / 0 * 0
return S.logsumexp(1).mean() - S.mean()
"""
    write("infonce", body)
    found = verdict(load(find("infonce")), find("infonce"))
    assert found.kind == "wrong" and "NaN" not in found.message


# Any bytes.

TEXT = b"def infonce(images, texts, scale):\n    raise Todo\n"
BYTES = {
    "latin": (b"# caf\xe9\n" + TEXT, ":1 cannot be read: byte 0xE9 is no UTF-8"),
    "latin in line 3": (TEXT + b"# \xe9", ":3 cannot be read: byte 0xE9"),
    "utf-16": ("x = 1\n".encode("utf-16"), ":1 cannot be read: byte 0x"),
    "nul": (TEXT + b"x = '\0'\n", ":3 cannot be read: it holds a NUL byte"),
    "syntax": (TEXT + b"def (:\n", ":3 cannot be read: "),
    "return": (TEXT + b"return 1\n", ":3 cannot be read: 'return' outside function"),
    "deep": (TEXT + b"x = " + b"-" * 200_000 + b"1\n", " cannot be read: "),
    "long sum": (TEXT + b"x = " + b"1 + " * 20_000 + b"1\n", " cannot be read: "),
    "binary": (bytes(range(256)), " cannot be read: "),
    "empty": (b"", " has no infonce; was it renamed?"),
    "exit": (b"import sys\nsys.exit(3)\n" + TEXT, ":2 raised SystemExit: 3"),
    "interrupt": (b"raise BaseException('no')\n" + TEXT, ":1 raised BaseException: no"),
    "loop": (b"while True:\n    pass\n" + TEXT, "cannot be read to its end: no end after 0.3 seconds"),
}  # fmt: skip


def written(data: bytes) -> bytes:
    """Not a stub, so that it is run."""
    return data.replace(b"    raise Todo", b"    return images.sum()")


@pytest.mark.parametrize("what", BYTES)
def test_a_file_that_cannot_be_run_is_named_in_one_line_and_the_others_go_on(desk, capsys, what, monkeypatch):  # noqa: F811
    monkeypatch.setattr(limit, "SECONDS", 0.3)
    data, message = BYTES[what]
    one = find("infonce")
    one.path.write_bytes(written(data))
    found = told("infonce", desk)
    assert len(found.splitlines()) == 1 and found.startswith("chapters/exercises/infonce.py"), found
    assert message in found
    assert main(["list"]) == 0 and main(["next"]) == 0 and main(["solution", "infonce"]) == 2
    with pytest.raises(pytest.skip.Exception):
        told("nce")
    assert "Traceback" not in capsys.readouterr().err
    assert main(["reset", "infonce"]) == 0  # what was written is kept, byte for byte
    assert [aside.read_bytes() for aside in (desk / ".attempts").iterdir()] == [written(data)]
    if what not in ("exit", "interrupt", "loop"):  # of those only the one stub is put back
        assert fault(one) is None
    one.path.write_bytes(written(data))
    assert main(["reset", "--stubs"]) == 0


CHANGES = {
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "CR": lambda data: data.replace(b"\n", b"\r"),
    "no last line end": lambda data: data.rstrip(b"\n"),
}


@pytest.mark.parametrize(
    "change",
    [slow(f) if name in ("CR", "no last line end") else f for name, f in CHANGES.items()],
    ids=CHANGES,
)
def test_marks_and_line_ends_are_read_over(desk, change):  # noqa: F811
    one = find("infonce")
    write("infonce", "return (images @ texts.T).sum()  # é")
    one.path.write_bytes(change(one.path.read_bytes()))
    assert fault(one) is None and state(one, {}) == "unchecked" and fault_at_import(one) is None
    assert "infonce breaks the law" in told("infonce")
    assert main(["reset", "infonce"]) == 0 and state(one, {}) == "todo"


def test_form_feeds_and_other_line_ends_of_unicode_do_not_shift_lines(desk):  # noqa: F811
    one = find("infonce")
    source = one.path.read_text(encoding="utf-8")
    one.path.write_text("x = '\u2028\x1c'\n\x0c\n" + source, encoding="utf-8")
    write("infonce", "return 0.5")
    assert main(["reset", "infonce"]) == 0 and state(one, {}) == "todo"
    assert stubs.segment(
        course.read(one.path), course.functions(course.read(one.path))["infonce"]
    ) == stubs.stub(one)


def test_a_file_that_may_not_be_opened_is_named(desk, capsys):  # noqa: F811
    one = find("infonce")
    one.path.unlink()
    assert "is missing" in told("infonce")
    one.path.mkdir()
    assert "infonce.py cannot be read: Is a directory" in told("infonce")
    assert main(["list"]) == 0 and main(["reset", "infonce"]) == 2
    assert "infonce.py" in capsys.readouterr().err


def test_random_bytes(desk, monkeypatch):  # noqa: F811
    """Stubs with bytes changed, cut and doubled at random."""
    monkeypatch.setattr(limit, "SECONDS", 1.0)
    rng = np.random.default_rng(0)
    one = find("hinge_np")
    right = one.path.read_bytes()
    for _ in range(150):
        data = bytearray(right)
        for _ in range(rng.integers(1, 5)):
            place = rng.integers(len(data))
            data[place : place + rng.integers(3)] = rng.integers(
                0, 256, rng.integers(4), dtype=np.uint8
            ).tobytes()
        one.path.write_bytes(bytes(data))
        assert state(one, {}) in ("wrong", "todo", "unchecked")
        assert fault(one) is None or len(fault(one).splitlines()) == 1
        assert one.where.endswith(".py") or ":" in one.where


THREAD = b"import threading, time\nthreading.Thread(target=time.sleep, args=(3600,)).start()\n"


@pytest.mark.slow
def test_a_thread_left_running_is_not_waited_for(desk):  # noqa: F811
    """pytest and the command line end, and name the file."""
    one = find("itm_loss")
    write("itm_loss", "return torch.nn.functional.cross_entropy(logits, labels.long())")
    one.path.write_bytes(THREAD + one.path.read_bytes())
    home = os.environ | {"MINIVLP_EXERCISES": str(desk)}
    for command in (
        ["pytest", "tests/test_itm.py", "-k", "itm_loss-attempt", "-o", f"cache_dir={desk}/cache"],
        ["chapters", "solution", "itm_loss"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=home, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stdout.decode()[-500:] + done.stderr.decode()[-500:]
        assert f"{one.path} has left Thread-" in done.stderr.decode()


def test_a_thread_that_has_ended_or_is_a_daemon_is_nobody_s_business():
    with limit.threads_of("somebody"):
        threading.Thread(target=int).start()
        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
        time.sleep(0.1)
    assert limit.leave(3) == 3


# Any terminal.


@pytest.mark.parametrize("command", ["next", "hint unit_grad_np 2", "solution infonce --spoil", "list"])
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_character_that_the_terminal_lacks_ends_nothing(desk, command, encoding):  # noqa: F811
    home = os.environ | {"MINIVLP_EXERCISES": str(desk), "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-m", "chapters", *command.split()], cwd=ROOT, env=home, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout


@pytest.mark.slow
def test_a_training_ends_well_on_a_terminal_that_lacks_characters(tmp_path):
    home = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minivlp", "train", "--steps", "2", "--items", "16", "--name", "here"]
    done = subprocess.run(command, cwd=tmp_path, env=home, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    folder = next(p.parent for p in (*tmp_path.rglob("eval.json"), *(ROOT / "runs").rglob("here/eval.json")))
    assert (folder / "report.md").stat().st_size > 0


# A map at the end of a whole run, and four lines for one exercise.


@pytest.mark.slow
def test_pytest_on_one_exercise_prints_no_map(desk):  # noqa: F811
    write("nce_np", "return 0.0, (score_data, score_noise, logp_data, logp_noise)")
    command = [sys.executable, "-m", "pytest", "tests/test_nce.py", "-k", "nce_np-attempt"]
    home = os.environ | {"MINIVLP_EXERCISES": str(desk)}
    for name in ("CI", "BUILD_NUMBER"):  # under either, pytest's summary repeats messages whole
        home.pop(name, None)
    done = subprocess.run(
        [*command, "-o", f"cache_dir={desk}/cache"], cwd=ROOT, env=home, capture_output=True
    )
    out = done.stdout.decode()
    assert (
        done.returncode == 1 and "the course:" not in out and "exercises" not in out.replace("exercises/", "")
    )
    assert len(out.splitlines()) <= 10, out


@pytest.fixture(autouse=True)
def no_alarm_is_left():
    yield
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert torch.is_grad_enabled() and len(exercises()) >= 36
