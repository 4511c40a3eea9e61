#!/usr/bin/env bash
# Makes the environment once, then runs the linters, the type checker and the tests, on two processes:
#   [TEST_WORKERS=n] [SLOW_TESTS=1] ./test.sh [options of pytest]
# Tests that take more than ten seconds each are run where SLOW_TESTS is set, as CI does.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/scripts/environment.sh"
make_environment "$here" dev
cd "$here"
bin="$here/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/python" -m mypy
# The models of the tests are tiny: a second thread gains nothing, and beside other work on the machine it waits for ages.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$bin/python" -m pytest -n "${TEST_WORKERS:-2}" --dist loadscope ${SLOW_TESTS:+-m "slow or not slow"} "$@"
