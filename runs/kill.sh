#!/usr/bin/env bash
# Kill every stage at random moments, go on, and compare with a run that nobody disturbed: the weights must be equal bit
# for bit.
#     bash runs/kill.sh [kills]        1,000 take about 90 minutes on 2 CPU cores
# Everything is written to a temporary folder and removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
kills=${1:-1000}
[ -d .venv ] && . .venv/bin/activate
export OMP_NUM_THREADS=1
python - "$PWD" "$kills" <<'PYTHON'
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

import torch

root, kills = sys.argv[1], int(sys.argv[2])
folder = tempfile.mkdtemp()
os.chdir(folder)
rng = random.Random(0)
WORDS = "春夏秋冬山水花鸟云月风雨竹松石溪桥舟"
MACHINE = ["--device=cpu", "--seed=1"]
SHORT = ["--max_steps=8", "--warmup_steps=1", "--eval_every=1", *MACHINE]
FP32 = ["--dtype=float32"]
STAGES = {
    "pretrain": ["--data_dir=data/base", "--dim=32", "--n_layers=2", "--n_heads=2", "--max_seq_len=96", "--batch_size=4",
                 "--eval_tokens=400", "--optimizer=muon", "--compile=False", *FP32, *SHORT],
    "sft": ["--data_dir=data/sft", "--init_from=out/pretrain", "--batch_size=4", "--seq_len=64", "--eval_rows=4",
            "--compile=False", *FP32, *SHORT],
    "reward": ["--data_dir=data/pairs", "--init_from=out/sft", "--batch_size=4", "--eval_prompts=4", *FP32, *SHORT],
    "ppo": ["--data_dir=data/prompts", "--init_from=out/sft", "--reward_from=out/reward", "--batch_size=4",
            "--max_new_tokens=8", "--eval_prompts=2", *SHORT],
    "dpo": ["--data_dir=data/pairs", "--init_from=out/sft", "--batch_size=4", "--eval_prompts=4", *FP32, *SHORT],
}


def sentence():
    return "".join(rng.choice(WORDS) for _ in range(16)) + "。"


def write(name, records):
    with open(f"{name}.jsonl", "w", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


def start(script, *words):
    return subprocess.Popen([sys.executable, f"{root}/{script}.py", *words], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finish(script, *words):
    process = start(script, *words)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def weights(run):
    checkpoint = torch.load(f"out/{run}/ckpt.pt", weights_only=True)
    return {**checkpoint["model"], **{f"critic {k}": v for k, v in checkpoint.get("critic", {}).items()}}


write("base", ({"text": sentence() + sentence()} for _ in range(300)))
write("sft", ({"instruction": f"{i}？", "output": sentence()} for i in range(80)))
write("pairs", ({"prompt": f"{i}？", "chosen": sentence(), "rejected": "不" * 4} for i in range(80)))
write("prompts", ({"prompt": f"{i}？"} for i in range(400)))
finish("prepare", "base", "--input=base.jsonl", "--vocab_size=400", "--workers=1", "--val_fraction=0.05")
for kind in ("sft", "pairs", "prompts"):
    finish("prepare", kind, f"--input={kind}.jsonl", f"--kind={kind}", "--tokenizer=data/base", "--workers=1",
           "--val_fraction=0.05")

for stage, words in STAGES.items():
    finish(stage, f"--out_dir=out/{stage}", *words)

counts = collections.Counter()
round_number = 0
while counts["kills"] < kills:
    stage = list(STAGES)[round_number % len(STAGES)]
    run = f"{stage}-{round_number}"
    round_number += 1
    # four kills, each some milliseconds after a step was logged: in its save, in the next step, in a measurement
    for number in range(4):
        process = start(stage, f"--out_dir=out/{run}", *STAGES[stage])
        for line in process.stdout:
            if line.startswith(f"step {2 * number + rng.randint(0, 1)}/"):
                break
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        counts["kills"] += 1
        counts["kills before the first checkpoint"] += not os.path.exists(f"out/{run}/ckpt.pt")
        counts["kills that left a half-written file"] += os.path.exists(f"out/{run}/ckpt.pt.tmp")
    finish(stage, f"--out_dir=out/{run}", *STAGES[stage])
    ours, theirs = weights(run), weights(stage)
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    counts["runs equal bit for bit" if equal else "runs that DIFFER"] += 1
    counts[f"{stage} runs"] += 1
    shutil.rmtree(f"out/{run}")
    half = counts["kills that left a half-written file"]
    print(f"\r{counts['kills']} kills, {half} of them in a save, {counts['runs that DIFFER']} runs differ", end="",
          file=sys.stderr, flush=True)
print()
for name, n in counts.items():
    print(f"{n:>6} {name}")
shutil.rmtree(folder)
sys.exit(counts["runs that DIFFER"] > 0)
PYTHON
