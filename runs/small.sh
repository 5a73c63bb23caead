#!/usr/bin/env bash
# A model of a useful size, 64 M parameters in the shape of minimind, from files that everybody uses, through all stages:
#   bash runs/small.sh FOLDER     FOLDER holds the files that MiniMind publishes (any that fit these names and fields):
#       pretrain*.jsonl {"text"}   sft*.jsonl {"conversations"}   dpo*.jsonl {"chosen", "rejected"}   rl*.jsonl {"conversations"}
#   DRY=1 bash runs/small.sh      a tiny shape on small files of those formats, made of learn/poems.txt: does every
#                                 stage run here? It says nothing of quality. 75 seconds on two cores
# Run again after an interruption: finished stages are skipped, unfinished ones go on. GPUS=4 for four GPUs.
set -euo pipefail
[ "${1:-}${DRY:-}" ] || { sed -n '2,7s/^# //p' "$0"; exit 1; }
folder=$(realpath "${1:-/nowhere}" 2> /dev/null || true)
source "$(dirname "$0")/setup.sh" requirements.txt
trap 'exit 130' INT
began=$(date +%s)
say() { echo; echo "=== [$(( ($(date +%s) - began) / 60 )) min] $*"; }
name=small vocab=6400 gpus=${GPUS:-1}
pretrain=() sft=(--seq_len=512 --batch_size=32 --grad_accum=4) reward=(--batch_size=16 --grad_accum=4 --max_steps=500)
dpo=(--batch_size=16 --grad_accum=4 --max_steps=500) grpo=(--batch_size=16 --grad_accum=4 --max_new_tokens=256 --max_steps=200)
if [ "${DRY:-}" ]; then
    name=small-dry vocab=2000 folder=data/raw/small-dry
    python runs/small_samples.py learn/poems.txt $folder
    dry=(--warmup_steps=2 --eval_every=10)
    pretrain=(--dim=64 --n_layers=2 --n_heads=4 --n_kv_heads=2 --hidden_dim=128 --max_seq_len=128 --batch_size=8
              --grad_accum=$gpus --max_steps=40 --log_every=10 --compile=False "${dry[@]}")
    sft=(--batch_size=8 --grad_accum=$gpus --max_steps=20 --compile=False "${dry[@]}")
    reward=(--batch_size=8 --grad_accum=$gpus --max_steps=10 --eval_prompts=32 "${dry[@]}")
    dpo=("${reward[@]}")
    grpo=(--batch_size=4 --grad_accum=$gpus --group_size=4 --max_new_tokens=16 --max_steps=4 --eval_prompts=8 --eval_every=4)
fi
stage() {  # STAGE.py SETTINGS…, in one process per GPU
    if [ "$gpus" -gt 1 ]; then torchrun --standalone --nproc_per_node="$gpus" "$@"; else python "$@"; fi
}
prepare() {  # NAME KIND FILES
    [ -f "data/$1/meta.json" ] || python prepare.py "$1" --kind="$2" --input="$folder/$3" "${@:4}"
}

say "1. data"
prepare $name text 'pretrain*.jsonl' --vocab_size=$vocab
prepare $name-sft sft 'sft*.jsonl' --tokenizer=data/$name --max_length=512
prepare $name-pairs pairs 'dpo*.jsonl' --tokenizer=data/$name --max_length=512
prepare $name-prompts prompts 'rl*.jsonl' --tokenizer=data/$name --max_length=256

say "2. pretraining"
python -m tools.estimate config/shapes/minimind.py --data_dir=data/$name "${pretrain[@]}"
stage pretrain.py config/shapes/minimind.py --data_dir=data/$name --out_dir=out/$name "${pretrain[@]}"

say "3. instruction tuning"
stage sft.py --data_dir=data/$name-sft --init_from=out/$name --out_dir=out/$name-sft --lr=3e-4 --min_lr=3e-5 \
    --questions="你是谁？|为什么天空是蓝色的？" "${sft[@]}"

say "4. DPO"
stage dpo.py --data_dir=data/$name-pairs --init_from=out/$name-sft --out_dir=out/$name-dpo "${dpo[@]}"

say "5. a reward model, and GRPO by it"
stage reward.py --data_dir=data/$name-pairs --init_from=out/$name-sft --out_dir=out/$name-reward "${reward[@]}"
stage grpo.py --data_dir=data/$name-prompts --init_from=out/$name-sft --reward_from=out/$name-reward \
    --out_dir=out/$name-grpo "${grpo[@]}"

say "6. bits per byte of a text, model beside model; then chat"
python -m tools.evaluate text --input=learn/poems.txt --runs=out/$name,out/$name-sft,out/$name-dpo,out/$name-grpo
for run in sft dpo grpo; do
    printf '你是谁？\n' | python sample.py --chat --out_dir=out/$name-$run --max_new_tokens=48
done

say "7. out to transformers and llama.cpp"
for to in hf gguf; do
    module=safetensors
    [ $to = gguf ] && module=gguf
    if python -c "import $module" 2> /dev/null; then
        [ -d out/$name-$to ] || python -m tools.export out/$name-dpo --to=$to --out=out/$name-$to
    else
        echo "note: pip install $module, and this script writes out/$name-$to as well"
    fi
done
say "done. Talk to it: .venv/bin/python sample.py --chat --out_dir=out/$name-grpo"
