"""What a learner asks at the desk: where am I, what is next, a hint, the answer, a fresh stub."""

import argparse
import json
from datetime import datetime

from minivlp.core.files import whole_file
from tests.course import (
    ROOT,
    Exercise,
    course_map,
    exercises,
    fault,
    find,
    functions,
    is_stub,
    next_exercise,
    read,
    shown,
    state,
    table,
    untouched,
)
from tests.stubs import library_function, segment, stub, stub_file

STATES = {"todo": "to do", "right": "right", "wrong": "wrong", "unchecked": "written, not checked"}


def verdicts() -> dict[str, list[str]]:
    """What earlier runs of pytest found, {name: [fingerprint, passed or failed]}."""
    path = ROOT / ".pytest_cache" / "v" / "course" / "verdicts"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # none yet, or a file that a full disk has cut: all is to be checked again
        return {}


def list_(args: argparse.Namespace) -> None:
    """A table of all exercises, then the map."""
    titles, known = table()
    found, before = verdicts(), None
    for one in known.values():
        if one.chapter != before:
            print(f"\n{one.chapter:02d} {titles[one.chapter]}")
        before = one.chapter
        about = f"{'*' * one.difficulty:<3} {one.minutes:>3} min"
        print(f"   {one.name:<22} {about}   {STATES[state(one, found)]:<21} {one.where}")
    print()
    print("\n".join(course_map(found)[-2:]))


def next_(args: argparse.Namespace) -> None:
    """The next exercise, how far it is, its docstring and its first hint."""
    found = verdicts()
    one = next_exercise(found)
    if one is None:
        print("all exercises obey their laws")
        return
    about = f"chapter {one.chapter:02d}, {table()[0][one.chapter]}; difficulty {one.difficulty}"
    print(f"{one.where}  {one.name}  ({about}, {one.minutes} minutes; {STATES[state(one, found)]})")
    if wrong := fault(one):
        print(wrong)
    print(f"\n{stub(one).rsplit('    raise Todo', 1)[0]}\nhint 1: {one.hints[0]}")
    print(f"check it with: pytest tests/test_{one.concept}.py -k {one.name}-attempt")


def hint_(args: argparse.Namespace) -> None:
    one = find(args.name)
    hint = one.hints[args.level - 1]
    print(
        f"{one.name}, hint {args.level} of 3: {hint}"
        if args.level < 3
        else f"{one.name}, hint 3 of 3:\n\n{hint}"
    )
    if args.level < 3:
        print(f"more: python -m chapters hint {one.name} {args.level + 1}")


def solution_(args: argparse.Namespace) -> None:
    """The library's function, after the learner's obeys the laws or with --spoil."""
    one = find(args.name)
    if not args.spoil and not _obeys(one):
        rule = f"{one.name} does not obey its laws yet"
        raise ValueError(
            f"{rule}: `python -m chapters hint {one.name}` helps, --spoil shows the library's code"
        )
    if not fault(one) and not untouched(one):
        source = read(one.path)
        print(f"--- yours, {one.where}\n{segment(source, functions(source)[one.name])}")
    source, node = library_function(one)
    print(f"--- the library's, minivlp/{one.concept}.py:{node.lineno}\n{segment(source, node)}", end="")


def _obeys(one: Exercise) -> bool:
    """By an earlier verdict on the same code, else by running the laws now."""
    now = state(one, verdicts())
    if now != "unchecked":
        return now == "right"
    from tests.notebook import obeys  # here, because it needs torch

    return obeys(one)


def reset_(args: argparse.Namespace) -> None:
    """Put the stub back; what was written is kept in the folder .attempts."""
    if args.stubs == bool(args.name):
        raise ValueError("reset takes the name of an exercise, or --stubs")
    if args.stubs:
        _refresh()
        return
    one = find(args.name)
    there = one.path.exists()
    if there:
        aside = one.path.parent / ".attempts" / f"{one.name}.{datetime.now():%Y-%m-%dT%H-%M-%S-%f}.py"
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(one.path.read_bytes())
        print(f"kept {shown(one.path)} as {shown(aside)}")
    try:
        fresh = _with_stub(read(one.path), one) if there else stub_file(one.concept)
    except SyntaxError as error:
        print(f"line {error.lineno or 1} cannot be read: all stubs of this file are restored")
        fresh = stub_file(one.concept)
    _write(one, fresh)
    print(f"restored {one.where} {one.name}")


def _with_stub(source: str, one: Exercise) -> str:
    """The file with this function as the stub, everything else as it is."""
    node = functions(source).get(one.name)
    if node is None:
        return f"{source.rstrip()}\n\n\n{stub(one)}"
    return source.replace(segment(source, node), stub(one), 1)


def _refresh() -> None:
    """Untouched stubs as the library has them now; a file that is all stubs is written anew, imports too."""
    for concept in dict.fromkeys(one.concept for one in exercises()):
        ours = exercises(concept)
        path = ours[0].path
        try:
            source = read(path) if path.exists() else ""
            found = functions(source)
        except (OSError, SyntaxError):
            print(f"left as it is: {fault(ours[0])}")
            continue
        if all(is_stub(node) for node in found.values()):
            fresh = stub_file(concept)
        else:
            fresh = source
            for one in ours:
                if one.name not in found or is_stub(found[one.name]):
                    fresh = _with_stub(fresh, one)
        if fresh != source:
            _write(ours[0], fresh)
            print(f"wrote {shown(path)}")


def _write(one: Exercise, text: str) -> None:
    one.path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(one.path) as file:
        file.write(text.encode())
