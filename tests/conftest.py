"""For all tests: nothing is timed, so Hypothesis has no deadline either; what programs say is English, in UTF-8."""

import os

from hypothesis import settings

settings.register_profile("vmfs", deadline=None)
settings.load_profile("vmfs")

os.environ["LC_ALL"] = "C.UTF-8"
os.environ.pop("LANGUAGE", None)
