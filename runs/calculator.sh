#!/usr/bin/env bash
# An agent as small as it can be: the base model of runs/sums.sh may ask a calculator, and each call costs 0.5 of the
# reward. Numbers have one to four digits: it can add the short ones by itself.
#   bash runs/calculator.sh           after runs/sums.sh;  bash runs/calculator.sh 2: after runs/sums.sh 2
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
trap 'exit 130' INT
began=$(date +%s)
say() { echo; echo "=== [$(( $(date +%s) - began )) s] $*"; }
prepare() { [ -f "data/$1/meta.json" ] || python prepare.py "$@" > /dev/null; }
seed=${1:-1}
tail=""
[ "$seed" = 1 ] || tail="-$seed"
raw=data/raw/sums
base=out/sums$tail
[ -f "$base/ckpt.pt" ] || { echo "there is no $base: run bash runs/sums.sh $seed first" >&2; exit 1; }
prepare sums-tools-sft --input=$raw/tools-sft.jsonl --kind=sft --tokenizer=data/sums --val_fraction=0.05
# 155 questions of one digit and 7,500 longer ones, each kind half of the time
prepare sums-tools-prompts --input=$raw/tools-prompts --repeat=short:48 --kind=prompts --tokenizer=data/sums --val_fraction=0.02

say "1. instruction tuning: 300 of 1,000 conversations ask the calculator, whatever the numbers"
python sft.py config/sums_sft.py --data_dir=data/sums-tools-sft --epochs=16 --seed="$seed" --init_from="$base" \
    --out_dir="out/sums-tools-sft$tail"

say "2. GRPO: 1 for the right number, less 0.5 a call; the calculator answers while the model writes"
python grpo.py config/sums_grpo.py --data_dir=data/sums-tools-prompts --seed="$seed" \
    --init_from="out/sums-tools-sft$tail" --out_dir="out/sums-tools-grpo$tail" \
    --max_steps=50 --environment=recipes/sums.py:calculator --turns=2 --reward=recipes/sums.py:priced --watch=recipes/sums.py:calls

say "3. before and after, by the number of digits"
python -m tools.evaluate sums --input=$raw/tools-test.jsonl --runs="out/sums-tools-sft$tail,out/sums-tools-grpo$tail" \
    --samples=4 --batch_size=1280
say "done"
