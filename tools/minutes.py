"""
How many minutes will the quickstart take on this machine? A two-second measurement of its training step.

    python -m tools.minutes
"""
import time

import torch

from common.distributed import start
from common.loss import cross_entropy
from configurator import run
from model import ModelConfig, Transformer
from pretrain import Config

# measured with this program and `bash runs/quickstart.sh` on idle cores: (seconds of a step, minutes of the quickstart)
MEASURED = (0.1, 13.0)
FIXED = 2.0  # of these minutes, what does not depend on the model: installing, downloading, preparing


def main(cfg):
    env = start(cfg, cfg.dtype, announce=False)
    model = Transformer(ModelConfig(6400, dim=128, n_layers=4, n_heads=2, qk_norm=True)).to(env.device)
    rows = torch.randint(6400, (16, 129), device=env.device)
    seconds = []
    began = time.perf_counter()
    while time.perf_counter() - began < 2 or len(seconds) < 3:
        step_began = time.perf_counter()
        with env.autocast():
            loss = cross_entropy(model(rows[:, :-1]), model.head_weight, rows[:, 1:])
        loss.backward()
        loss.item()
        seconds.append(time.perf_counter() - step_began)
    step = sorted(seconds)[len(seconds) // 2]
    minutes = FIXED + (MEASURED[1] - FIXED) * step / MEASURED[0]
    print(f"about {minutes:.0f} minutes on this machine ({1000 * step:.0f} ms for a training step, {str(env.dtype)[6:]}), "
          "if nothing else runs on it")


if __name__ == "__main__":
    run(main, Config)
