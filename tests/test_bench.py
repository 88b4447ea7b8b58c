"""The bench: clocks and counters that are right, peers that compute the same loss or are named as absent."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from minivlp import bench as bench_module
from minivlp.__main__ import main
from minivlp.bench import bench, chosen, command, comparison, fresh, measure
from minivlp.bench import peers as bench_peers
from minivlp.bench.cases import BARE, CASES
from minivlp.bench.figure import bars
from minivlp.bench.measure import exponent, interleaved, peak_increase, quartiles, ratios
from minivlp.bench.problems import bare_products
from minivlp.bench.report import GOALS, goals, report
from minivlp.bench.task import measure as measure_here
from minivlp.ipot import wpa
from minivlp.models.published.vilt import to_hugging_face

MB = 1 << 20


class Clock:
    """A clock that only moves when a call takes time; the machine gets slower with every repetition."""

    def __init__(self, slower: float = 2.0, **costs: float):
        self.now, self.slower, self.costs, self.order = 0.0, slower, costs, []

    def __call__(self) -> float:
        return self.now

    def calls(self) -> dict:
        return {name: partial(self._take, name) for name in self.costs}

    def _take(self, name: str) -> None:
        turn = len(self.order) // len(self.costs)
        self.now += self.costs[name] * self.slower**turn
        self.order.append(name)


@pytest.fixture
def here(monkeypatch):
    """Tasks are measured in this process: the same code without the start of a new one."""
    monkeypatch.setattr(bench_module, "fresh", lambda task: json.loads(json.dumps(measure_here(task))))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def nobody(done: int, total: int) -> None:
    pass


# Clocks and counters


def test_ratios_hold_while_the_machine_slows_down():
    clock = Clock(bare=1.0, a=2.0, b=3.0)
    times = interleaved(clock.calls(), least=4, seconds=0, clock=clock)
    assert times["bare"] == [2.0, 4.0, 8.0, 16.0]  # the first repetition, 1.0, is not counted
    assert ratios(times["a"], times["bare"]) == [2.0] * 4 and ratios(times["b"], times["a"]) == [1.5] * 4
    assert clock.order[:9] == ["bare", "a", "b", "a", "b", "bare", "b", "bare", "a"]  # in rotation


@pytest.mark.parametrize("seconds, repetitions", [(0, 3), (25, 4), (1e9, measure.MOST)])
def test_repetitions_fill_the_time_given(seconds, repetitions):
    clock = Clock(slower=1, bare=1.0, a=4.0)
    times = interleaved(clock.calls(), least=3, seconds=seconds, clock=clock)
    assert [len(values) for values in times.values()] == [repetitions] * 2


def test_quartiles_and_exponents():
    assert quartiles([5, 1, 2, 4, 3]) == {"median": 3, "low": 2, "high": 4}
    assert quartiles([7]) == {"median": 7, "low": 7, "high": 7}
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([1, 2, 4], [3, 3, 3]) == pytest.approx(0)
    assert exponent([1, 2, 4], [0, 1, 2]) is None


def test_peak_memory_sees_what_is_held_at_once_and_no_more():
    def call(at_once: int, in_turn: int) -> None:
        for _ in range(in_turn):
            held = [torch.ones(64 * MB // 4) for _ in range(at_once)]
            del held

    for at_once, in_turn, expected in ((1, 1, 64), (1, 3, 64), (2, 1, 128), (0, 1, 0)):
        held, method = peak_increase(partial(call, at_once, in_turn))
        assert held / MB == pytest.approx(expected, rel=0.15, abs=4), method


def test_without_a_resettable_peak_the_highest_so_far_is_asked(monkeypatch, tmp_path):
    peaks = iter([10 * MB, 74 * MB])
    monkeypatch.setattr(measure, "KERNEL", tmp_path / "nowhere")
    monkeypatch.setattr(measure, "_highest", lambda: next(peaks))
    held, method = peak_increase(lambda: None)
    assert held == 64 * MB and "ru_maxrss" in method
    monkeypatch.undo()
    assert MB < measure._highest() < 1 << 40  # bytes, on either system


def test_the_bare_products_are_those_of_the_gradient():
    x, y = torch.randn(1030, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)  # a ragged tile
    dx, dy = bare_products(x, y)()
    torch.testing.assert_close(dx, x @ y.T @ y)
    torch.testing.assert_close(dy, (x @ y.T).T @ x)
    dx, dy = bare_products(x, y, gradients=False)()
    assert not dx.any() and not dy.any()


# Peers


def gradients(name: str, variant: str) -> list[torch.Tensor]:
    """The value of a variant and its gradients at the tiny size."""
    case = CASES[name]
    problem = case.problem(**case.sizes["tiny"][0])
    value = case.loss(variant)(*problem.arguments)
    wanted = [a for a in problem.arguments if torch.is_tensor(a) and a.requires_grad]
    return [value, *torch.autograd.grad(value, wanted, torch.ones_like(value))]


SOLVERS = {  # and how near they come
    "POT sinkhorn_log, pair by pair": 0.05,
    "POT sinkhorn_log": 0.05,
    "geomloss, its own schedule": 0.1,
}


LOSSES = [name for name in CASES if name != "vilt"]  # a model has tests of its own, below


@pytest.mark.parametrize("name, variant", [(n, v) for n in LOSSES for v in ("fused", *CASES[n].peers)])
def test_all_variants_of_a_case_compute_the_same_loss(name, variant):
    """Other solvers of transport, with ε fixed from the start, come near; all the rest are equal."""
    present, absent = CASES[name].variants()
    if variant not in present:
        pytest.skip(absent[variant])
    ours, theirs = gradients(name, "torch"), gradients(name, variant)
    if variant in SOLVERS and (name, variant) != ("sinkhorn", "POT sinkhorn_log"):
        torch.testing.assert_close(theirs[0], ours[0], rtol=SOLVERS[variant], atol=0.02)
    else:
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_published_alignment_is_ours_in_value_and_gradient():
    generator = torch.Generator().manual_seed(0)
    words, patches = (torch.randn(3, n, 8, generator=generator, requires_grad=True) for n in (5, 7))
    word_mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    patch_mask = torch.arange(7) < torch.tensor([[4], [7], [1]])
    upstream = torch.tensor([1.0, -2.0, 0.5])
    found = []
    for loss in (wpa, bench_peers.published_alignment()):
        value = loss(words, patches, word_mask, patch_mask)
        found.append([value, *torch.autograd.grad(value, (words, patches), upstream)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_hugging_face_takes_the_same_step():
    """One set of weights: equal losses, and equal gradients of every weight, under the other's name."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    case, peer, found = CASES["vilt"], "transformers ViltModel", {}
    ours = case.problem(**case.sizes["tiny"][0])
    # In float64: the norm of near-zero texts blows rounding up.
    exact = (
        a.double() if isinstance(a, torch.nn.Module) or a.is_floating_point() else a for a in ours.arguments
    )
    ours = replace(ours, arguments=tuple(exact))
    theirs = case.posed(peer, ours)
    for variant, problem in (("torch", ours), (peer, theirs)):
        model = problem.arguments[0]
        value = case.loss(variant)(*problem.arguments)
        names = [name for name, _ in model.named_parameters()]
        gradients = torch.autograd.grad(value, problem.wanted)
        found[variant] = value, dict(zip(names, gradients, strict=True))
    torch.testing.assert_close(found[peer][0], found["torch"][0], rtol=0, atol=1e-9)
    expected = {
        name.removeprefix("vilt."): gradient
        for name, gradient in to_hugging_face(found["torch"][1]).items()
        if name.startswith("vilt.")
    }
    measured = {name.removeprefix("body."): g for name, g in found[peer][1].items() if "body." in name}
    assert measured.keys() == expected.keys() and len(found[peer][1]) > len(measured) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(measured[name], gradient, rtol=1e-6, atol=1e-9)


def test_the_weights_of_a_model_are_held_once():
    """What Hugging Face's model is built from is our memory, so that a measurement sees its step alone."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    case = CASES["vilt"]
    ours = case.problem(**case.sizes["tiny"][0])
    theirs = case.posed("transformers ViltModel", ours)
    held = {p.untyped_storage().data_ptr() for p in ours.wanted}
    assert {p.untyped_storage().data_ptr() for p in theirs.wanted} <= held
    ours.step(case.loss("torch"))
    assert all(p.grad is None for p in ours.wanted)  # a step leaves no gradient behind


def test_a_model_has_a_table_of_its_own():
    peer = "transformers ViltModel"
    timed = {BARE: [1.0], "torch": [1.5], peer: [2.0], "torch_memory": [MB], f"{peer}_memory": [2 * MB]}
    text = report(results(entry("vilt", {"B": 64, "L": 12}, **timed)))
    assert f"| vilt | B 64, L 12 | 1.50 | 1.0 | {peer} | 0.75 | 0.50 |" in text
    assert text.index("## Models beside their peers") < text.index("| vilt |")
    assert [(g["measure"], g["met"]) for g in goals(results(entry("vilt", {"B": 64}, **timed)))] == [
        ("time", True),
        ("memory", True),
    ]


@pytest.mark.slow
def test_absent_peers_are_named_with_the_reason(monkeypatch, here):
    for module in ("open_clip", "ot", "geomloss"):
        monkeypatch.setitem(sys.modules, module, None)
    present, absent = CASES["sinkhorn"].variants()
    assert "torch" in present and absent["POT sinkhorn_log"] == "POT is not installed"
    results = bench(["sigmoid"], "tiny", 1, nobody)
    assert "open_clip SigLipLoss" not in results["cases"][0]["seconds"]
    assert "- absent: open_clip SigLipLoss (open_clip_torch is not installed)" in report(results)


def test_a_version_without_chunks_is_absent_too(monkeypatch):
    class Losses:
        class SigLipLoss:
            def __init__(self, rank: int = 0): ...

    monkeypatch.setattr(bench_peers, "open_clip_loss", lambda: Losses)
    monkeypatch.setattr(bench_peers, "version", lambda package: "3.3.0")
    with pytest.raises(bench_peers.Absent, match=r"open_clip_torch 3\.3\.0 has no chunk_size"):
        bench_peers.open_clip_sigmoid_chunks()


# The whole bench, at tiny sizes


@pytest.mark.slow
def test_results_are_plain_data_and_complete(here):
    heard = []
    results = bench(["chamfer", "patch"], "tiny", 1, lambda done, total: heard.append((done, total)))
    assert json.loads(json.dumps(results, allow_nan=False)) == json.loads(json.dumps(results))
    assert heard[-1][0] == heard[-1][1] == len(heard)
    assert set(results) == {"machine", "sizes", "path", "memory_method", "cases", "growth"}
    assert {"cpu", "cores", "threads", "torch", "blas", "load"} <= set(results["machine"])
    assert set(results["path"]) == {"loop", "why", "tile_bodies"}
    assert [entry["case"] for entry in results["cases"]] == ["chamfer", "patch"]
    for entry in results["cases"]:
        assert not entry["failed"] and "torch" in entry["memory"]
        assert set(entry["seconds"]) == {BARE, *entry["memory"]} == set(entry["ratio"])
        assert not set(entry["absent"]) & set(entry["memory"])
        for variant, times in entry["seconds"].items():
            assert len(times) == 3 and min(times) > 0
            assert entry["ratio"][variant] == quartiles(ratios(times, entry["seconds"][BARE]))
        assert entry["unit"] in report(results) and f"## {entry['case']}" in report(results)
    for entry in results["growth"]:
        assert entry["case"] == "chamfer" and not entry["failed"]
        assert set(entry["exponents"]) == {"fused time", "fused memory", "torch memory"}
        assert len(entry["sizes"]) == len(entry["seconds"]["fused"]) == len(entry["memory"]["torch"]) == 3


def test_a_variant_that_raises_is_reported_and_the_others_measured(here, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setitem(CASES["nce"].rungs, "fused", broken)
    (entry,) = (results := bench(["nce"], "tiny", 1, nobody))["cases"]
    assert entry["failed"] == {"fused": "RuntimeError: no such kernel"} and "torch" in entry["seconds"]
    assert "- failed: fused (RuntimeError: no such kernel)" in report(results)


@pytest.mark.slow
def test_a_fresh_process_answers_and_one_that_dies_is_told(monkeypatch, tmp_path):
    task = {"do": "memory", "case": "nce", "variants": ["torch"], "threads": 1, "seconds": 0.0}
    answer = fresh(task | {"sizes": [{"B": 1024, "K": K} for K in (1024, 2048, 1024)]})
    first, _, again = answer["points"]
    assert answer["failed"] == {} and first > 4 * MB  # at least the gradient of the scores
    assert again == pytest.approx(first, rel=0.1)  # whatever the process did and freed in between
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert fresh(task | {"sizes": []})["failed"] == {"torch": "ended by signal 9: out of memory?"}


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_and_writes_what_it_found(as_json, here, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "bench", lambda names, sizes, *rest: bench(names, "tiny", *rest))
    assert main(["bench", "--only", "nce, nce", "--threads", "1"] + ["--json"] * as_json) == 0
    out, folder = capsys.readouterr().out, Path("runs/bench")
    written = json.loads((folder / "bench.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.png", "report.md"]
    if as_json:
        assert json.loads(out) == written
    else:
        assert (folder / "report.md").read_text() in out and f"wrote {folder / 'bench.png'}" in out
    assert abs(Image.open(folder / "bench.png").size[0] - 902) <= 1


@pytest.mark.parametrize("only", ["infonce,clip", ""])
def test_an_unknown_case_is_refused_with_the_list(only, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--only", only]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"must name some of {', '.join(CASES)}" in err
    assert not list(tmp_path.iterdir())


def test_cases_are_chosen_once_and_in_the_order_given():
    assert chosen(None) == list(CASES) and chosen("wpa, infonce,wpa") == ["wpa", "infonce"]


# Goals and growth


def entry(case: str, size: dict, **values: list[float]) -> dict:
    """A measured case; values are seconds, and bytes where their name ends in _memory."""
    memory = {k.removesuffix("_memory"): v for k, v in values.items() if k.endswith("_memory")}
    seconds = {k: v for k, v in values.items() if not k.endswith("_memory")}
    about = {"what": case, "unit": "3 products", "threads": 2, "absent": {}, "failed": {}}
    ratio = {k: quartiles(ratios(v, seconds[BARE])) for k, v in seconds.items()}
    return about | {"case": case, "size": size, "seconds": seconds, "memory": memory, "ratio": ratio}


def results(*cases: dict) -> dict:
    about = {"machine": measure.machine(2), "sizes": "full", "memory_method": "counted", "growth": []}
    return about | {"path": {"loop": "tiles", "why": "", "tile_bodies": "eager"}, "cases": list(cases)}


def test_goals_are_judged_by_what_was_measured():
    peer = "open_clip ClipLoss"
    timed = {BARE: [1.0, 2.0, 4.0], "fused": [1.4, 2.6, 5.6], peer: [1.5, 3.0, 6.0]}
    found = goals(results(entry("infonce", {"B": 4096, "D": 512}, **timed)))
    assert [(g["against"], g["measured"], g["met"]) for g in found] == [
        (BARE, pytest.approx(1.4), True),
        (peer, pytest.approx(1.4 / 1.5), False),
    ]
    big = entry("infonce", {"B": 16384, "D": 512}, fused_memory=[5, 1, 3])
    (goal,) = goals(results(big))
    assert goal["measured"] is None and goal["met"] is None and "| not measured |" in report(results(big))
    big["memory"][peer] = [60]
    assert goals(results(big))[0]["measured"] == pytest.approx(3 / 60) and goals(results(big))[0]["met"]
    assert comparison(big, "time", "fused", peer) is None


def test_every_goal_is_measured_by_the_full_sizes():
    for goal in GOALS:
        case = CASES[goal.case]
        assert goal.against == BARE or goal.against in case.peers
        sizes = [*case.sizes["full"], *case.memory_only.get("full", ())]
        assert any(goal.rows in size.values() for size in sizes), goal


def test_the_picture_has_a_bar_for_every_variant(tmp_path):
    cases = [
        entry("infonce", {"B": 4, "D": 2}, bare=[1.0], fused=[1.2], torch=[3.0], fused_memory=[MB]),
        entry("infonce", {"B": 8, "D": 2}, fused_memory=[MB], torch_memory=[9 * MB]),
    ]
    bars(tmp_path / "bars.png", results(*cases))
    assert abs(Image.open(tmp_path / "bars.png").size[0] - 902) <= 1
    with pytest.raises(ValueError, match="must hold a case that was measured"):
        bars(tmp_path / "none.png", results())
    assert not (tmp_path / "none.png").exists()


def grown(name: str, rung: str) -> float:
    """The exponent of a rung's memory over three sizes, in a process of its own."""
    rows, letters = [1024, 2048, 4096], CASES[name].sizes["tiny"][0]
    sizes = [{letter: 64 if letter == "D" else n for letter in letters} for n in rows]
    task = {"do": "memory", "case": name, "variants": [rung], "sizes": sizes, "threads": 1, "seconds": 0.0}
    answer = fresh(task)
    assert not answer["failed"], answer["failed"]
    return exponent(rows, answer["points"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.growth])
def test_memory_grows_like_the_rows_and_not_like_their_square(name):
    if "fused" not in CASES[name].rungs:
        pytest.skip("this concept has no fused rung")
    assert grown(name, "fused") < 1.35
    assert grown(name, "torch") > 1.6
