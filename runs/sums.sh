#!/usr/bin/env bash
# RL whose effect is easy to see: a model of 0.9 M parameters reads sums, is shown a few that are worked out line by
# line, and finds out in GRPO that thinking earns more. After an interruption run it again, and it goes on.
#   bash runs/sums.sh                 6 minutes on 2 cores;  bash runs/sums.sh 2: another seed, out/sums-*-2
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
trap 'exit 130' INT
began=$(date +%s)
say() { echo; echo "=== [$(( $(date +%s) - began )) s] $*"; }
prepare() { [ -f "data/$1/meta.json" ] || python prepare.py "$@" > /dev/null; }
seed=${1:-1}
tail=""
[ "$seed" = 1 ] || tail="-$seed"
shift $(( $# > 0 ))  # the other arguments go to pretraining and instruction tuning
raw=data/raw/sums

say "1. data: sums as text, 1,000 conversations, prompts, and the tests"
[ -f $raw/test.jsonl ] || python -m recipes.sums
prepare sums --input=$raw/text.jsonl --tokenizer=$raw/tokenizer.model --val_fraction=0.01
prepare sums-sft --input=$raw/sft.jsonl --kind=sft --tokenizer=data/sums --val_fraction=0.05
prepare sums-prompts --input=$raw/prompts.jsonl --kind=prompts --tokenizer=data/sums --val_fraction=0.02

say "2. pretraining"
python pretrain.py config/sums.py --seed="$seed" --out_dir="out/sums$tail" "$@"

say "3. instruction tuning: some conversations think, most do not"
python sft.py config/sums_sft.py --seed="$seed" --init_from="out/sums$tail" --out_dir="out/sums-sft$tail" "$@"

say "4. GRPO: right or wrong is all it is told"
python grpo.py config/sums_grpo.py --seed="$seed" --init_from="out/sums-sft$tail" --out_dir="out/sums-grpo$tail"

say "5. before and after, on sums that no stage has seen and no setting was chosen on"
python -m tools.evaluate sums --input=$raw/test.jsonl --runs="out/sums-sft$tail,out/sums-grpo$tail" --batch_size=1280
python -m tools.plot "out/sums-grpo$tail" --y=score,watched,length
say "done. Ask it: echo '4713+2586=?' | .venv/bin/python sample.py --chat --temperature=0 --out_dir=out/sums-grpo$tail"
