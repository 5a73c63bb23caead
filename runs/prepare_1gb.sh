#!/usr/bin/env bash
# How fast prepare.py is, and how much memory it and its workers take, on a corpus of any size:
#     bash runs/prepare_1gb.sh [megabytes]
# The corpus repeats the texts of data/raw/poems (python prepare.py poems fetches them), each copy with a number so that
# none is a duplicate. Everything is written to a temporary folder and removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
megabytes=${1:-1000}
texts=$PWD/data/raw/poems
[ -d "$texts" ] || { echo "no $texts: run python prepare.py poems first" >&2; exit 1; }
[ -d .venv ] && . .venv/bin/activate
script=$PWD/prepare.py
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python - "$texts" "$megabytes" <<'PYTHON'
import glob
import itertools
import json
import sys

texts = []
for path in sorted(glob.glob(sys.argv[1] + "/*.jsonl")):
    with open(path, encoding="utf-8") as f:
        texts += [json.loads(line)["text"] for line in f]
size = int(sys.argv[2]) * 1_000_000
with open("corpus.jsonl", "wb") as f:
    for number, text in ((number, text) for number in itertools.count() for text in texts):
        f.write(json.dumps({"text": f"{number} {text}"}, ensure_ascii=False).encode() + b"\n")
        if f.tell() > size:
            break
PYTHON

python - "$script" <<'PYTHON'
import os
import subprocess
import sys
import time


def memory(pid):
    """Bytes of memory of a process and all its descendants; what several share counts once."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as f, open(f"/proc/{pid}/task/{pid}/children") as children:
            pss = next(int(line.split()[1]) for line in f if line.startswith("Pss:"))
            return pss * 1024 + sum(map(memory, children.read().split()))
    except (OSError, StopIteration):  # it has just ended
        return 0


start, peak = time.time(), 0
program = subprocess.Popen([sys.executable, sys.argv[1], "big", "--input=corpus.jsonl", "--vocab_size=6400"])
while program.poll() is None:
    peak = max(peak, memory(program.pid))
    time.sleep(0.1)
seconds, megabytes = time.time() - start, os.path.getsize("corpus.jsonl") / 1e6
print(f"{megabytes:.0f} MB in {seconds:.0f} s: {megabytes / seconds:.1f} MB/s, "
      f"peak memory of all processes {peak / 1e6:.0f} MB")
sys.exit(program.returncode)
PYTHON
