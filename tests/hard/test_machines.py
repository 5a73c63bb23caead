"""What machines need: decoding as it is recorded for a GPU, processes that do not see the same folder, settings of
kernels. What only a GPU can show is in runs/gpu_check.sh."""
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import pretrain
from common import decode_graph, generate as generate_file
from common.checkpoint import find
from common.distributed import start
from common.generate import generate
from conftest import ROOT
from oracles import KINDS, V, random_model, their_names
from tools import to_hf
from tools.from_hf import open_weights

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [5], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]]
HOW = [
    dict(temperature=0),
    dict(seed=3),
    dict(temperature=0.7, top_k=9, seed=4),
    dict(top_p=0.8, seed=5),
    dict(min_p=0.05, repetition_penalty=1.3, seed=6),
    dict(temperature=0, repetition_penalty=1.4),
    dict(seed=7, stop_ids=[3, 11, 17, 23, 31, 45]),
    dict(seed=8, stop_ids=range(0, V, 9)),
    dict(temperature=0, pad_id=44)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW, ids=lambda how: ",".join(how))
def test_recorded_steps_write_the_same_answers(kind, how, monkeypatch):
    """The steps that a GPU records, run as they are on a CPU, against generate(): cache of fixed shape and mask against
    a growing one, ended rows that go on unheard against rows that leave."""
    model = random_model(kind, 1)
    expected = generate(model, PROMPTS, 24, **how)
    shown = [[] for _ in expected]

    def on_token(ids):
        for row, token in zip(shown, ids, strict=True):
            row += [] if token is None else [token]

    monkeypatch.setattr(generate_file, "can_record", lambda model: True)
    assert generate(model, PROMPTS, 24, **how) == expected
    monkeypatch.setattr(decode_graph, "LOOK", 1)
    assert generate(model, PROMPTS, 24, on_token=on_token, **how) == expected == shown


def test_weights_in_several_files(tmp_path, monkeypatch):
    """Files no larger than the limit, an index of what lies where, and every tensor read back as it was."""
    weights = their_names(random_model("llama", 1))
    monkeypatch.setattr(to_hf, "FILE_BYTES", 20_000)
    to_hf.write_safetensors(str(tmp_path), "model.safetensors", weights)
    with open(tmp_path / "model.safetensors.index.json") as f:
        index = json.load(f)
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        part = safetensors.torch.load_file(tmp_path / file)
        assert {index["weight_map"][name] for name in part} == {file}
        assert len(part) == 1 or sum(w.nbytes for w in part.values()) <= 20_000
    names, read = open_weights(str(tmp_path))
    assert names == weights.keys() and all(torch.equal(read(name), weight) for name, weight in weights.items())


@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_that_find_different_checkpoints_stop(tmp_path, processes):
    """Where out_dir is local to a machine, rank 0 alone finds a checkpoint: all end with one sentence, and do not train
    different models together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"})
    assert done.returncode != 0
    assert "error: rank 0 finds step 2 in" in done.stderr and "one folder that all machines share" in done.stderr
    assert "trained" not in done.stdout


def find_apart(folder):
    """A process of that test: only rank 0's folder holds a checkpoint."""
    rank = os.environ["RANK"]
    cfg = pretrain.Config(device="cpu", out_dir=f"{folder}/{rank}")
    env = start(cfg, "float32")
    model = random_model("llama")
    if rank == "0":
        os.makedirs(cfg.out_dir)
        torch.save({"stage": "pretrain", "step": 2, "model": {}, "model_config": {}, "fingerprint": ""},
                   f"{cfg.out_dir}/ckpt.pt")
    torch.distributed.barrier()
    find("pretrain", pretrain.SAME, cfg, env, model, None)
    print("trained")


def run_here(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env={**os.environ, "SMOKE": "1", "OMP_NUM_THREADS": "1"})


def test_doctor_names_what_there_is():
    """Device, dtype, compiler, memory, disk, packages; what is missing stands in a line of its own."""
    done = run_here(sys.executable, "-m", "tools.doctor")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert {"system", "torch", "device", "matmuls", "compiler", "cores", "memory", "disk", "packages"} <= lines.keys()
    assert lines["torch"] == torch.__version__ and f"numpy {__import__('numpy').__version__}" in lines["packages"]
    hidden = "import importlib.util as u, runpy; find = u.find_spec; u.find_spec = lambda name: " \
             "None if name == 'sentencepiece' else find(name); runpy.run_module('tools.doctor', run_name='__main__')"
    assert "missing    sentencepiece: nothing that reads" in run_here(sys.executable, "-c", hidden).stdout


@pytest.mark.parametrize("part", ["decode", "step"])
def test_the_gpu_check_runs(part):
    """Its own parts, in tiny shapes on a CPU; the rest of gpu_check.sh calls tools that have tests."""
    done = run_here(sys.executable, "runs/gpu_check.py", part)
    assert done.returncode == 0, done.stderr[-2000:]
    if part == "decode":
        assert done.stdout.count("6 of 6 answers equal") == 5
    else:
        assert done.stdout.count("tokens/s") == 4


if __name__ == "__main__":
    find_apart(sys.argv[1])
