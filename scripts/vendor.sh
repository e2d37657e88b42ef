#!/bin/bash
# Puts the packages of the web page (vmfs/web/vendor/package-lock.json: xterm.js and noVNC) into vmfs/web/static/vendor, by npm ci.
# Looks first: when the lock file is what it was, nothing is done.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=vmfs/web/vendor/package-lock.json
to=vmfs/web/static/vendor
wanted=$(sha256sum "$lock" scripts/vendor.sh | sha256sum)
[ "$(cat "$to/stamp" 2>/dev/null)" = "$wanted" ] && exit 0
command -v npm >/dev/null || { echo "vendor: npm is missing: apt-get install npm" >&2; exit 1; }
mkdir -p .cache
work=$(mktemp -d .cache/vendor.XXXXXX)
trap 'rm -rf "$work"' EXIT
cp vmfs/web/vendor/package.json "$lock" "$work"
(cd "$work" && npm ci --ignore-scripts --no-audit --no-fund) >.cache/npm.log 2>&1 </dev/null ||
    { tail -n 5 .cache/npm.log >&2; echo "vendor: npm could not get the packages of $lock" >&2; exit 1; }
from=$work/node_modules
mkdir "$work/out" "$work/out/xterm" "$work/out/novnc"
cp "$from"/@xterm/xterm/{lib/xterm.mjs,css/xterm.css,LICENSE} "$from"/@xterm/addon-fit/lib/addon-fit.mjs "$work/out/xterm/"
cp -r "$from"/@novnc/novnc/{core,vendor,LICENSE.txt,AUTHORS} "$work/out/novnc/"
cp "$from"/@novnc/novnc/docs/LICENSE.MPL-2.0 "$work/out/novnc/"
echo "$wanted" >"$work/out/stamp"
rm -rf "$to"
mv "$work/out" "$to"
