"""
Compare settings of pretrain.py by runs of equal time: each is timed for 40 steps, then run for as many as fit.

    python runs/equal_time.py config/poems.py 120 "--lr=3e-3" "--lr=6e-3" "--dim=256 --n_heads=8"
"""
import json
import os
import subprocess
import sys
import tempfile


def run(config, words, steps, out):
    subprocess.run([sys.executable, "pretrain.py", config, *words, f"--max_steps={steps}", f"--out_dir={out}",
                    "--resume=False", "", "--eval_every=1000000", "--log_every=1"],
                   check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def main(config, seconds, *settings):
    print(f"{'settings':<60} {'steps':>6} {'tokens/s':>9} {'val bits/byte':>14}")
    for words in settings:
        with tempfile.TemporaryDirectory() as out:
            short = run(config, words.split(), 40, os.path.join(out, "short"))
            seconds_a_step = sorted(record["seconds"] for record in short)[20]
            log = run(config, words.split(), int(float(seconds) / seconds_a_step), os.path.join(out, "long"))
        rate = sorted(r["tok/s"] for r in log)[len(log) // 2]
        print(f"{words:<60} {len(log):>6} {rate:>9,.0f} {log[-1]['val_bits_per_byte']:>14.4f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
