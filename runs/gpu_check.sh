#!/usr/bin/env bash
# Everything that is claimed of GPUs, measured on one card in about eight minutes, what is most worth knowing first:
#   bash runs/gpu_check.sh          a part that fails or takes too long stops nothing; logs and a summary in out/gpu_check/
#   SMOKE=1 bash runs/gpu_check.sh  the same in tiny shapes on a CPU: does the script itself run?
# With data/poems and data/poems-sft (runs/quickstart.sh makes them) it ends by training a model of 42 M parameters.
set -uo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
out=${OUT:-out/gpu_check}
mkdir -p "$out"
rm -f "$out"/*.log
failed=0
part() {  # NAME SECONDS COMMAND…
    echo; echo "=== $1"
    timeout "$2" "${@:3}" > "$out/$1.log" 2>&1
    status=$?
    grep -v Warning "$out/$1.log" | tail -25
    [ $status -eq 0 ] || { echo "!!! $1: exit status $status"; failed=1; }
}
size=(--size=baby --seq_len=1024 --batch_size=32 --repeats=5)
model=(--dim=512 --n_layers=12 --n_heads=8 --batch_size=64 --max_steps=1200 --decay_steps=400 --eval_every=600 --lr=4e-3)
sft=(--batch_size=48 --epochs=1 --decay_steps=150 --warmup_steps=20 --lr=1.5e-3 --adam_lr=1.5e-3)
if [ "${SMOKE:-}" ]; then
    size=(--size=small --seq_len=16 --batch_size=2 --repeats=1 --warmup=0 --compile=False --device=cpu --new_tokens=4 --batches=1,2)
    model=(--dim=32 --n_layers=1 --n_heads=2 --batch_size=2 --max_steps=4 --decay_steps=2 --warmup_steps=1 --eval_every=4
           --eval_tokens=1000 --compile=False --device=cpu)
    sft=(--batch_size=1 --max_steps=3 --decay_steps=1 --warmup_steps=1 --eval_rows=2 --compile=False --device=cpu)
fi

part doctor 60 python -m tools.doctor
part decode 120 python runs/gpu_check.py decode
part step 150 python runs/gpu_check.py step
compiled=(--vs_compile=True)
[ "${SMOKE:-}" ] && compiled=()
part train 150 python -m tools.bench train "${size[@]}" "${compiled[@]}"
part generate 150 python -m tools.bench generate "${size[@]}"
if [ -f data/poems/meta.json ] && [ -f data/poems-sft/meta.json ]; then
    part pretrain 120 python pretrain.py config/poems.py --out_dir="$out/model" --resume=False --log_every=100 "${model[@]}"
    part sft 60 python sft.py config/poems_sft.py --init_from="$out/model" --out_dir="$out/model-sft" --resume=False "${sft[@]}"
    part export 60 python -m tools.export "$out/model-sft" --to=hf --out="$out/hf-$(date +%s)"
    rm -rf "$out"/model*/*.pt "$out"/hf-*
fi
exit $failed
