#!/bin/bash
# The whole suite: `make test`. Two workers, since tests of a mount wait for each other's processes half of the time; a file's tests
# stay together.
#
# A few of 10,000 tests that fail are run once more, alone. One that fails again fails the run. One that passes then is named at the end: it
# is a race, in it or in what it tests, and to be mended all the same.
set -euo pipefail
cd "$(dirname "$0")/.."

MOST=5

code=0
.venv/bin/pytest -n 2 --dist loadfile --cache-clear "$@" || code=$?
[ "$code" -eq 1 ] || exit "$code"           # 1: tests failed; all others are no verdict of theirs

failed=$(.venv/bin/python - <<'PY'
import json
print("\n".join(json.load(open(".pytest_cache/v/cache/lastfailed"))))
PY
)
count=$(wc -l <<<"$failed")
if [ -z "$failed" ] || [ "$count" -gt "$MOST" ]; then
    exit "$code"
fi
echo "test: $count failed; once more, alone:"
.venv/bin/pytest --last-failed --last-failed-no-failures none "$@" || exit $?
printf 'test: failed once, and passed alone, so there is a race to mend:\n%s\n' "$failed"
