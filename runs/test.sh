#!/usr/bin/env bash
# Set up and run all tests (CPU, minutes), a worker per core.   bash runs/test.sh [pytest arguments]
source "$(dirname "$0")/setup.sh" requirements-dev.txt
export OMP_NUM_THREADS=1
exec python -m pytest -q -n auto --dist worksteal tests "$@"
