"""`pytest --bugs`: each known bug is caught by its law, and each law catches one that no earlier law does."""

from pathlib import Path

import pytest

from tests.laws import BUGS, LAWS, caught, load_bugs

CONCEPTS = sorted(p.stem for p in (Path(__file__).parent / "bugs").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("concept", CONCEPTS)
def test_every_bug_is_caught_and_every_law_is_needed(concept: str, pytestconfig: pytest.Config) -> None:
    load_bugs(concept)
    here = f"tests.bugs.{concept}"
    families = [f for f, bugs in BUGS.items() if all(b.function.__module__ == here for b in bugs.values())]
    assert families, f"tests/bugs/{concept}.py registers no bug"
    lines, faults = [], []
    for family in families:
        laws, bugs = LAWS[family], BUGS[family]
        kills = {b: [name for name, one in laws.items() if caught(one, wrong)] for b, wrong in bugs.items()}
        lines.append(f"\n{family}: laws " + ", ".join(f"{i}={name}" for i, name in enumerate(laws)))
        for name, killers in kills.items():
            row = "".join("x" if one in killers else "." for one in laws)
            lines.append(f"  {row}  {name}: {bugs[name].story}")
            if bugs[name].caught_by not in killers:
                faults.append(f"{family}: {name} is not caught by {bugs[name].caught_by}")
        alive = set(bugs)
        for one in laws:
            new = {name for name in alive if one in kills[name]}
            if not new:
                faults.append(f"{family}: law {one} catches no bug that an earlier law misses")
            alive -= new
        if len(bugs) < 5:
            faults.append(f"{family}: {len(bugs)} known bugs, at least 5 wanted")
    pytestconfig.kill_matrix = [*getattr(pytestconfig, "kill_matrix", []), *lines]
    assert not faults, "\n".join(faults)
