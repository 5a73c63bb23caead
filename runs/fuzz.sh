#!/usr/bin/env bash
# prepare.py on 100,000 arbitrary records and 100,000 arbitrary files: no traceback, the account adds up, nothing that
# can be read is lost. About 26 minutes on one idle core (10,000 of each: 158 s).     bash runs/fuzz.sh [number]
source "$(dirname "$0")/setup.sh" requirements-dev.txt
FUZZ=${1:-100000} exec python -m pytest -q tests/hard/test_fuzz_data.py
