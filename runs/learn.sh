#!/usr/bin/env bash
# Run every command of the lessons, and say how long each took: tiny.py, the tour, the cards, all that is broken.
#   bash runs/learn.sh           about 15 minutes on 2 idle cores
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
times=""
timed() {
    local began=$SECONDS
    echo; echo "=== $1"
    bash -euc "$2"
    times+="$((SECONDS - began)) s  $1"$'\n'
}
timed tiny "python learn/tiny.py"
timed small "python -m learn.small"
for stop in tokens rows attention loss gradient checkpoint mask reward group pair sampling; do
    timed "tour $stop" "python -m learn.tour $stop"
done
for card in learn/cards/*.md; do
    # what a card wants run is its block of bash
    timed "$card" "$(sed -n '/^```bash$/,/^```$/p' "$card" | sed '/^```/d')"
done
timed broken "python -m learn.broken all"
echo; printf '%s' "$times"
