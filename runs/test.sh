#!/usr/bin/env bash
# Set up and run all tests (CPU, minutes).   bash runs/test.sh [pytest arguments]
source "$(dirname "$0")/setup.sh" requirements-dev.txt
exec python -m pytest -q tests "$@"
