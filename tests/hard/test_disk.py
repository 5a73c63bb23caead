"""Files cut short, foreign or full of zeros, a disk without room, kill -9 while saving: nothing whole is ever lost."""
import dataclasses
import io
import math
import os
import resource
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT
from small_runs import CPU, assert_same, run, settings
from test_checkpoint import a_run, contents, go_on, other_tokenizer, refuses, save_run, tokenizer  # noqa: F401 (fixtures)

import pretrain
from common.checkpoint import load_checkpoint, load_model, load_reward_model, log
from configurator import changed


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + Evil.marker,)


def bytes_of(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def a_zip():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", "no weights here")
    return stream.getvalue()


FOREIGN = {"empty": lambda: b"", "text": lambda: "床前明月光\n".encode() * 50, "zip": a_zip,
           "code": lambda: bytes_of({"model": Evil()}), "state dict": lambda: bytes_of({"w": torch.zeros(3)}),
           "list": lambda: bytes_of([1, 2]), "tensor": lambda: bytes_of(torch.zeros(2)),
           "other project": lambda: bytes_of({"model": {}, "optimizer": {}, "iter_num": 5})}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_gets_one_sentence_and_runs_no_code(tmp_path, kind):
    Evil.marker = str(tmp_path / "ran")
    path = tmp_path / "ckpt.pt"
    path.write_bytes(FOREIGN[kind]())
    for load in (load_checkpoint, load_model, load_reward_model):
        with pytest.raises(SystemExit) as left:
            load(str(path))
        message = str(left.value)
        assert message.startswith(f"error: {path} ") and "\n" not in message and len(message) < 200 + len(str(path))
        assert "cannot be read as a checkpoint" in message or "is not a checkpoint of this project" in message
    assert not os.path.exists(Evil.marker)


def test_a_checkpoint_cut_short_gets_one_sentence(place, tmp_path):
    with open(f"{place[0]}/base/ckpt.pt", "rb") as f:
        whole = f.read()
    path = tmp_path / "ckpt.pt"
    for n in (1, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(SystemExit) as left:
            load_checkpoint(str(tmp_path))
        assert f"{path} cannot be read as a checkpoint" in str(left.value) and "\n" not in str(left.value)


# ---------------------------------------------------------------------------- a full disk


# One process imports torch once and forks a child a size of the disk; each ends as a script would.
FULL_DISK = """
import os, resource, sys, torch
from common.checkpoint import load_checkpoint, save_checkpoint
from configurator import run
from dataclasses import dataclass

@dataclass
class Config:
    path: str = ""

def main(cfg):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    save_checkpoint(cfg.path, {**old, "model": {f"w{i}": torch.ones(100_000) for i in range(4)}})

torch.set_num_threads(1)
old = {"stage": "pretrain", "model_config": {}, "fingerprint": "", "model": {"w": torch.zeros(100)}}
save_checkpoint(sys.argv[1].partition("=")[2], old)
for room in (0, 10, 5_000, 700_000, 1_600_000):
    child = os.fork()
    if child == 0:
        run(main, Config)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(room, "ended with", status, file=sys.stderr, flush=True)
"""


def test_a_save_that_fails_leaves_the_old_checkpoint_and_one_line(tmp_path):
    path = tmp_path / "run" / "ckpt.pt"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, f"--path={path}"], cwd=ROOT, capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 0 and done.stdout == "", done
    lines = done.stderr.splitlines()
    assert lines[1::2] == [f"{room} ended with 1" for room in (0, 10, 5_000, 700_000, 1_600_000)], done.stderr
    for line in lines[::2]:
        assert line.startswith(f"error: cannot write {path} (") and "What was there before is whole" in line
    assert load_checkpoint(str(path))["model"]["w"].tolist() == [0.0] * 100
    assert os.listdir(tmp_path / "run") == ["ckpt.pt"]


def small_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_a_full_disk_costs_the_last_steps_only(place, tmp_path):
    """The save fails: one line, exit code 1, the checkpoint before it is whole, and with room again the run goes on."""
    cfg = settings(place[0], "pretrain", str(tmp_path), max_steps=2, eval_every=1)
    before, _ = run(cfg)
    longer = dataclasses.replace(cfg, max_steps=4)
    arguments = [f"--{k}={v}" for k, v in changed(longer).items()]
    done = subprocess.run([sys.executable, "pretrain.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=100, preexec_fn=small_disk)
    assert done.returncode == 1, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: cannot write {cfg.out_dir}/"), done.stderr
    assert_same(load_checkpoint(cfg.out_dir), before)
    assert [r["step"] for r in run(longer)[1]] == [1, 2, 3, 4]


# ---------------------------------------------------------------------------- kill -9


# One process imports torch once and forks children; each saves two checkpoints in turn until it is killed.
KILL_LOOP = """
import os, random, signal, sys, time, torch
from common.checkpoint import load_checkpoint, save_checkpoint
torch.set_num_threads(1)
path, rounds = sys.argv[1], int(sys.argv[2])
two = [{"step": step, "model": {f"w{i}": torch.full((30_000,), float(step)) for i in range(8)},
        "stage": "pretrain", "model_config": {}, "fingerprint": ""} for step in (1, 2)]
save_checkpoint(path, two[0])
t = time.perf_counter()
save_checkpoint(path, two[0])
takes = time.perf_counter() - t
random.seed(0)
cut = 0
seen = set()
for r in range(rounds):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(told, b"x")
        for i in range(10**6):
            save_checkpoint(path, two[(r + i) % 2])
        os._exit(0)
    os.read(ready, 1)
    time.sleep(random.uniform(0, 3 * takes))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(told)
    cut += os.path.exists(path + ".tmp")
    back = load_checkpoint(path)
    assert back["step"] in (1, 2), back["step"]
    assert len(back["model"]) == 8
    assert all(w.shape == (30_000,) and (w == back["step"]).all() for w in back["model"].values()), "mixed"
    seen.add(back["step"])
print(cut, len(seen))
"""


def test_kill_9_while_saving_loses_nothing(tmp_path):
    path = str(tmp_path / "run" / "ckpt.pt")
    done = subprocess.run([sys.executable, "-c", KILL_LOOP, path, "40"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100)
    assert done.returncode == 0, done.stderr
    cut, seen = map(int, done.stdout.split())
    assert cut >= 5, f"only {cut} kills fell into a save: the test tests nothing"
    assert seen == 2


@pytest.mark.parametrize("torn", ['{"step": 8, "lo', '{"step": 8, "loss": 1.0}\n', "", "\0" * 9, None])
def test_the_log_goes_on_from_the_checkpoint(tmp_path, tokenizer, torn):
    """Steps that will be done again leave the log, also where a kill has cut it; a run begun anew begins its log anew."""
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    log(cfg, CPU, 6, {"loss": 1.0})
    save_run(pretrain, cfg, model, optimizers, tokenizer, 7)
    path = tmp_path / "log.jsonl"
    before = path.read_bytes()
    if torn is None:
        path.write_bytes(before[:5])  # the end of a log is not flushed to the disk as checkpoints are
        before = before[:5]
    else:
        path.write_bytes(before + torn.encode())
    assert go_on(pretrain, cfg, model, optimizers, tokenizer) == 7 and path.read_bytes() == before
    assert go_on(pretrain, dataclasses.replace(cfg, resume=False), model, optimizers, tokenizer) == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize("where", ["model", "critic"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, tokenizer, where):
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    before = contents(tmp_path)
    extra = {"critic": {"head.bias": torch.tensor([math.nan])}} if where == "critic" else {}
    if where == "model":
        model.norm.weight.data[3] = math.inf
    refuses(lambda: save_run(pretrain, cfg, model, optimizers, tokenizer, 8, **extra),
            "after step 8 not all weights are finite", "Lower --lr")
    assert contents(tmp_path) == before


def test_the_tokenizer_beside_a_checkpoint_is_the_one_it_was_trained_with(tmp_path, tokenizer, other_tokenizer):
    """Also after a start with other data in the same folder, and where a full disk has left half of it."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.data[:100])
    for tok in (tokenizer, other_tokenizer, other_tokenizer):
        a_run(tmp_path, tok)
        assert (tmp_path / "tokenizer.model").read_bytes() == tok.data
