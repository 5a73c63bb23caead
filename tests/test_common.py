"""common.py: the order of rows, learning rates, data folders, optimizers, gradients, checkpoints, the log."""
import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import V, random_model

import common
from common import (Env, all_sum, collate, load_checkpoint, log, lr_at, make_optimizers, micro_steps, newest_run,
                    no_grad_eval, open_data, optimizer_step, save_checkpoint, set_lr, shuffled, start, trim_log)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALONE = Env(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------- order of rows


@settings(max_examples=100, deadline=None, derandomize=True)
@given(n=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_every_epoch_visits_every_row_once(n, seed):
    order = shuffled(n, 0, 3 * n, seed)
    for epoch in range(3):
        assert sorted(order[epoch * n:(epoch + 1) * n]) == list(range(n))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(n=st.integers(1, 100), first=st.integers(0, 1000), count=st.integers(1, 50), seed=st.integers(0, 1000))
def test_the_order_depends_on_the_place_alone(n, first, count, seed):
    """Any stretch, taken in one piece or several, from anywhere, is the same piece of one endless sequence."""
    assert shuffled(n, first, count, seed).tolist() == shuffled(n, 0, first + count, seed)[first:].tolist()


def test_the_order_changes_with_epoch_and_seed():
    epochs = shuffled(1000, 0, 3000, 1).reshape(3, 1000)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], shuffled(1000, 0, 1000, 2))
    starts = Counter(int(shuffled(10, 0, 1, seed)[0]) for seed in range(2000))
    assert all(130 < starts[i] < 270 for i in range(10)), starts  # 200 each, standard deviation 13
    assert shuffled(2**40, 5, 3, 0).dtype == np.int64 and (shuffled(2**40, 5, 3, 0) >= 0).all()


def test_collate_by_hand():
    documents = [(np.array([7, 8, 9, 4]), np.array([0, 0, 1, 1])), (np.array([5, 6]), np.array([0, 1]))]
    ids, targets, mask = collate(documents, pad_id=3)
    assert ids.tolist() == [[7, 8, 9], [5, 6, 3]]
    assert targets.tolist() == [[8, 9, 4], [6, 3, 3]]
    assert mask.tolist() == [[0, 1, 1], [1, 0, 0]]  # 1 where the target is to be learned
    assert ids.dtype == targets.dtype == torch.int64 and mask.dtype == torch.float32


# ---------------------------------------------------------------------------- learning rate


def test_cosine_by_hand():
    cfg = SimpleNamespace(lr=1.0, min_lr=0.1, warmup_steps=4, max_steps=12, schedule="cosine", decay_steps=0)
    got = [lr_at(step, cfg) for step in range(14)]
    assert got[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]      # the last warmup step and the first of the cosine are the peak
    assert got[8] == pytest.approx(0.55)               # halfway down
    assert got[6] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert got[11] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 7 / 8)))
    assert got[12] == pytest.approx(0.1) and got[13] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(got[4:], got[5:13]))


def test_wsd_by_hand():
    cfg = SimpleNamespace(lr=1.0, min_lr=0.2, warmup_steps=2, max_steps=10, schedule="wsd", decay_steps=4)
    assert [lr_at(step, cfg) for step in range(11)] == pytest.approx([.5, 1, 1, 1, 1, 1, 1, .8, .6, .4, .2])
    cfg.decay_steps = 0
    assert [lr_at(step, cfg) for step in range(2, 10)] == [1.0] * 8
    cfg.warmup_steps = 0
    assert lr_at(0, cfg) == 1.0


def test_unknown_schedule_is_refused_at_the_first_step():
    cfg = SimpleNamespace(lr=1.0, min_lr=0.2, warmup_steps=5, max_steps=10, schedule="cosin", decay_steps=4)
    with pytest.raises(SystemExit, match="schedule='cosin', known are cosine and wsd"):
        lr_at(0, cfg)


# ---------------------------------------------------------------------------- data folders


@pytest.fixture
def folder(tmp_path):
    """A data folder of two documents for training and one for validation, with masks, offsets and groups."""
    path = tmp_path / "data" / "talk"
    path.mkdir(parents=True)
    meta = {"kind": "sft", "dtype": "uint16", "fingerprint": "f" * 64, "vocab_size": 300}
    for split, ids, idx in (("train", [1, 2, 3, 65535, 5], [0, 3, 5]), ("val", [9, 8], [0, 2])):
        np.array(ids, "<u2").tofile(path / f"{split}.bin")
        np.array([i % 2 for i in range(len(ids))], np.uint8).tofile(path / f"{split}.mask")
        np.array(idx, np.int64).tofile(path / f"{split}.idx")
        np.arange(len(idx) - 1, dtype=np.int32).tofile(path / f"{split}.group")
        meta[split] = {"tokens": len(ids), "documents": len(idx) - 1, "bytes": 10}
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def test_open_data(folder):
    train, val, meta = open_data(str(folder), "sft", "f" * 64)
    assert train.tokens.tolist() == [1, 2, 3, 65535, 5] and val.tokens.tolist() == [9, 8]
    assert isinstance(train.tokens, np.memmap)  # never read whole
    assert len(train) == 2 and len(val) == 1
    ids, mask = train.document(1)
    assert ids.tolist() == [65535, 5] and ids.dtype == np.int64 and mask.tolist() == [1, 0]
    assert train.group.tolist() == [0, 1] and train.meta["bytes"] == 10 and meta["vocab_size"] == 300
    open_data(str(folder))  # kind and fingerprint are checked where they are given


def test_open_data_without_masks_and_offsets(folder):
    for split in ("train", "val"):
        for ending in ("mask", "idx", "group"):
            os.remove(folder / f"{split}.{ending}")
    train, val, _ = open_data(str(folder), "sft")
    assert train.mask is None and train.idx is None and train.group is None and len(train.tokens) == 5


def test_open_data_wide_and_empty(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["dtype"] = "uint32"
    np.array([1, 2, 3, 70000, 5], "<u4").tofile(folder / "train.bin")
    np.array([], "<u4").tofile(folder / "val.bin")
    np.array([0], np.int64).tofile(folder / "val.idx")
    for ending in ("mask", "group"):
        (folder / f"val.{ending}").write_bytes(b"")
    meta["val"].update(tokens=0, documents=0)
    (folder / "meta.json").write_text(json.dumps(meta))
    train, val, _ = open_data(str(folder))
    assert train.tokens.tolist() == [1, 2, 3, 70000, 5] and len(val) == 0 and len(val.tokens) == 0


def leaves(*args):
    with pytest.raises(SystemExit) as left:
        open_data(*args)
    assert str(left.value).startswith("error: ")
    return str(left.value)


@pytest.mark.parametrize("ending, size", [("train.bin", 10), ("val.bin", 4), ("train.mask", 5), ("train.idx", 24),
                                          ("train.group", 8)])
def test_open_data_cut_short_or_grown(folder, ending, size):
    """Each file one byte too short, and too long: the message names the file and both sizes."""
    path = folder / ending
    data = path.read_bytes()
    for changed in (data[:-1], data + b"\0", b""):
        path.write_bytes(changed)
        message = leaves(str(folder))
        assert str(path) in message and f"has {len(changed)} bytes, meta.json says {size}" in message


def test_open_data_missing_things(folder, tmp_path):
    os.remove(folder / "train.bin")
    assert f"{folder}/train.bin is missing" in leaves(str(folder))
    os.remove(folder / "meta.json")  # an interrupted prepare leaves no meta.json: the folder counts as not there
    message = leaves(str(folder), "sft")
    assert str(folder) in message and "python prepare.py talk --input=FILE_OR_FOLDER --kind=sft" in message
    message = leaves(str(tmp_path / "baby") + "/", "text")
    assert "python prepare.py baby --input=" in message and "--data_dir=data/poems" in message


def test_open_data_of_another_kind_or_tokenizer(folder):
    message = leaves(str(folder), "text")
    assert "kind sft" in message and "reads text" in message
    message = leaves(str(folder), "sft", "e" * 64)
    assert "f" * 12 in message and "e" * 12 in message and "tokenizer" in message


# ---------------------------------------------------------------------------- processes


def test_micro_steps_are_shared_evenly():
    for world in (1, 2, 3, 4):
        env = [Env(rank, world, torch.device("cpu"), torch.float32) for rank in range(world)]
        shares = [list(micro_steps(12, e)) for e in env]
        assert sorted(sum(shares, [])) == list(range(12)) and {len(s) for s in shares} == {12 // world}
    with pytest.raises(SystemExit, match="grad_accum=3 must be a multiple of the 2 processes.*Try --grad_accum=2"):
        micro_steps(3, Env(0, 2, torch.device("cpu"), torch.float32))


def test_all_sum_alone():
    assert all_sum([torch.tensor(1.5), 2, True], ALONE) == [1.5, 2.0, 1.0]


def test_start_prints_what_was_changed(capsys, monkeypatch):
    import pretrain
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    env = start(pretrain.Config(device="cpu", dtype="float32", lr=0.5))
    out = capsys.readouterr().out
    assert env.main and env.world == 1 and env.dtype == torch.float32 and env.device.type == "cpu"
    assert "lr=0.5" in out and "device=cpu" in out and "weight_decay" not in out
    first = torch.rand(1)
    start(pretrain.Config(device="cpu"))
    assert torch.equal(first, torch.rand(1))  # seeded


# ---------------------------------------------------------------------------- optimizers


def adamw(**changes):
    return SimpleNamespace(**{**dict(optimizer="adamw", lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95), **changes})


def names(model, params):
    of = {id(p): name for name, p in model.named_parameters()}
    return {of[id(p)] for p in params}


def test_adamw_decays_matrices_only():
    model = random_model("dots1")
    (optimizer,) = make_optimizers(model, adamw())
    decay, rest = optimizer.param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert decay["betas"] == (0.9, 0.95)
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert names(model, decay["params"]) == matrices and "blocks.1.ffn.gate_up" in matrices
    assert names(model, rest["params"]) == {name for name, _ in model.named_parameters()} - matrices
    assert all("norm" in name for name in names(model, rest["params"]))
    qwen = random_model("qwen2")
    (optimizer,) = make_optimizers(qwen, adamw())
    assert "blocks.0.attn.qkv.bias" in names(qwen, optimizer.param_groups[1]["params"])


def test_muon_takes_the_matrices_of_the_blocks():
    model = random_model("dots1")
    adam, muon = make_optimizers(model, adamw(optimizer="muon"))
    assert isinstance(muon, torch.optim.Muon) and isinstance(adam, torch.optim.AdamW)
    taken = names(model, muon.param_groups[0]["params"])
    assert taken == {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")}
    left = set().union(*(names(model, g["params"]) for g in adam.param_groups))
    assert left | taken == {name for name, _ in model.named_parameters()} and not left & taken
    assert {"embed.weight", "lm_head.weight", "blocks.1.ffn.gate_up", "norm.weight"} <= left
    set_lr([adam, muon], 0.25)
    assert {g["lr"] for o in (adam, muon) for g in o.param_groups} == {0.25}


def test_frozen_parameters_are_left_out():
    model = random_model("llama")
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("blocks.1")
    (optimizer,) = make_optimizers(model, adamw())
    assert all(name.startswith("blocks.1") for g in optimizer.param_groups for name in names(model, g["params"]))
    with pytest.raises(SystemExit, match="optimizer='sgd', known are adamw and muon"):
        make_optimizers(model, adamw(optimizer="sgd"))


def test_one_adamw_step_by_hand():
    """First step of AdamW: p (1 - lr wd) - lr g / |g| (both moments are the gradient's own, bias-corrected)."""
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(0.5)
    optimizers = make_optimizers(layer, adamw(lr=0.1, weight_decay=0.5))
    (layer.weight * torch.tensor([[3.0, -4.0]])).sum().backward()
    layer.bias.grad = torch.tensor([12.0])
    norm = optimizer_step(layer, optimizers, torch.amp.GradScaler("cpu", enabled=False), 1.0)
    assert norm == pytest.approx(13.0)  # before clipping: sqrt(9 + 16 + 144)
    assert layer.weight[0].tolist() == pytest.approx([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1], abs=1e-5)
    assert layer.bias.item() == pytest.approx(0.5 - 0.1, abs=1e-5)  # no decay
    assert layer.weight.grad is None


@pytest.mark.parametrize("clip, factor", [(1.0, 1 / 13), (26.0, 1.0), (0, 1.0)])
def test_clipping(clip, factor):
    layer = torch.nn.Linear(3, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, -4.0, 12.0]])
    before = layer.weight.detach().clone()
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    assert optimizer_step(layer, [sgd], torch.amp.GradScaler("cpu", enabled=False), clip) == pytest.approx(13.0)
    assert (before - layer.weight)[0].tolist() == pytest.approx([3 * factor, -4 * factor, 12 * factor], abs=1e-5)


def test_no_grad_eval_comes_back():
    model = random_model("llama").train()
    with no_grad_eval(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()


# ---------------------------------------------------------------------------- checkpoints


def test_checkpoint_round_trip(tmp_path):
    tokenizer = tmp_path / "source.model"
    tokenizer.write_bytes(b"one")
    path = str(tmp_path / "out" / "run" / "ckpt.pt")
    model = random_model("dots1")
    checkpoint = {"stage": "pretrain", "step": 7, "model": model.state_dict(), "model_config": model.config.__dict__,
                  "best_val": math.inf}
    save_checkpoint(path, checkpoint, str(tokenizer))
    assert sorted(os.listdir(tmp_path / "out" / "run")) == ["ckpt.pt", "tokenizer.model"]  # nothing temporary is left
    for place in (path, str(tmp_path / "out" / "run")):
        back = load_checkpoint(place)
        assert back["step"] == 7 and back["best_val"] == math.inf
    again = common.model_from(back)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    ids = torch.randint(0, V, (1, 9))
    assert torch.equal(again.eval()(ids), model(ids))


def test_the_tokenizer_beside_a_checkpoint_is_the_one_it_was_trained_with(tmp_path):
    """Starting again in the same folder with other data must not leave the old tokenizer there."""
    tokenizer, path = tmp_path / "source.model", str(tmp_path / "run" / "ckpt.pt")
    for content in (b"one", b"two", b"two"):
        tokenizer.write_bytes(content)
        save_checkpoint(path, {"step": 1}, str(tokenizer))
        assert (tmp_path / "run" / "tokenizer.model").read_bytes() == content


def test_a_checkpoint_that_lacks_or_adds_a_weight_is_refused():
    model = random_model("llama")
    for change in (lambda w: w.pop("norm.weight"), lambda w: w.update(extra=torch.zeros(1))):
        weights = model.state_dict()
        change(weights)
        with pytest.raises(RuntimeError, match="norm.weight|extra"):
            common.model_from({"model_config": model.config.__dict__, "model": weights})


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + Evil.marker,)


def test_a_checkpoint_cannot_run_code(tmp_path):
    Evil.marker = str(tmp_path / "ran")
    path = str(tmp_path / "ckpt.pt")
    torch.save({"model": Evil()}, path)
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(path)
    assert not os.path.exists(Evil.marker)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match="no checkpoint at"):
        load_checkpoint(str(tmp_path))


# One process imports torch once and forks children; each saves two checkpoints in turn until it is killed.
KILL_LOOP = """
import os, random, signal, sys, time, torch
from common import load_checkpoint, save_checkpoint
torch.set_num_threads(1)
path, rounds = sys.argv[1], int(sys.argv[2])
two = [{"step": step, "model": {f"w{i}": torch.full((30_000,), float(step)) for i in range(8)}} for step in (1, 2)]
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
    done = subprocess.run([sys.executable, "-c", KILL_LOOP, path, "60"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100)
    assert done.returncode == 0, done.stderr
    cut, seen = map(int, done.stdout.split())
    assert cut >= 5, f"only {cut} kills fell into a save: the test tests nothing"
    assert seen == 2


def test_newest_run(tmp_path):
    for i, (name, stage) in enumerate((("a", "pretrain"), ("b", "sft"), ("c", "reward"), ("d", None))):
        if stage:
            save_checkpoint(str(tmp_path / name / "ckpt.pt"), {"stage": stage})
            os.utime(tmp_path / name / "ckpt.pt", (1000 + i, 1000 + i))
        else:
            os.makedirs(tmp_path / name)  # a run that has saved nothing yet
    assert newest_run(str(tmp_path)) == str(tmp_path / "c")
    assert newest_run(str(tmp_path), ["pretrain", "sft"]) == str(tmp_path / "b")
    for root, stages in ((str(tmp_path), ["ppo"]), (str(tmp_path / "none"), None)):
        with pytest.raises(SystemExit, match="Train one first"):
            newest_run(root, stages)


# ---------------------------------------------------------------------------- log


def test_log_line_and_record(tmp_path, capsys):
    cfg = SimpleNamespace(out_dir=str(tmp_path / "run"), max_steps=50)
    record = {"loss": 1.23456, "lr": 3e-4, "norm": 12345.6, "mfu": 0.417, "left": 3725.9, "dropped_share": 0.05}
    log(cfg, ALONE, 7, record)
    line = capsys.readouterr().out
    assert line == "step 7/50 | loss 1.2346 | lr 3.00e-04 | norm 12,346 | mfu 42% | left 1h02m05s | dropped_share 5%\n"
    log(cfg, Env(1, 2, torch.device("cpu"), torch.float32), 8, record)  # other ranks are silent
    assert capsys.readouterr().out == ""
    log(cfg, ALONE, 8, {"loss": 1.0})
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 7, **record}, {"step": 8, "loss": 1.0}]


def test_trim_log(tmp_path):
    path = tmp_path / "log.jsonl"
    trim_log(str(tmp_path), 3)  # no log, no error
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 7)) + '{"step": 7, "lo')  # cut by a kill
    trim_log(str(tmp_path), 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_importing_has_no_side_effects():
    """Nothing is printed, started or written when a file is imported."""
    files = ["configurator", "model", "common", "pretrain"]
    code = f"import signal, torch; before = signal.getsignal(signal.SIGTERM)\nimport {', '.join(files)}\n" \
           "assert signal.getsignal(signal.SIGTERM) == before\n" \
           "assert not torch.distributed.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
