#!/usr/bin/env bash
# Make .venv and install what training needs; with --demo, also what the page of scripts/demo.py
# needs (in .venv/demo, which sees .venv); with --dev, all of this and what the tests need.
# Safe to run again: does nothing if it is done, and completes an interrupted installation.
#
# Usage: [PYTHON=python3.12] scripts/setup.sh [--demo | --dev] [--newest]
#
# Installs the exact versions in constraints.txt; with --newest, the newest compatible ones.
#
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...) are honoured, so
# a machine without a GPU can name PyTorch's CPU-only index and save most of the download.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"
# gradio needs an older Pillow than the rest has, so it gets an environment of its own
demo="$venv/demo"
log="$venv/setup.log"

die() {
    echo "setup: $*" >&2
    exit 1
}

kinds=(base)
dev=false
constraints=(-c "$root/constraints.txt")
for arg in "$@"; do
    case "$arg" in
        --demo) kinds=(base demo) ;;
        --dev) dev=true kinds=(base dev demo) ;;
        --newest) constraints=() ;;
        -h | --help)
            sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            echo "setup: unknown argument '$arg'; allowed: --demo, --dev, --newest" >&2
            exit 2
            ;;
    esac
done

# ---- is there anything to do? ---------------------------------------------------------------

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

stamp() { # what the installation was made from: requirements and Python version
    local files=(requirements.txt)
    [ "$1" = base ] || files+=("requirements-$1.txt")
    [ ${#constraints[@]} = 0 ] || files+=(constraints.txt)
    (cd "$root" && cat "${files[@]}" | cksum)
    "$python" -c 'import sys; print(*sys.version_info[:3], sep=".")'
}

done_file() { # done_file base|dev|demo
    local file="$venv/.setup-done"
    [ "$1" = base ] || file+="-$1"
    echo "$file"
}

up_to_date() { # up_to_date base|dev|demo
    local file place="$venv"
    file="$(done_file "$1")"
    [ "$1" = demo ] && place="$demo"
    [ -s "$file" ] && [ -x "$place/bin/python" ] && [ "$(stamp "$1" 2>/dev/null)" = "$(<"$file")" ]
}

wanting=()
for kind in "${kinds[@]}"; do
    up_to_date "$kind" || wanting+=("$kind")
done
if [ ${#wanting[@]} = 0 ]; then
    exit 0
fi

# ---- the environment ------------------------------------------------------------------------

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a working Python of 3.10 or newer"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python of 3.10 or newer on PATH; install one, or name one: PYTHON=/path/to/python3 $0"
}

make_venv() {
    local base
    base="$(find_python)" || exit 1
    echo "setup: making .venv with $("$base" -c 'import sys; print(sys.version.split()[0])')"
    "$base" -m venv --clear "$venv" >/dev/null 2>&1 ||
        die "'$base -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
}

if [ ! -e "$venv" ]; then
    make_venv
elif [ ! -x "$python" ] || ! "$python" -c '' >/dev/null 2>&1; then
    echo "setup: .venv is broken (its Python does not start)"
    make_venv
elif ! new_enough "$python"; then
    die ".venv has a Python older than 3.10; delete .venv and run this again"
fi
if ! "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m ensurepip >/dev/null 2>&1 || make_venv
fi
"$python" -m pip --version >/dev/null 2>&1 || die "no pip in .venv; delete .venv and run this again"

# ---- the packages ---------------------------------------------------------------------------

for kind in "${kinds[@]}"; do
    rm -f "$(done_file "$kind")"
done

# An interrupted pip leaves packages without the file it writes last, and would later take them for
# complete. Without their metadata they are installed again.
for info in "$venv"/lib/python3*/site-packages/*.dist-info \
    "$demo"/lib/python3*/site-packages/*.dist-info; do
    if [ -d "$info" ] && [ ! -e "$info/RECORD" ]; then rm -r "$info"; fi
done

pip_install() { # pip_install PYTHON ARGUMENTS: errors as one line, in full in the log
    local quiet=(-q) reason into="$1"
    shift
    [ -t 1 ] && quiet=()
    if "$into" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} "$@" 2>"$log"
    then
        return 0
    fi
    reason="$(grep -E '^ *(ERROR|error):' "$log" | tail -n 1 | cut -c 1-160 || true)"
    if grep -qiE 'no space left' "$log"; then
        reason="the disk is full"
    elif grep -qiE 'connection broken by|failed to establish|name resolution|from versions: none' \
        "$log"; then
        reason="no network: pip did not reach its package index"
    fi
    die "${reason:-pip ended early} (all of it: .venv/setup.log)"
}

if ! compgen -G "$venv/lib/python3*/site-packages/torch" >/dev/null; then
    free="$(df -Pk "$venv" | awk 'NR == 2 { printf "%d", $4 / 1000000 }')"
    echo "setup: installing; with CUDA's libraries that is about 3 GB to download and 6 GB of" \
        "disk in .venv (free: $free GB), and takes minutes"
fi

# visdom's set-up needs pkg_resources; see requirements.txt.
if ! "$python" -c 'import visdom' >/dev/null 2>&1; then
    pip_install "$python" 'setuptools>=77.0.3,<81' wheel # torch wants 77.0.3
fi
requirements="$root/requirements.txt"
if $dev; then requirements="$root/requirements-dev.txt"; fi
pip_install "$python" --no-build-isolation ${constraints[@]+"${constraints[@]}"} \
    -r "$requirements"

modules="torch, torchvision, numpy, PIL, skimage, dominate, tqdm, matplotlib, visdom, tornado"
if ! problem="$("$python" -c "import $modules" 2>&1)"; then
    die "an installed package does not import ($(tail -n 1 <<<"$problem" | cut -c 1-120));" \
        "delete .venv and run this again"
fi

# ---- the page to try a model ---------------------------------------------------------------

if [[ " ${kinds[*]} " = *" demo "* ]]; then
    if ! "$demo/bin/python" -c '' >/dev/null 2>&1; then
        "$python" -m venv --clear --without-pip "$demo" || die "'python -m venv $demo' failed"
    fi
    site_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    # the packages of .venv, pip included, can be imported there too; its own come first
    site_of "$python" >"$(site_of "$demo/bin/python")/venv.pth"
    pip_install "$demo/bin/python" -r "$root/requirements-demo.txt"
    if ! problem="$("$demo/bin/python" -c "import gradio, PIL, torch" 2>&1)"; then
        die "gradio does not import ($(tail -n 1 <<<"$problem" | cut -c 1-120));" \
            "delete .venv/demo and run this again"
    fi
fi

# ---- optional: the files of visdom's live page ----------------------------------------------

if [ -e "$root/scripts/setup_visdom.sh" ] &&
    ! bash "$root/scripts/setup_visdom.sh" "$python" >>"$log" 2>&1; then
    echo "setup: visdom's page is not ready (see .venv/setup.log); training works without it," \
        "and scripts/setup_visdom.sh tries again"
fi

for kind in "${kinds[@]}"; do
    file="$(done_file "$kind")"
    stamp "$kind" >"$file.part"
    mv "$file.part" "$file"
done
echo "setup: .venv is ready"
