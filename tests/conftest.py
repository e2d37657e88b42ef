"""For all tests: nothing is timed, so Hypothesis has no deadline either."""

from hypothesis import settings

settings.register_profile("vmfs", deadline=None)
settings.load_profile("vmfs")
