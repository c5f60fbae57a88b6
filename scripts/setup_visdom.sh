#!/usr/bin/env bash
# Put the scripts and styles of visdom's page into the installed package, so that the live page
# works offline later. Safe to run again.
#
# Usage: scripts/setup_visdom.sh [PYTHON]     default: $PYTHON, else .venv/bin/python
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${1:-${PYTHON:-$root/.venv/bin/python}}"

if ! found="$(command -v "$python")"; then
    echo "setup_visdom: no Python at $python; name one: scripts/setup_visdom.sh PYTHON" >&2
    exit 1
fi
case "$found" in
    /*) ;;
    *) found="$PWD/$found" ;;
esac
cd "$root"
exec "$found" -m util.display.visdom_assets
