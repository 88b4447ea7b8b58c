"""Hypothesis profiles: what a learner sees, what proves that the laws bite, and a long random search."""

from hypothesis import HealthCheck, Phase, settings

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors]
settings.register_profile(
    "learner", max_examples=25, derandomize=True, deadline=None, phases=PHASES, print_blob=False,
    report_multiple_bugs=False, suppress_health_check=QUIET,
)  # fmt: skip
settings.register_profile(
    "bugs", parent=settings.get_profile("learner"), phases=(Phase.explicit, Phase.generate)
)
settings.register_profile("long", parent=settings.get_profile("learner"), max_examples=300, derandomize=False)
