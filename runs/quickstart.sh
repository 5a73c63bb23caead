#!/usr/bin/env bash
# Every stage on real Chinese text, on a laptop. First it says how many minutes this machine will need. A GPU is used if
# there is one. After an interruption run it again: finished stages are skipped, the unfinished one goes on.
#   bash runs/quickstart.sh --dtype=float32     passes these settings to pretraining and instruction tuning
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
trap 'exit 130' INT  # Ctrl-C: the stage that runs saves and ends, and this script must not start the next one
began=$(date +%s)
say() { echo; echo "=== [$(( ($(date +%s) - began) / 60 )) min] $*"; }
prepare() { [ -f "data/$1/meta.json" ] || python prepare.py "$@"; }

python -m tools.minutes "$@"

say "1. data: poems, a novel, idioms, riddles"
prepare poems

say "2. pretraining"
python pretrain.py config/poems.py "$@"
python sample.py 床前明月光 --temperature=0 --max_new_tokens=40

say "3. instruction tuning"
prepare poems-sft
python sft.py config/poems_sft.py "$@"
printf '“守株待兔”是什么意思？\n它出自哪里？\n请举一个例子。\n' |
    python sample.py --chat --out_dir=out/poems-sft --max_new_tokens=96 --temperature=0.7

say "4. preferences and the reward model"
prepare poems-prompts
# pairs are real poems > poems that the SFT model has written > real poems with mistakes. So let it write some
if [ ! -f data/poems-pairs/meta.json ]; then
    python prepare.py poems-pairs > /dev/null  # writes the prompts to ask it
    rm -r data/poems-pairs                     # made without the model's poems
    samples=data/raw/poems-pairs-samples.jsonl
    if [ -s data/raw/poems-pairs-ask/prompts.jsonl ]; then  # it is empty where there are no poems (no npm)
        python sample.py --chat --out_dir=out/poems-sft --prompts=data/raw/poems-pairs-ask/prompts.jsonl \
            --temperature=1 --max_new_tokens=96 --batch_size=256 > $samples.part
        mv $samples.part $samples
    fi
fi
prepare poems-pairs
python reward.py config/poems_reward.py
# use the reward model without more training: of N answers keep the one with the highest score
python -m tools.evaluate best_of --n_titles=20 --batch_size=160

say "5. PPO"
python ppo.py config/poems_ppo.py

say "6. DPO"
python dpo.py config/poems_dpo.py

say "7. all of them side by side, on poems and idioms that none has seen"
python -m tools.evaluate poems
python -m tools.plot quickstart
python -m tools.page
say "done. Talk to it: .venv/bin/python sample.py --chat --out_dir=out/poems-ppo   (curves: out/quickstart.png)
    Look inside all of them, in a browser: out/page.html"
