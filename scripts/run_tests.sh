#!/usr/bin/env bash
# Install what is needed and run the tests; arguments go to pytest.
#
#   scripts/run_tests.sh                        all tests, in three processes
#   scripts/run_tests.sh -m 'not slow'          the quick ones
#   scripts/run_tests.sh tests/test_x.py -n 0   one file, in this process
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --dev

# One thread in each process, since more would fight over the cores; and a process more than two
# cores need, since many tests wait for something.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MKL_NUM_THREADS="${MKL_NUM_THREADS:-$OMP_NUM_THREADS}"
exec .venv/bin/python -m pytest -n 3 --timeout 600 "$@"
