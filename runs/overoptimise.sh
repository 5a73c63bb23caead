#!/usr/bin/env bash
# What happens without the KL penalty: PPO against the learned reward, while rules that it does not see are watched.
# After runs/quickstart.sh; about 6 minutes on 2 CPU cores. Draws out/overoptimise.png (Gao et al. 2023, fig. 1).
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
trap 'exit 130' INT
python ppo.py config/poems_ppo.py --out_dir=out/poems-overopt --kl_coef=0 --lr=3e-4 --min_lr=3e-4 --max_steps=100 "$@"
python -m tools.plot out/poems-overopt --x="sqrt(kl)" --y=score,watched,entropy --smooth=3 --out=out/overoptimise.png
python -m tools.evaluate poems --runs=out/poems-sft,out/poems-ppo,out/poems-overopt
