#!/usr/bin/env bash
# Kill every stage at random moments, go on, and compare with a run that nobody disturbed: the weights must be equal bit
# for bit.
#     bash runs/kill.sh [kills]        1,000 take about half an hour on one CPU core
# Everything is written to a temporary folder and removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
kills=${1:-1000}
[ -d .venv ] && . .venv/bin/activate
export OMP_NUM_THREADS=1
python - "$PWD" "$kills" <<'PYTHON'
import collections
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback

import torch

root, kills = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, root)
SCRIPTS = {name: importlib.import_module(name) for name in ("prepare", "pretrain", "sft", "reward", "ppo", "dpo")}
from configurator import run

folder = tempfile.mkdtemp()
os.chdir(folder)
rng = random.Random(0)
WORDS = "春夏秋冬山水花鸟云月风雨竹松石溪桥舟"
MACHINE = ["--device=cpu", "--seed=1"]
SHORT = ["--max_steps=10", "--warmup_steps=1", "--eval_every=1", *MACHINE]
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
    """Run a script in a process of its own; return its number and what it prints, to be read. It is forked from this
    one, so that torch need not be imported again: that takes ten times as long as such a run."""
    output, end = os.pipe()
    sys.stderr.flush()
    process = os.fork()
    if process:
        os.close(end)
        return process, open(output, encoding="utf-8")
    status = 1
    try:
        sys.stdout = sys.stderr = open(end, "w", encoding="utf-8", buffering=1)
        sys.argv = [f"{script}.py", *words]
        run(SCRIPTS[script].main, SCRIPTS[script].Config, positional="name" if script == "prepare" else None)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)  # not back into the loop below


def finish(script, *words):
    process, output = start(script, *words)
    text = output.read()
    output.close()
    status = os.waitpid(process, 0)[1]
    assert status == 0, text


def weights(name):
    checkpoint = torch.load(f"out/{name}/ckpt.pt", weights_only=True)
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
    name = f"{stage}-{round_number}"
    round_number += 1
    # four kills, each some milliseconds after a step was logged: in its save, which follows, or in the next step
    for number in range(4):
        step = 2 * number + rng.randint(1, 2)
        process, output = start(stage, f"--out_dir=out/{name}", *STAGES[stage])
        for line in output:
            if line.startswith(f"step {step}/"):
                break
        time.sleep(rng.uniform(0, rng.choice((0.005, 0.05))))
        os.kill(process, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        output.close()
        if not killed:
            counts["runs that had ended before they were killed"] += 1
            break
        counts["kills"] += 1
        counts["kills before the first checkpoint"] += not os.path.exists(f"out/{name}/ckpt.pt")
        half_written = [file for file in os.listdir(f"out/{name}") if file.endswith(".tmp")]
        counts["kills that left a half-written file"] += bool(half_written)
    finish(stage, f"--out_dir=out/{name}", *STAGES[stage])
    ours, theirs = weights(name), weights(stage)
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    counts["runs equal bit for bit" if equal else "runs that DIFFER"] += 1
    counts[f"{stage} runs"] += 1
    shutil.rmtree(f"out/{name}")
    half = counts["kills that left a half-written file"]
    print(f"\r{counts['kills']} kills, {half} of them in a save, {counts['runs that DIFFER']} runs differ", end="",
          file=sys.stderr, flush=True)
print()
for what, n in counts.items():
    print(f"{n:>6} {what}")
shutil.rmtree(folder)
sys.exit(counts["runs that DIFFER"] > 0)
PYTHON
