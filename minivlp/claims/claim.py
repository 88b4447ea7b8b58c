"""One claim: which number decides it, where that is claimed to be, and what is shown beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minivlp.claims.settings import Settings
from minivlp.claims.verdict import OPEN, Interval, Sample, difference, interval, verdict
from minivlp.claims.work import Samples

Results = Mapping[str, Sequence[Samples]]  # of each experiment, by seed
Measure = tuple[str, str]  # an experiment and one of its measures


@dataclass(frozen=True)
class Claim:
    """One claim. Its number is `first`, minus `second` where there is one.

    above: whether the claim says that the number lies above the margin, and not below it.
    points: what else the table and the picture show, a label and a number each. floor: what guessing reaches;
    while neither of the deciding measures (or of `learned`, where these must be near the floor) is above it,
    nothing was learned that could be compared, and the claim cannot be told. draw: the name of the kind of
    picture, in pictures.py; chance: a line in it.
    """

    says: str
    source: str
    tested: str
    number: str  # in words
    first: Callable[[Settings], Measure]
    margin: float
    points: Callable[[Settings], dict[str, Measure]]
    second: Callable[[Settings], Measure] | None = None
    above: bool = True
    floor: Callable[[Settings], float] | None = None
    learned: Callable[[Settings], list[Measure]] | None = None
    draw: str = "dots"
    axis: str = "share of items that are right"
    chance: float | None = None

    def deciding(self, settings: Settings) -> list[Measure]:
        """The one or two measures of which the number is made."""
        return [measure(settings) for measure in (self.first, self.second) if measure]

    def experiments(self, settings: Settings) -> list[str]:
        """What must be done for this claim."""
        measures = [*self.deciding(settings), *self.points(settings).values()]
        measures += self.learned(settings) if self.learned else []
        return list(dict.fromkeys(name for name, _ in measures))

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
        measures = self.learned(settings) if self.learned else self.deciding(settings)
        return any(interval(samples(results, one)).low > self.floor(settings) for one in measures)

    def verdict(self, results: Results, settings: Settings) -> str:
        if not self.above_guessing(results, settings):
            return OPEN
        return verdict(self.found(results, settings), self.margin, self.above)

    def rule(self) -> str:
        """Where the number is claimed to be."""
        return f"{'above' if self.above else 'below'} {self.margin:g}"


def samples(results: Results, measure: Measure) -> list[Sample]:
    """One measure of one experiment, by seed."""
    experiment, name = measure
    return [seed[name] for seed in results[experiment]]
