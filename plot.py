"""
Draw curves from log.jsonl.

    python plot.py out/poems --y=loss,val_loss
    python plot.py out/poems,out/poems-wide --y=val_bits_per_byte             # runs over each other
    python plot.py out/poems-ppo --x="sqrt(kl)" --y=score,watched --out=over.png

in:  out/<run>/log.jsonl
out: a PNG, one panel a field, one line a run
"""
import json
import math
import os
from dataclasses import dataclass

from configurator import load_config


@dataclass
class Config:
    runs: str = ""                 # folders, split at commas
    y: str = "loss,val_loss"       # fields of the log, one panel each
    x: str = "step"                # field on the horizontal axis; sqrt(…) is understood
    smooth: int = 1                # mean over this many records
    out: str = ""                  # the picture; empty: plot.png in the first run's folder


def read(run, x, y):
    """Return [(x, y)] of a run's records that have both fields."""
    path = os.path.join(run, "log.jsonl")
    if not os.path.isfile(path):
        raise SystemExit(f"error: no log at '{path}'")
    root = x.startswith("sqrt(")
    name = x[5:-1] if root else x
    with open(path, encoding="utf-8") as f:
        records = [record for record in map(json.loads, f) if name in record and y in record]
    return [(math.sqrt(max(0.0, r[name])) if root else r[name], r[y]) for r in records]


def main(cfg):
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("error: plot.py needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs, fields = [r for r in cfg.runs.split(",") if r], cfg.y.split(",")
    if not runs:
        raise SystemExit("error: name a run: python plot.py out/poems")
    figure, axes = plt.subplots(1, len(fields), figsize=(5 * len(fields), 4), squeeze=False)
    for axis, field in zip(axes[0], fields):
        for run in runs:
            points = read(run, cfg.x, field)
            if cfg.x != "step":
                points.sort()
            means = [tuple(sum(column) / len(column) for column in zip(*points[i:i + cfg.smooth]))
                     for i in range(0, len(points), cfg.smooth)]
            axis.plot(*zip(*means) if means else ((), ()), marker="." if len(means) < 60 else "", label=run)
        axis.set_xlabel(cfg.x)
        axis.set_title(field)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    out = cfg.out or os.path.join(runs[0], "plot.png")
    figure.savefig(out, dpi=110)
    print(out)


if __name__ == "__main__":
    main(load_config(Config, positional="runs"))
