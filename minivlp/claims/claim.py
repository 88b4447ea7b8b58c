"""One claim: which number decides it, where that is claimed to be, and what is shown beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minivlp.claims.settings import Settings
from minivlp.claims.verdict import OPEN, Interval, Sample, difference, interval, verdict
from minivlp.claims.work import Samples

Results = Mapping[str, Sequence[Samples]]  # of each experiment, by seed
Which = tuple[str, str]  # an experiment and one of its measures


@dataclass(frozen=True)
class Claim:
    """One claim. The number is `first`, minus `second` where there is one; `above`: is it said to be above?

    points: what else the table and the picture show, a label and a number each. floor: what guessing reaches;
    while neither of the deciding measures (or of `learned`, where these must be near the floor) is above it,
    nothing was learned that could be compared, and the claim cannot be told. draw: the name of the kind of
    picture, in pictures.py; chance: a line in it.
    """

    says: str
    source: str
    tested: str
    number: str  # in words
    first: Callable[[Settings], Which]
    margin: float
    points: Callable[[Settings], dict[str, Which]]
    second: Callable[[Settings], Which] | None = None
    above: bool = True
    floor: Callable[[Settings], float] | None = None
    learned: Callable[[Settings], list[Which]] | None = None
    draw: str = "dots"
    axis: str = "share of items that are right"
    chance: float | None = None

    def deciding(self, settings: Settings) -> list[Which]:
        """The one or two measures of which the number is made."""
        return [which(settings) for which in (self.first, self.second) if which]

    def experiments(self, settings: Settings) -> list[str]:
        """What must be done for this claim."""
        which = [*self.deciding(settings), *self.points(settings).values()]
        which += self.learned(settings) if self.learned else []
        return list(dict.fromkeys(name for name, _ in which))

    def found(self, results: Results, settings: Settings) -> Interval:
        """The deciding number with its interval."""
        seeds = samples(results, self.first(settings))
        if self.second:
            seeds = difference(seeds, samples(results, self.second(settings)))
        return interval(seeds)

    def above_guessing(self, results: Results, settings: Settings) -> bool:
        """Has one of the models learned what is asked?"""
        if self.floor is None:
            return True
        which = self.learned(settings) if self.learned else self.deciding(settings)
        return any(interval(samples(results, one)).low > self.floor(settings) for one in which)

    def verdict(self, results: Results, settings: Settings) -> str:
        if not self.above_guessing(results, settings):
            return OPEN
        return verdict(self.found(results, settings), self.margin, self.above)

    def rule(self) -> str:
        """Where the number is claimed to be."""
        return f"{'above' if self.above else 'below'} {self.margin:g}"


def samples(results: Results, which: Which) -> list[Sample]:
    """One measure of one experiment, by seed."""
    return [seed[which[1]] for seed in results[which[0]]]
