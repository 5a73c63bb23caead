"""
Several runs, one after another, in the processes that torchrun has started: importing torch once costs seconds.

    torchrun --standalone --nproc_per_node=2 tests/hard/ranks.py RUNS.json

RUNS.json: [["pretrain", {setting: value}], ["copy", {"source": folder, "target": folder}], ["begin", {…}], ...]

Not a test file.
"""
import importlib
import json
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def run_in_ranks(processes, runs, file):
    """Do runs, a list of (stage, settings), in gloo processes; return what they printed."""
    with open(file, "w") as f:
        json.dump(runs, f)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["tests/hard/ranks.py", str(file)]
    path = os.pathsep.join([ROOT, f"{ROOT}/tests", f"{ROOT}/tests/hard"])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def main(path):
    import torch.distributed as dist

    def stay(cfg, env, step, hint=""):
        if env.lock:
            env.lock.close()
        dist.barrier()

    with open(path) as f:
        runs = json.load(f)
    for name, settings in runs:
        if name == "copy":
            if dist.get_rank() == 0:
                shutil.copytree(settings["source"], settings["target"])
            continue
        if name == "begin":
            importlib.import_module("test_sharding").begin(settings)
            continue
        stage = importlib.import_module(name)
        stage.finish = stay
        stage.main(stage.Config(**settings))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
