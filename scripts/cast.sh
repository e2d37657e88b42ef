#!/bin/bash
# Records `make demo` as docs/demo.cast (asciinema's format) and docs/demo.svg, which the README shows. Typed as by a person: a short wait before
# each command, none longer than two seconds in what is shown.
#
# Takes asciinema (apt) and svg-term-cli (npm, by npx); nothing else of the project does.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh demo
export VMFS_DEMO_PAUSE=1 TERM=xterm-256color
asciinema rec --quiet --overwrite --cols 110 --rows 34 --idle-time-limit 2 --title 'vmfs: every virtual machine is a directory' \
    -c 'scripts/demo.sh' docs/demo.cast
npx --yes svg-term-cli --in docs/demo.cast --out docs/demo.svg --window --width 110 --height 34 </dev/null
ls -l docs/demo.cast docs/demo.svg
