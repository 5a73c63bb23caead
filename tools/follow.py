"""
Send a run's log to TensorBoard, Weights & Biases or SwanLab, while it trains or afterwards.

    python -m tools.follow out/poems --to=tensorboard          # then: tensorboard --logdir=out/poems/tensorboard
    python -m tools.follow out/poems --to=swanlab --wait=True  # goes on as long as the run does; Ctrl-C ends it

in:  out/<run>/log.jsonl, which every stage writes; training knows nothing of loggers and needs none
"""
import json
import os
import time
from dataclasses import dataclass
from typing import Literal

from configurator import check, run


@dataclass
class Config:
    run: str = ""         # folder of the run (the bare word)
    to: Literal["tensorboard", "wandb", "swanlab"] = "tensorboard"
    wait: bool = False    # True: keep looking for new lines


def open_logger(cfg):
    """Return a function (step, {name: number}) that hands a record to the logger."""
    name = os.path.basename(os.path.normpath(cfg.run))
    try:
        if cfg.to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(os.path.join(cfg.run, "tensorboard"))

            def send(step, record):
                for key, value in record.items():
                    writer.add_scalar(key, value, step)
                writer.flush()

            return send
        if cfg.to == "wandb":
            import wandb
            logger = wandb.init(project="mingyue", name=name, dir=cfg.run)
        else:
            import swanlab
            logger = swanlab.init(project="mingyue", experiment_name=name, logdir=os.path.join(cfg.run, "swanlog"))
    except ImportError as error:
        check(False, f"--to={cfg.to} needs a package: pip install {cfg.to} ({error})")
    return lambda step, record: logger.log(record, step=step)


def main(cfg):
    path = os.path.join(cfg.run, "log.jsonl")
    check(cfg.run and os.path.isfile(path), f"no log at '{path}': name a run, like python -m tools.follow out/poems")
    send = open_logger(cfg)
    sent = 0
    with open(path, encoding="utf-8") as f:
        while True:
            place = f.tell()
            line = f.readline()
            if line.endswith("\n"):
                record = json.loads(line)
                send(record.pop("step"), record)
                sent += 1
            elif cfg.wait:
                # nothing new, or half a line: look again from where it began
                f.seek(place)
                time.sleep(1)
            else:
                break
    print(f"{sent} records of {path} sent to {cfg.to}")


if __name__ == "__main__":
    run(main, Config, positional="run")
