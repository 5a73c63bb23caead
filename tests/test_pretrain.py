"""pretrain.py end to end, on a small data folder written here: resuming, processes, evaluation, and its errors."""
import dataclasses
import gc
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import pretrain
from common.checkpoint import load_checkpoint, load_model
from common.distributed import Env
from configurator import load_config
from common.data import Split, open_data
from common.generate import generate
from common.loss import cross_entropy
from model import ModelConfig, Transformer
from pretrain import Config, get_batch
from tokenizer import load_tokenizer, train_tokenizer
from tools import estimate

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALONE = Env(0, 1, torch.device("cpu"), torch.float32)
NUMBERS = "一二三四五六七八九十"


@pytest.fixture(autouse=True)
def quiet_process(monkeypatch):
    """One thread; the signal handlers that main() sets are taken back."""
    torch.set_num_threads(1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def leave_folder():
    """What the end of a process does: the lock on out_dir lives as long as env, which its signal handlers keep."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    gc.collect()


def main(cfg):
    """Run the stage as a process of its own would: what an earlier run here held is let go."""
    leave_folder()
    pretrain.main(cfg)
    leave_folder()


def letters(tokenizer, text):
    return [token for letter in text for token in tokenizer.encode(letter)]


def write_folder(folder, tokenizer_file, train, val):
    """Write a data folder as prepare.py does: each document's tokens (here letter by letter), then end of text."""
    os.makedirs(folder)
    shutil.copyfile(tokenizer_file, os.path.join(folder, "tokenizer.model"))
    tokenizer = load_tokenizer(tokenizer_file)
    meta = {"kind": "text", "dtype": "uint16", "fingerprint": tokenizer.fingerprint, "tokenizer": "tokenizer.model",
            "vocab_size": tokenizer.vocab_size}
    for name, texts in (("train", train), ("val", val)):
        ids = [token for text in texts for token in letters(tokenizer, text) + [tokenizer.eot_id]]
        np.array(ids, "<u2").tofile(os.path.join(folder, f"{name}.bin"))
        meta[name] = {"tokens": len(ids), "documents": len(texts), "bytes": sum(len(t.encode()) for t in texts)}
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(meta, f)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Counting songs: after a number comes the next, so there is something to learn."""
    root = tmp_path_factory.mktemp("data")
    songs = ["".join(NUMBERS[(start + i) % 10] for i in range(20)) for start in range(10)] * 20
    train_tokenizer(songs + ["床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"], str(root / "tokenizer.model"), 320)
    return write_folder(root / "songs", root / "tokenizer.model", songs, songs[:15])


@pytest.fixture(scope="module")
def other_data(data, tmp_path_factory):
    poem = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    return write_folder(tmp_path_factory.mktemp("data") / "poem", data + "/tokenizer.model", [poem] * 20, [poem])


@pytest.fixture
def settings(data, tmp_path):
    """A function that makes a Config: small, eager, on the CPU."""
    def make(**changes):
        return Config(**{**dict(
            data_dir=data, out_dir=str(tmp_path / "run"), dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64,
            max_seq_len=32, batch_size=4, grad_accum=2, max_steps=20, warmup_steps=4, lr=1e-2, min_lr=1e-3,
            eval_every=7, eval_tokens=500, device="cpu", dtype="float32", compile=False), **changes})
    return make


MOE = dict(dim=32, n_layers=2, qk_norm=True, tie_embeddings=False, n_experts=4, n_active_experts=2,
           expert_hidden_dim=16)


def log_of(out_dir):
    """The records of log.jsonl without what the clock says."""
    with open(os.path.join(out_dir, "log.jsonl"), encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    return [{k: v for k, v in r.items() if k not in ("tok/s", "seconds", "mfu")} for r in records]


def same(a, b):
    """Whether two nested structures of tensors and plain values are equal, to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---------------------------------------------------------------------------- learning


def test_it_learns_saves_and_can_be_loaded(settings, capsys):
    cfg = settings(max_steps=60, eval_every=20, sample_start="一二")
    main(cfg)
    records, out = log_of(cfg.out_dir), capsys.readouterr().out
    assert [r["step"] for r in records] == list(range(1, 61))
    assert records[0]["loss"] == pytest.approx(math.log(320), abs=0.3)
    assert records[-1]["loss"] < 0.6 and records[-1]["val_loss"] < 0.6
    assert [r["step"] for r in records if "val_loss" in r] == [20, 40, 60]
    assert out.count("step 7/60 | loss") == 1 and out.count("sample: 一二") == 3
    assert sorted(os.listdir(cfg.out_dir)) == [".lock", "best.pt", "ckpt.pt", "log.jsonl", "tokenizer.model"]

    model, tokenizer, checkpoint = load_model(cfg.out_dir)
    assert checkpoint["stage"] == "pretrain" and checkpoint["step"] == 60
    assert checkpoint["fingerprint"] == tokenizer.fingerprint
    assert checkpoint["config"] == dataclasses.asdict(cfg)
    assert all(w.dtype == torch.float32 for w in checkpoint["model"].values())
    prompt = [tokenizer.eot_id] + letters(tokenizer, "一二三四五")
    assert tokenizer.decode(generate(model, [prompt], 4, temperature=0)[0]) == "六七八九"


def test_a_sample_start_longer_than_the_model_sees_costs_nothing(settings, capsys):
    cfg = settings(max_steps=1, sample_start="一二" * 100)
    main(cfg)
    assert "sample: 一二" in capsys.readouterr().out and load_checkpoint(cfg.out_dir)["step"] == 1


def test_the_vocabulary_is_padded_to_64(settings, data):
    cfg = settings(max_steps=1)
    main(cfg)
    _, _, meta = open_data(data)
    size = load_checkpoint(cfg.out_dir)["model_config"]["vocab_size"]
    assert size % 64 == 0 and 0 <= size - meta["vocab_size"] < 64


def test_best_checkpoint_is_the_lowest_validation_loss(settings, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 3.5, 6.0])
    monkeypatch.setattr(pretrain, "text_loss", lambda *args: (next(losses), 1.0))
    cfg = settings(max_steps=10, eval_every=2)
    main(cfg)
    best = load_checkpoint(os.path.join(cfg.out_dir, "best.pt"))
    last = load_checkpoint(cfg.out_dir)
    assert (best["step"], best["best_val"], last["step"], last["best_val"]) == (4, 3.0, 10, 3.0)
    assert not same(best["model"], last["model"])


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(settings, tmp_path):
    losses = {}
    for compile in (False, True):
        cfg = settings(compile=compile, max_steps=4, n_layers=1, eval_every=10,
                       out_dir=str(tmp_path / str(compile)))
        main(cfg)
        records = log_of(cfg.out_dir)
        losses[compile] = [[r["loss"], r["norm"]] for r in records] + [[records[-1]["val_loss"]]]
        names = set(load_checkpoint(cfg.out_dir)["model"])
    assert "blocks.0.attn.qkv.weight" in names and not any("_orig_mod" in name for name in names)
    for eager, compiled in zip(losses[False], losses[True]):
        assert compiled == pytest.approx(eager, abs=1e-3)


# ---------------------------------------------------------------------------- rows


def test_batches(settings, data):
    """A row's targets are its inputs moved by one; an epoch's rows do not overlap, and the next one cuts elsewhere."""
    cfg = settings(batch_size=3, grad_accum=4, seq_len=8)
    tokens = np.arange(8 * 31 + 1, dtype=np.uint16)  # 30 rows an epoch and 8 tokens of slack: a token tells its place
    split = Split(tokens, None, None, None, {})
    epochs = []
    for epoch in range(3):
        starts = []
        for micro in range(epoch * 10, epoch * 10 + 10):
            x, y = get_batch(split, 3, cfg, micro // 4, micro % 4, ALONE)
            assert x.shape == y.shape == (3, 8) and x.dtype == torch.int64
            assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(8))
            starts += x[:, 0].tolist()
        assert sorted(starts) == list(range(min(starts), min(starts) + 240, 8))
        epochs.append(min(starts))
    assert len(set(epochs)) > 1 and max(epochs) <= 8
    train, _, _ = open_data(data)
    other = get_batch(train, cfg.batch_size, cfg, 2, 1, Env(3, 4, torch.device("cpu"), torch.float32))
    assert torch.equal(get_batch(train, cfg.batch_size, cfg, 2, 1, ALONE)[0], other[0])
    assert not torch.equal(get_batch(train, cfg.batch_size, cfg, 2, 2, ALONE)[0], other[0])
    other_seed = dataclasses.replace(cfg, seed=5)
    assert not torch.equal(get_batch(train, cfg.batch_size, other_seed, 2, 1, ALONE)[0], other[0])


def test_the_last_stretch_mixes_in_rows_of_the_other_folder(settings, other_data, monkeypatch):
    reads = []
    learned = []

    def spy(split, n_rows, cfg, step, micro_step, env):
        x, y = get_batch(split, n_rows, cfg, step, micro_step, env)
        assert len(x) == len(y) == n_rows
        reads.append((step, micro_step, len(split.tokens), x))
        return x, y

    def spy_loss(hidden, head_weight, y, **options):
        learned.append(y)
        return cross_entropy(hidden, head_weight, y, **options)

    monkeypatch.setattr(pretrain, "get_batch", spy)
    monkeypatch.setattr(pretrain, "cross_entropy", spy_loss)
    cfg = settings(max_steps=6, batch_size=3, anneal_dir=other_data, anneal_steps=2, anneal_rows=2)
    train, anneal = (len(open_data(folder)[0].tokens) for folder in (cfg.data_dir, other_data))
    main(cfg)
    assert train != anneal
    steps = [(step, micro) for step in range(6) for micro in range(2)]
    assert [read[:2] for read in reads if read[2] == train] == steps
    assert [read[:2] for read in reads if read[2] == anneal] == steps[8:]
    # what is learned: three rows of the text, in the last stretch two of the other folder and one of the text
    of = {read[:3]: read[3] for read in reads}
    for place, y in zip(steps, learned, strict=True):
        text = of[*place, train]
        wanted = torch.cat([of[*place, anneal], text[2:]]) if place[0] >= 4 else text
        assert y.shape == wanted.shape and torch.equal(y[:, :-1], wanted[:, 1:])


# ---------------------------------------------------------------------------- resuming


def stop_during(monkeypatch, at, how):
    """Let step `at` (counted from 0) be interrupted by how()."""
    lr_at = common.lr_at

    def interrupted(step, cfg):
        if step == at:
            monkeypatch.setattr(pretrain, "lr_at", lr_at)
            how()
        return lr_at(step, cfg)

    monkeypatch.setattr(pretrain, "lr_at", interrupted)


@pytest.mark.parametrize("changes", [dict(), dict(MOE, optimizer="muon", adam_lr=5e-3, decay_steps=12)])
def test_ten_and_ten_steps_are_twenty_to_the_last_bit(settings, tmp_path, monkeypatch, capsys, changes):
    """SIGTERM in the tenth step: it is finished and saved, and the same command goes on as if nothing had been."""
    whole = settings(**changes, out_dir=str(tmp_path / "whole"))
    main(whole)
    parts = settings(**changes, out_dir=str(tmp_path / "parts"))
    stop_during(monkeypatch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:  # `pretrain.py … && sft.py …` must not go on
        main(parts)
    assert left.value.code == 3
    assert "ckpt.pt: step 10, stopped by SIGTERM; the same command goes on from here." in capsys.readouterr().out
    assert load_checkpoint(parts.out_dir)["step"] == 10 and len(log_of(parts.out_dir)) == 10
    torch.manual_seed(999)  # what ran in between does not matter
    main(parts)
    out = capsys.readouterr().out
    assert "at step 10 of 20; settings changed since: none" in out
    a, b = load_checkpoint(whole.out_dir), load_checkpoint(parts.out_dir)
    for key in ("step", "model", "optimizers", "scaler", "best_val", "model_config"):
        assert same(a[key], b[key]), key
    assert log_of(whole.out_dir) == log_of(parts.out_dir)
    best = [load_checkpoint(os.path.join(cfg.out_dir, "best.pt")) for cfg in (whole, parts)]
    assert same(best[0]["model"], best[1]["model"]) and best[0]["step"] == best[1]["step"]
    if changes:
        assert a["model"]["blocks.1.ffn.bias"].any(), "the router's bias must have moved"


def test_all_processes_stop_where_one_was_asked_to(settings, monkeypatch, capsys):
    """Another process got the signal, in the third step: ours saves and ends with it."""
    real = common.all_sum
    calls = []

    def all_sum(values, env):
        calls.append(values)
        loss, stop = real(values, env)
        return loss, stop + (len(calls) == 3)

    monkeypatch.setattr(pretrain, "all_sum", all_sum)
    cfg = settings(max_steps=6)
    with pytest.raises(SystemExit):
        main(cfg)
    assert "step 3, stopped by another process; the same command goes on from here." in capsys.readouterr().out
    assert load_checkpoint(cfg.out_dir)["step"] == 3
    main(cfg)
    assert load_checkpoint(cfg.out_dir)["step"] == 6 and len(log_of(cfg.out_dir)) == 6


def test_after_a_crash_the_lost_steps_are_done_again(settings, tmp_path, monkeypatch):
    """Saved at 8, killed in the 14th: steps 9 to 13 are dropped from the log and done again, with the same result."""
    whole = settings(out_dir=str(tmp_path / "whole"), eval_every=8)
    main(whole)
    parts = settings(out_dir=str(tmp_path / "parts"), eval_every=8)

    def crash():
        raise KeyError("power cut")

    stop_during(monkeypatch, 13, crash)
    with pytest.raises(KeyError):
        main(parts)
    assert load_checkpoint(parts.out_dir)["step"] == 8 and len(log_of(parts.out_dir)) == 13
    main(parts)
    assert log_of(whole.out_dir) == log_of(parts.out_dir)
    a, b = load_checkpoint(whole.out_dir), load_checkpoint(parts.out_dir)
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])


def test_a_run_that_has_ended_leaves_its_folder(settings):
    """Also within one process, as in a notebook: what holds the folder goes when main() returns."""
    cfg = settings(max_steps=1)
    pretrain.main(cfg)
    pretrain.main(dataclasses.replace(cfg, max_steps=2))
    assert load_checkpoint(cfg.out_dir)["step"] == 2


def test_a_finished_run_is_left_as_it_is(settings, capsys):
    cfg = settings(max_steps=3)
    main(cfg)
    before = load_checkpoint(cfg.out_dir)
    capsys.readouterr()
    main(cfg)
    assert "it is finished: raise --max_steps" in capsys.readouterr().out
    assert same(load_checkpoint(cfg.out_dir)["model"], before["model"]) and len(log_of(cfg.out_dir)) == 3


def test_resume_false_starts_again(settings):
    cfg = settings(max_steps=3)
    main(cfg)
    first = load_checkpoint(cfg.out_dir)
    main(dataclasses.replace(cfg, resume=False, max_steps=2))
    assert load_checkpoint(cfg.out_dir)["step"] == 2 and first["step"] == 3


def test_changed_settings_are_said(settings, capsys):
    cfg = settings(max_steps=2)
    main(cfg)
    capsys.readouterr()
    main(dataclasses.replace(cfg, max_steps=3, lr=5e-3))
    out = capsys.readouterr().out
    assert "settings changed since: {'max_steps': 3, 'lr': 0.005}" in out


def test_resuming_with_another_model_is_refused(settings):
    cfg = settings(max_steps=1)
    main(cfg)
    with pytest.raises(SystemExit) as left:
        main(dataclasses.replace(cfg, dim=64, n_layers=3, head_dim=8))
    message = str(left.value)
    assert "dim=32 there, 64 here" in message and "n_layers=2 there, 3 here" in message
    assert "--out_dir" in message and "--resume=False" in message and "head_dim" not in message


def test_resuming_with_data_of_another_tokenizer_is_refused(settings, data, tmp_path):
    """The folder was prepared again in between: its tokens mean something else now."""
    folder = tmp_path / "prepared_again"
    shutil.copytree(data, folder)
    cfg = settings(max_steps=1, data_dir=str(folder))
    main(cfg)
    then = load_tokenizer(str(folder)).fingerprint
    shutil.rmtree(folder)
    songs = [NUMBERS * 2, NUMBERS[::-1] * 2]
    train_tokenizer(songs * 9 + ["床前明月光，疑是地上霜。"], str(tmp_path / "tokenizer.model"), 320)
    write_folder(folder, tmp_path / "tokenizer.model", songs * 50, songs)
    now = load_tokenizer(str(folder)).fingerprint
    assert now != then
    with pytest.raises(SystemExit, match=f"tokenizer={then[:12]} there, {now[:12]} here"):
        main(dataclasses.replace(cfg, max_steps=2))


def test_data_that_another_tokenizer_made_than_lies_beside_it_is_refused(settings, data, tmp_path):
    folder = tmp_path / "mixed_up"
    shutil.copytree(data, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["fingerprint"] = "0" * 64
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(SystemExit, match="is not the vocabulary that its tokens were made with"):
        main(settings(max_steps=1, data_dir=str(folder)))


def test_changed_batches_are_refused_by_name(settings):
    """Rows would be left out or learned twice: which rows a step holds follows from its number."""
    cfg = settings(max_steps=1)
    main(cfg)
    before = load_checkpoint(cfg.out_dir)
    with pytest.raises(SystemExit, match="is of another run: batch_size=4 there, 8 here"):
        main(dataclasses.replace(cfg, max_steps=2, batch_size=8))
    assert load_checkpoint(cfg.out_dir)["step"] == before["step"] == 1
    main(dataclasses.replace(cfg, max_steps=2, batch_size=8, grad_accum=1))  # the same rows, shared out otherwise
    assert load_checkpoint(cfg.out_dir)["step"] == 2


def test_the_same_rows_shared_out_otherwise_give_the_same_run(settings, tmp_path):
    runs = []
    for batch_size, grad_accum in ((4, 2), (2, 4), (8, 1)):
        cfg = settings(max_steps=3, batch_size=batch_size, grad_accum=grad_accum,
                       out_dir=str(tmp_path / str(batch_size)))
        main(cfg)
        runs.append([[r["loss"], r["norm"]] for r in log_of(cfg.out_dir)])
    for other in runs[1:]:
        for ours, theirs in zip(runs[0], other, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_checkpoint_blocks_changes_memory_alone(settings, tmp_path):
    """Computing blocks again in the backward pass: the same losses and gradients, and the same balance of experts."""
    runs = []
    for checkpoint_blocks in (False, True):
        cfg = settings(**MOE, max_steps=4, checkpoint_blocks=checkpoint_blocks,
                       out_dir=str(tmp_path / str(checkpoint_blocks)))
        main(cfg)
        runs.append((log_of(cfg.out_dir), load_checkpoint(cfg.out_dir)["model"]))
    (log_a, weights_a), (log_b, weights_b) = runs
    for a, b in zip(log_a, log_b, strict=True):
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-5)
    for name in weights_a:
        assert (weights_a[name] - weights_b[name]).abs().max() < 1e-5, name
    assert torch.equal(weights_a["blocks.1.ffn.bias"], weights_b["blocks.1.ffn.bias"])


def small_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_a_full_disk_costs_the_last_steps_only(settings):
    """The save fails: one line, exit code 1, the checkpoint before it is whole, and with room again the run goes on."""
    cfg = settings(max_steps=2, eval_every=1)
    main(cfg)
    before = load_checkpoint(cfg.out_dir)
    longer = dataclasses.replace(cfg, max_steps=4)
    arguments = [f"--{k}={v}" for k, v in dataclasses.asdict(longer).items()]
    done = subprocess.run([sys.executable, "pretrain.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=small_disk)
    assert done.returncode == 1, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: cannot write {cfg.out_dir}/"), done.stderr
    assert same(load_checkpoint(cfg.out_dir), before)
    main(longer)
    assert [r["step"] for r in log_of(cfg.out_dir)] == [1, 2, 3, 4]


# ---------------------------------------------------------------------------- several processes


def torchrun(processes, *words):
    """Run pretrain.py by torchrun on gloo ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*command, "pretrain.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=110,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("processes, changes, tolerance", [
    (2, MOE, 1e-6), (2, dict(optimizer="muon", tie_embeddings=False), 1e-6), (4, dict(MOE, optimizer="muon"), 1e-5)])
def test_several_processes_equal_one(settings, tmp_path, processes, changes, tolerance):
    """The same run by torchrun on gloo ranks: losses, norms, weights and the experts' biases are the same."""
    one = settings(**changes, max_steps=4, eval_every=2, batch_size=2, grad_accum=4, out_dir=str(tmp_path / "one"))
    main(one)
    several = dataclasses.replace(one, out_dir=str(tmp_path / "several"))
    done = torchrun(processes, *(f"--{k}={v}" for k, v in dataclasses.asdict(several).items()))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{processes} processes" in done.stdout and done.stdout.count("step 4/4 |") == 1
    a, b = load_checkpoint(one.out_dir), load_checkpoint(several.out_dir)
    if "n_experts" in changes:
        assert a["model"]["blocks.1.ffn.bias"].any()
    for name in a["model"]:
        assert (a["model"][name] - b["model"][name]).abs().max() < tolerance, name
    records = log_of(one.out_dir), log_of(several.out_dir)
    assert len(records[0]) == 4
    for ours, theirs in zip(*records, strict=True):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=tolerance, abs=tolerance)
    assert a["best_val"] == pytest.approx(b["best_val"], rel=tolerance)


def test_an_error_under_torchrun_is_said_once(tmp_path):
    """Both processes come to the same error; a user reads one line of it, and no traceback of ours."""
    done = torchrun(2, f"--data_dir={tmp_path}/none", "--device=cpu", "--dtype=float32", "--grad_accum=2")
    assert done.returncode == 1
    lines = (done.stdout + done.stderr).splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1 and f"no data in '{tmp_path}/none'" in errors[0]
    frames = [line for line in lines if 'File "' in line]
    assert not [line for line in frames if "site-packages" not in line and "frozen" not in line], frames


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes of torchrun in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others_and_is_named(settings, tmp_path, rank):
    """kill -9 of one of two processes: no other waits for it for ever, torchrun says which one it was, and what was
    saved before is whole."""
    cfg = settings(max_steps=1_000_000, eval_every=2, batch_size=2, grad_accum=2, out_dir=str(tmp_path / "two"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pretrain.py"]
    run = subprocess.Popen([*command, *(f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items())], cwd=ROOT, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in run.stdout:
        if line.startswith("step 5/"):
            break
    with open(f"/proc/{run.pid}/task/{run.pid}/children") as f:
        for pid in f.read().split():
            with open(f"/proc/{pid}/environ") as environ:
                if f"RANK={rank}" in environ.read().split("\0"):
                    os.kill(int(pid), signal.SIGKILL)
    said = run.communicate(timeout=60)[0]
    assert run.returncode == 1
    cause = said.split("Root Cause")[1]
    assert f"rank      : {rank} (local_rank: {rank})" in cause and "(SIGKILL)" in cause
    assert load_checkpoint(cfg.out_dir)["step"] >= 4


def test_the_gradient_is_that_of_one_large_batch(settings, data):
    """Two micro-steps of 4 rows give the gradient of the 8 rows together (before clipping: the norm that is logged)."""
    cfg = settings(max_steps=1, warmup_steps=0)
    main(cfg)
    torch.manual_seed(cfg.seed)
    model = Transformer(ModelConfig(**load_checkpoint(cfg.out_dir)["model_config"]))
    cfg.seq_len = 32
    train, _, _ = open_data(data)
    rows = (get_batch(train, cfg.batch_size, cfg, 0, i, ALONE) for i in range(2))
    x, y = (torch.cat(parts) for parts in zip(*rows))
    loss = F.cross_entropy(model.logits(model(x)).flatten(0, 1), y.flatten())
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    (record,) = log_of(cfg.out_dir)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["norm"] == pytest.approx(norm, rel=1e-4)


# ---------------------------------------------------------------------------- errors and the estimate


def leaves(cfg):
    with pytest.raises(SystemExit) as left:
        main(cfg)
    assert str(left.value).startswith("error: ")
    return str(left.value)


def test_a_loss_that_is_not_finite_stops_the_run(settings):
    cfg = settings(lr=1e30, warmup_steps=0, max_steps=30, eval_every=1)
    message = leaves(cfg)
    assert f"{cfg.out_dir}/ckpt.pt" in message and "--lr (now 1e+30)" in message
    checkpoint = load_checkpoint(cfg.out_dir)
    assert all(w.isfinite().all() for w in checkpoint["model"].values()), "the last good checkpoint must be good"


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(settings, monkeypatch):
    """The loss may be fine and its gradient not: then the weights are spoilt, and must not replace the good ones."""
    def spoil():
        model = spoilt[0]
        model.norm.weight.register_hook(lambda grad: grad * float("nan"))

    spoilt = []
    monkeypatch.setattr(pretrain, "compile_blocks", lambda model, cfg, env: spoilt.append(model))
    stop_during(monkeypatch, 3, spoil)
    cfg = settings(eval_every=1)
    message = leaves(cfg)
    assert "the gradient's norm is nan" in message and f"{cfg.out_dir}/ckpt.pt is the last good checkpoint" in message
    checkpoint = load_checkpoint(cfg.out_dir)
    assert checkpoint["step"] == 3 and all(w.isfinite().all() for w in checkpoint["model"].values())


def test_missing_data_says_how_to_make_it(settings):
    message = leaves(settings(data_dir="data/baby"))
    assert "python prepare.py baby --input=FILE_OR_FOLDER" in message and "python prepare.py poems" in message


def test_too_little_text(settings, data, tmp_path, other_data):
    folder = write_folder(tmp_path / "tiny", data + "/tokenizer.model", ["一，二，"], ["三，四，"])
    message = leaves(settings(data_dir=folder))
    assert folder in message and "fewer than one row of seq_len=32" in message
    message = leaves(settings(anneal_dir=folder, anneal_steps=2, anneal_rows=1))
    assert folder in message and "fewer than one row" in message


def test_without_held_out_text_it_trains_and_says_so_once(settings, data, tmp_path, capsys):
    folder = write_folder(tmp_path / "no_val", data + "/tokenizer.model", ["一，二，" * 50], [])
    cfg = settings(data_dir=folder, max_steps=4, eval_every=2)
    main(cfg)
    assert capsys.readouterr().out.count(f"no held-out text: {folder}") == 1
    assert "best.pt" not in os.listdir(cfg.out_dir) and not any("val_loss" in r for r in log_of(cfg.out_dir))
    assert load_checkpoint(cfg.out_dir)["step"] == 4
    # it goes on like any other run, and whatever reads a run reads this one
    main(dataclasses.replace(cfg, max_steps=6))
    model, tokenizer, checkpoint = load_model(cfg.out_dir)
    assert checkpoint["step"] == 6 and checkpoint["best_val"] == math.inf
    assert generate(model, [letters(tokenizer, "一二")], 3, temperature=0)


def test_rows_longer_than_the_model_sees(settings):
    assert "seq_len=64 is more than the model can see, max_seq_len=32" in leaves(settings(seq_len=64))


def test_grad_accum_must_be_shared_evenly(settings, monkeypatch):
    monkeypatch.setattr(pretrain, "start", lambda cfg: Env(0, 2, torch.device("cpu"), torch.float32))
    assert "grad_accum=3 must be a multiple of the 2 processes" in leaves(settings(grad_accum=3))


def test_estimate(settings, capsys):
    """It prints the plan of a large model at once, and makes neither weights nor files."""
    cfg = settings(dim=4096, n_layers=32, n_heads=32, n_kv_heads=0, hidden_dim=11008, max_seq_len=4096,
                   tie_embeddings=False, batch_size=2, grad_accum=8, max_steps=1000)
    estimate.main(cfg)
    out = capsys.readouterr().out
    V = 320
    blocks = 32 * (4 * 4096 ** 2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    total = blocks + 2 * V * 4096
    assert f"{total:,} ({total - V * 4096:,} multiply each token)" in out
    assert f"{1000 * 8 * 2 * 4096:,} (1,000 steps of {8 * 2 * 4096:,})" in out
    flops = 6 * (total - V * 4096) + 6 * 32 * 4096 * 4096
    assert f"{flops / 1e9:.3f} GFLOPs a token, {flops * 65_536_000:.2e} in all" in out
    assert f"{16 * total / 2**30:.1f} GiB" in out and "H100" in out and "hours" in out
    assert f"H100            {flops * 65_536_000 / 989e12 / 0.4 / 3600:,.1f} hours at 40% of 989 TFLOP/s" in out
    assert not os.path.exists(cfg.out_dir)


@pytest.mark.parametrize("changes", [dict(), dict(checkpoint_blocks=True)])
def test_the_estimate_of_memory_is_what_a_run_takes(settings, capsys, changes):
    """Measured in a process of its own, started by a shell: Linux counts what its parent holds when it starts, too."""
    cfg = settings(dim=64, n_layers=8, n_kv_heads=0, hidden_dim=192, max_seq_len=256, batch_size=32, grad_accum=1,
                   max_steps=3, eval_every=9, **changes)
    arguments = [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items()]
    shell = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "pretrain.py", *arguments]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=170,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    measured = float(re.search(r"Peak memory ([\d.]+) GiB", done.stdout)[1])
    estimate.main(cfg)
    estimated = float(re.search(r"memory +([\d.]+) GiB", capsys.readouterr().out)[1])
    assert estimated == pytest.approx(measured, rel=0.15)


def test_the_estimate_of_shards(settings, capsys):
    """8 G parameters: 120 GiB of weights, gradients and AdamW are shared; 3 GiB of gathered blocks and Python not."""
    estimate.main(settings(dim=4096, n_layers=40, n_heads=32, n_kv_heads=0, hidden_dim=11008, checkpoint_blocks=True))
    total = 40 * (4 * 4096 ** 2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 320 * 4096
    found = re.findall(r"shard=True +([\d.]+) GiB a process on (\d+) GPUs", capsys.readouterr().out)
    assert [int(n) for _, n in found] == [8, 64]
    for gib, n in found:
        assert 3 < float(gib) - 16 * total / int(n) / 2**30 < 4


# ---------------------------------------------------------------------------- one dial


def dialled(data, *words):
    """The Config that a run with these words on the command line ends with, seen by the estimate."""
    cfg = load_config(Config, [f"--data_dir={data}", "--device=cpu", "--dtype=float32", *words])
    estimate.main(cfg)
    return cfg


def test_depth_chooses_a_run_by_hand(data):
    cfg = dialled(data, "--depth=4")
    assert (cfg.n_layers, cfg.dim, cfg.n_heads) == (4, 256, 4)
    parameters = 4 * (4 * 256 ** 2 + 8 * 256 ** 2)
    tokens = 20 * parameters
    compute = tokens * 6 * parameters
    assert cfg.lr == pytest.approx(0.3118 * compute ** -0.125) and cfg.min_lr == pytest.approx(cfg.lr / 10)
    batch = cfg.grad_accum * cfg.batch_size * 512
    assert batch / 2 ** 0.5 <= 0.292 * compute ** 0.3271 <= batch * 2 ** 0.5  # the nearest power of two of micro-steps
    assert tokens <= cfg.max_steps * batch < tokens + batch


def test_deeper_is_wider_longer_and_slower(data):
    small, large = dialled(data, "--depth=2"), dialled(data, "--depth=8")
    assert small.dim < large.dim and small.max_steps < large.max_steps and small.lr > large.lr
    assert small.grad_accum <= large.grad_accum


def test_what_is_given_wins_over_depth(data, tmp_path):
    """Also where it is the default, and also from a config file."""
    file = tmp_path / "conf.py"
    file.write_text("max_steps = 7\nn_heads = 2\n")
    cfg = dialled(data, str(file), "--depth=3", "--lr=1e-3", "--dim=128")
    assert (cfg.n_layers, cfg.dim, cfg.n_heads, cfg.max_steps, cfg.lr) == (3, 128, 2, 7, 1e-3)
    assert cfg.min_lr == 1e-4


def test_a_run_by_depth_learns_and_goes_on(data, tmp_path):
    words = [f"--data_dir={data}", f"--out_dir={tmp_path}/run", "--depth=1", "--max_seq_len=32", "--batch_size=4",
             "--device=cpu", "--dtype=float32", "--compile=False", "--max_steps=4", "--eval_tokens=100"]
    main(load_config(Config, words))
    main(load_config(Config, [*words[:-2], "--max_steps=6", "--eval_tokens=100"]))
    checkpoint = load_checkpoint(f"{tmp_path}/run")
    assert checkpoint["step"] == 6 and checkpoint["config"]["depth"] == 1 and checkpoint["model_config"]["dim"] == 64
