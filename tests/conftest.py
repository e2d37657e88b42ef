"""For all tests: nothing is timed, so Hypothesis has no deadline either; what programs say is English, in UTF-8."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("vmfs", deadline=None)
settings.load_profile("vmfs")

os.environ["LC_ALL"] = "C.UTF-8"
os.environ.pop("LANGUAGE", None)


@pytest.fixture(scope="session", autouse=True)
def folders_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For a pytest that a test starts: each makes the folder for its temporary files its user's alone, and with it
    what tests of other users do at that moment would be out of their reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DEBUG_TEMPROOT", str(tmp_path_factory.mktemp("inner")))
        yield
