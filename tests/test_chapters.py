"""Chapters: notebooks in step with their sources, scripts that run, and the commands of the course."""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import chdir
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

from chapters import build, desk, learner, train
from chapters.__main__ import main
from minivlp import build_vilt
from minivlp.bench.measure import cores
from minivlp.recipes.vilt import ViltRecipe
from minivlp.training import loop
from minivlp.training.run import ReadOnlyRun, Run
from tests import tiny
from tests.course import ROOT, exercises, find
from tests.test_course import ONE_DIRECTION, RIGHT, write
from tests.test_course import desk as folder  # noqa: F401, a fixture

SOURCES = build.sources()
EACH = pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
COMMITTED = {s: s.with_suffix(".ipynb").read_bytes() for s in SOURCES if s.with_suffix(".ipynb").exists()}
SCRIPT = 20  # seconds


@EACH
def test_the_notebook_is_in_step_with_its_source(source):
    """Cells equal those of the .py, every code cell has run, and a browser can read it."""
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    fresh = build.read(source)
    told = f"run python -m chapters build {source.stem[:2]}"
    assert [(c.cell_type, c.source) for c in fresh.cells] == [
        (c.cell_type, c.source) for c in notebook.cells
    ], told
    assert notebook.metadata == fresh.metadata and [c.id for c in notebook.cells] == [
        c.id for c in fresh.cells
    ]
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1)), told
    assert source.with_suffix(".ipynb").stat().st_size <= build.LARGEST
    outputs = [output for cell in codes for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    figures = [
        output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})
    ]
    assert all(len(alternative) > 30 for alternative in figures), "say what to see under each figure"


@EACH
def test_a_chapter_has_its_form(source):
    """At least 150 lines; a question first; what was left out and the sources last; links lead somewhere."""
    text = source.read_text(encoding="utf-8")
    assert len(text.splitlines()) >= 150
    assert "**The question.**" in text and "## What we left out" in text and "## Sources" in text
    for name in re.findall(r"check\(([^)]*)\)", text):
        for one in re.findall(r'"(\w+)"', name):
            assert find(one).chapter == int(source.stem[:2]), f"{one} belongs to another chapter"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (source.parent / link).exists(), f"{link} does not exist"


def run(*command: str, where: Path) -> tuple[float, str]:
    """Seconds of one core, and the last lines of an error or nothing, of a Python process and its children.

    Time in which the core worked for others does not count: on a busy machine a clock would time those.
    """
    home = os.environ | {"MPLBACKEND": "Agg", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, *command], cwd=where, env=home, stdout=subprocess.DEVNULL, stderr=errors
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        return used.ru_utime + used.ru_stime, errors.read()[-1000:] if child.returncode else ""


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> dict[Path, dict[str, Future]]:
    """Each chapter that is asked about, run as a script and built again: as many at once as cores."""
    asked = {item.callspec.params["source"] for item in request.session.items if "runs" in item.fixturenames}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with ThreadPoolExecutor(cores()) as pool:
        yield {
            source: {
                "script": pool.submit(run, str(source), where=elsewhere),
                "build": pool.submit(run, "-m", "chapters", "build", source.stem, where=ROOT),
            }
            for source in sorted(asked)
        }


@EACH
@pytest.mark.slow
def test_a_chapter_runs_as_a_script(source, runs, tmp_path):
    """From another folder, in at most SCRIPT seconds on one core."""
    seconds, error = runs[source]["script"].result()
    if seconds > SCRIPT:  # with a neighbour on the other core; once more, alone
        wait([future for both in runs.values() for future in both.values()])
        seconds, error = run(str(source), where=tmp_path)
    assert not error
    assert seconds <= SCRIPT


@EACH
@pytest.mark.slow
def test_a_second_build_writes_the_same_bytes(source, runs):
    before = COMMITTED[source]
    _, error = runs[source]["build"].result()
    assert not error
    assert source.with_suffix(".ipynb").read_bytes() == before


def test_the_first_cell_finds_the_clone(tmp_path, monkeypatch):
    """It is the same in all chapters: as a script, in a notebook started in the clone, or beside it."""
    opening = "here = Path(globals()"
    firsts = {build.read(s).cells[1].source.split("sys.path.insert")[0] for s in SOURCES}
    assert len(firsts) == 1 and opening in firsts.copy().pop()
    (cell,) = firsts
    (tmp_path / "minivlp").symlink_to(ROOT)  # where a clone lies in Colab
    (tmp_path / "closed").mkdir()
    see = os.stat

    def stat(path, *args, **settings):
        """Folders that one may not read, as `chmod 0` makes them for all but root."""
        if "closed" in Path(path).parts[:-1]:
            raise PermissionError(13, "Permission denied", str(path))
        return see(path, *args, **settings)

    monkeypatch.setattr(os, "stat", stat)
    script = {"__file__": str(SOURCES[0])}
    for start, given in ((ROOT, {}), (ROOT / "chapters", {}), (tmp_path, {}), (Path("/"), script)):
        monkeypatch.chdir(start)
        exec(cell, names := dict(given))
        assert names["root"].resolve() == ROOT
    monkeypatch.chdir("/")
    with pytest.raises(RuntimeError, match="clone it beside this notebook"):
        exec(cell, {})


def test_a_notebook_has_the_outputs_of_its_cells(tmp_path):
    """Printed lines and pictures in order, the last value, measured cells as they were, small pictures."""
    source = tmp_path / "90_trial.py"
    cells = ["# %% [markdown]\n# Text", '# %%\nprint("one")\nplt = __import__("matplotlib.pyplot").pyplot']
    cells += [
        '# %%\nplt.plot([1, 2])\nplt.show()\nprint("two")\n"three"',
        '# %% tags=["measured"]\nprint(id(object()))',
    ]
    source.write_text("\n\n".join(cells) + "\n")
    plt.figure()  # left open by somebody else
    with chdir(ROOT):
        build.build_one(source)
        first = source.with_suffix(".ipynb").read_bytes()
        build.build_one(source)
    assert source.with_suffix(".ipynb").read_bytes() == first
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    text, one, two, measured = notebook.cells
    assert text.source == "Text" and one.outputs[0].text == "one\n"
    assert [output.output_type for output in two.outputs] == ["display_data", "stream", "execute_result"]
    assert two.outputs[2].data["text/plain"] == "'three'" and measured.outputs[0].text.strip().isdigit()


def test_hint_and_solution(folder, capsys):  # noqa: F811
    assert main(["hint", "infonce_np", "2"]) == 0
    assert find("infonce_np").hints[1] in capsys.readouterr().out
    assert main(["solution", "infonce"]) == 2
    assert "--spoil" in capsys.readouterr().err
    assert main(["solution", "infonce", "--spoil"]) == 0
    assert "logsumexp(1)" in capsys.readouterr().out
    write("infonce", RIGHT)
    assert main(["solution", "infonce"]) == 0
    out = capsys.readouterr().out
    assert "--- yours" in out and "--- the library's, minivlp/infonce.py:" in out
    assert main(["hint", "infonse"]) == 2
    assert "did you mean infonce" in capsys.readouterr().err


def test_reset_restores_one_stub_and_keeps_what_was_written(folder, capsys):  # noqa: F811
    path = find("infonce").path
    fresh = path.read_text(encoding="utf-8")
    write("infonce", RIGHT)
    with_one = path.read_text(encoding="utf-8")
    write("infonce_np", ONE_DIRECTION)
    with_both = path.read_text(encoding="utf-8")
    assert main(["reset", "infonce_np"]) == 0
    assert path.read_text(encoding="utf-8") == with_one
    assert [aside.read_text(encoding="utf-8") for aside in (folder / ".attempts").iterdir()] == [with_both]
    assert main(["reset", "infonce"]) == 0 and path.read_text(encoding="utf-8") == fresh
    path.write_text("def (", encoding="utf-8")
    assert main(["reset", "infonce"]) == 0 and path.read_text(encoding="utf-8") == fresh


def test_stubs_follow_the_library_and_attempts_stay(folder, capsys):  # noqa: F811
    nce, infonce = find("nce").path, find("infonce").path
    fresh = nce.read_text(encoding="utf-8")
    nce.write_text(fresh.replace("noise", "other"), encoding="utf-8")
    write("infonce", RIGHT)
    mine = infonce.read_text(encoding="utf-8")
    infonce.write_text(mine.replace("InfoNCE and its gradients", "something else"), encoding="utf-8")
    assert main(["reset", "--stubs"]) == 0
    assert nce.read_text(encoding="utf-8") == fresh and infonce.read_text(encoding="utf-8") == mine


def test_list_and_next(folder, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(desk, "verdicts", dict)
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(one.name in out for one in exercises()) and f"0/{len(exercises())} exercises" in out
    write("infonce", RIGHT)
    assert main(["next"]) == 0  # what is begun comes first
    out = capsys.readouterr().out
    assert "chapter 12" in out and "pytest tests/test_infonce.py -k infonce-attempt" in out
    assert "minutes; written, not checked)" in out


def test_a_reader_who_has_seen_enough_is_no_error():
    """`python -m chapters list | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "chapters", "list"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_cannot_be_trained_with_is_refused(folder, capsys):  # noqa: F811
    for names, message in (
        ("chamfer", "chamfer is called by no training"),
        ("mlm_loss,mlm_loss_np", "one rung of a function, not two"),
        ("mlm_loss", "does not obey its laws yet"),
        ("mlm_los", "did you mean mlm_loss"),
    ):
        assert main(["train", "--use", names]) == 2
        assert message in capsys.readouterr().err


MLM_LOSS = """
masked = targets != -100
logits = hidden[masked] @ embedding.T + bias
return torch.nn.functional.cross_entropy(logits, targets[masked], reduction="sum") / max(len(logits), 1)
"""
ITM_LOSS_NP = """
rows = np.arange(len(logits))
log_p = logits - np.logaddexp(logits[:, :1], logits[:, 1:])
dlogits = np.exp(log_p)
dlogits[rows, labels] -= 1
return -log_p[rows, labels].mean(), (dlogits / len(rows),)
"""


FIRST_STATE = """
bent = gelu(linear(cls, w["pooler.weight"], w["pooler.bias"]))
return linear(bent, w["itm.weight"], w["itm.bias"])
"""


@pytest.mark.slow
def test_the_learners_vilt_trains_as_the_librarys_does(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Its own file, a piece of an earlier chapter and the library for the rest; the curves are the same."""
    tiny.shrink(monkeypatch.setattr)
    monkeypatch.setattr(learner, "run_folder", lambda name: tmp_path / name)
    write("itm_logits", find("itm_logits").hints[2])
    write("mlm_loss", MLM_LOSS)
    before = dict(vars(build_vilt))
    assert main(["train", "--steps", "20"]) == 0
    out = capsys.readouterr().out
    assert "yours: mlm_loss, itm_logits\n" in out and "the library's: patch_embed, attention" in out
    assert dict(vars(build_vilt)) == before
    made = tmp_path / "learner-1"
    assert {p.name for p in made.iterdir()} >= {"named.png", "beside_the_library.png", "metrics.jsonl"}
    theirs = list(loop.steps(learner.SingleObjects(learner.small_settings(20)), ReadOnlyRun("nowhere", {})))
    for ours, one in zip(Run(made, {}).records(), theirs, strict=True):
        assert abs(ours["mlm"] - one["mlm"]) < 0.1 and abs(ours["itm"] - one["itm"]) < 0.05
    write("itm_logits", FIRST_STATE)
    assert main(["train", "--steps", "20"]) == 2
    assert "itm_logits does not obey its laws yet" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model_trains_with_the_learners_functions(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """One in PyTorch, one with its gradient by hand; afterwards the library is as it was."""
    tiny.shrink(monkeypatch.setattr)
    monkeypatch.setattr(ViltRecipe, "draw", lambda *run: [])
    monkeypatch.setattr(train, "ITEMS", 16)
    monkeypatch.setattr(train, "NAME", tmp_path / "attempt")
    write("mlm_loss", MLM_LOSS)
    write("itm_loss_np", ITM_LOSS_NP)
    before = dict(vars(sys.modules["minivlp.recipes.vilt"]))
    assert main(["train", "--use", "mlm_loss,itm_loss_np", "--steps", "3", "--threads", "1"]) == 0
    assert re.search(r"calls: mlm_loss [1-9]\d*, itm_loss_np [1-9]", capsys.readouterr().out)
    assert dict(vars(sys.modules["minivlp.recipes.vilt"])) == before
    assert (tmp_path / "attempt-vilt-1" / "checkpoint.pt").exists()
    # A function that the training does not call is noticed after half of the steps.
    monkeypatch.setattr(train, "_named", lambda function: [])
    assert main(["train", "--use", "mlm_loss", "--steps", "3", "--threads", "1"]) == 2
    assert "never called mlm_loss" in capsys.readouterr().err
    assert not (tmp_path / "attempt-vilt-2").exists()
