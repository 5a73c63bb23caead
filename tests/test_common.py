"""common.py: learning rates, optimizers, gradients over processes, checkpoints, resuming, the log."""
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from oracles import V, config_of, random_model

import common
import dpo
import ppo
import pretrain
import reward
import sft
from common.UNKNOWN import compile_blocks, lock, no_grad_eval, optimizer_step, parallel, peak_flops, resume
from common.checkpoint import load_checkpoint, load_model, log, newest_run, save, save_checkpoint, trim_log
from common.distributed import Env, all_sum, micro_steps, start
from common.optim import Muon, lr_at, make_optimizers, orthogonalize, set_lr
from common.loss import cross_entropy
from model import Transformer
from tokenizer import train_tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALONE = Env(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def quiet_process():
    """One thread; the signal handlers that resume() sets are taken back."""
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------------------- learning rate


def test_cosine_by_hand():
    cfg = SimpleNamespace(lr=1.0, min_lr=0.1, warmup_steps=4, max_steps=12, decay_steps=0)
    got = [lr_at(step, cfg) for step in range(14)]
    assert got[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]      # the last warmup step and the first of the cosine are the peak
    assert got[8] == pytest.approx(0.55)               # halfway down
    assert got[6] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert got[11] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 7 / 8)))
    assert got[12] == pytest.approx(0.1) and got[13] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(got[4:], got[5:13]))


def test_wsd_by_hand():
    cfg = SimpleNamespace(lr=1.0, min_lr=0.2, warmup_steps=2, max_steps=10, decay_steps=4)
    assert [lr_at(step, cfg) for step in range(11)] == pytest.approx([.5, 1, 1, 1, 1, 1, 1, .8, .6, .4, .2])
    cfg.warmup_steps = 0
    assert lr_at(0, cfg) == 1.0


def test_a_rate_that_would_rise_is_refused():
    cfg = SimpleNamespace(lr=1e-5, min_lr=1e-4, warmup_steps=0, max_steps=10, decay_steps=0)
    with pytest.raises(SystemExit, match="min_lr=0.0001 exceeds lr=1e-05"):
        lr_at(0, cfg)


# ---------------------------------------------------------------------------- processes


def test_nohup_holds():
    """What was ignored when the run began, as nohup ignores SIGHUP, stays ignored; the rest is caught."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    env = Env(0, 1, torch.device("cpu"), torch.float32)
    common.catch_signals(env)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    assert env.signals == ["SIGTERM"]


def test_micro_steps_are_shared_evenly():
    for world in (1, 2, 3, 4):
        env = [Env(rank, world, torch.device("cpu"), torch.float32) for rank in range(world)]
        shares = [list(micro_steps(12, e)) for e in env]
        assert sorted(sum(shares, [])) == list(range(12)) and {len(s) for s in shares} == {12 // world}
    with pytest.raises(SystemExit, match="grad_accum=3 must be a multiple of the 2 processes.*Try --grad_accum=2"):
        micro_steps(3, Env(0, 2, torch.device("cpu"), torch.float32))


def test_all_sum_alone():
    assert all_sum([torch.tensor(1.5), 2, True], ALONE) == [1.5, 2.0, 1.0]


@pytest.mark.parametrize("device, dtype, words", [
    ("gpu", "auto", "device='gpu': known are auto, cpu, mps, cuda and cuda:N"),
    ("cpu", "bfloat16", "dtype=bfloat16 is for GPUs"), ("cpu", "float16", "dtype=float16 is for GPUs"),
    ("cuda", "auto", "device=cuda, but PyTorch sees no GPU here"), ("mps", "auto", "device=mps, but PyTorch sees no A")])
def test_a_machine_that_is_not_there_is_refused(monkeypatch, device, dtype, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        common.choose_dtype(dtype, common.choose_device(device))
    assert words in str(left.value) and "\n" not in str(left.value)


def test_start_prints_what_was_changed(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    env = start(pretrain.Config(device="cpu", dtype="float32", lr=0.5))
    out = capsys.readouterr().out
    assert env.is_main and env.world == 1 and env.dtype == torch.float32 and env.device.type == "cpu"
    assert "lr=0.5" in out and "device=cpu" in out and "weight_decay" not in out
    first = torch.rand(1)
    start(pretrain.Config(device="cpu"))
    assert torch.equal(first, torch.rand(1))  # seeded


# ---------------------------------------------------------------------------- optimizers


def adamw(**changes):
    defaults = dict(optimizer="adamw", lr=1e-3, adam_lr=0.0, momentum=0.95, weight_decay=0.1, grad_clip=1.0,
                    out_dir="out/x")
    return SimpleNamespace(**{**defaults, **changes})


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
    assert isinstance(muon, Muon) and isinstance(adam, torch.optim.AdamW)
    taken = set().union(*(names(model, g["params"]) for g in muon.param_groups))
    assert taken == {name for name, p in model.named_parameters()
                     if p.ndim == 2 and name.startswith("blocks.") and "router" not in name}
    left = set().union(*(names(model, g["params"]) for g in adam.param_groups))
    assert left | taken == {name for name, _ in model.named_parameters()} and not left & taken
    assert {"embed.weight", "lm_head.weight", "blocks.1.ffn.gate_up", "norm.weight"} <= left
    set_lr([adam, muon], 0.25)
    assert {g["lr"] for o in (adam, muon) for g in o.param_groups} == {0.25 * 1e-3}


def test_muon_and_adamw_have_learning_rates_of_their_own():
    adam, muon = make_optimizers(random_model("llama"), adamw(optimizer="muon", adam_lr=3e-3))
    for factor in (1.0, 0.5, 0.0, 1.0):  # of the peak, not of the last value
        set_lr([adam, muon], factor)
        assert {g["lr"] for g in adam.param_groups} == {3e-3 * factor}
        assert {g["lr"] for g in muon.param_groups} == {1e-3 * factor}
    (optimizer,) = make_optimizers(random_model("llama"), adamw(adam_lr=3e-3))  # adam_lr is muon's neighbour
    assert {g["lr"] for g in optimizer.param_groups} == {1e-3}
    assert make_optimizers(random_model("llama"), adamw(), lr=0.5)[0].param_groups[0]["lr"] == 0.5  # a critic's own


def test_frozen_parameters_are_left_out():
    model = random_model("llama")
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("blocks.1")
    (optimizer,) = make_optimizers(model, adamw())
    assert all(name.startswith("blocks.1") for g in optimizer.param_groups for name in names(model, g["params"]))


def test_one_adamw_step_by_hand():
    """First step of AdamW: p (1 - lr wd) - lr g / |g| (both moments are the gradient's own, bias-corrected)."""
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(0.5)
    optimizers = make_optimizers(layer, adamw(lr=0.1, weight_decay=0.5))
    (layer.weight * torch.tensor([[3.0, -4.0]])).sum().backward()
    layer.bias.grad = torch.tensor([12.0])
    norm = optimizer_step(layer, optimizers, adamw(grad_clip=1.0), ALONE)
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
    assert optimizer_step(layer, [sgd], adamw(grad_clip=clip), ALONE) == pytest.approx(13.0)
    assert (before - layer.weight)[0].tolist() == pytest.approx([3 * factor, -4 * factor, 12 * factor], abs=1e-5)


def test_no_grad_eval_comes_back():
    model = random_model("llama").train()
    with no_grad_eval(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()


# ---------------------------------------------------------------------------- checkpoints


TEXTS = ["一二三四五六七八九十", "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, str(tmp_path_factory.mktemp("one") / "tokenizer.model"), 300)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS + ["春夏秋冬东南西北"] * 3, str(tmp_path_factory.mktemp("two") / "tok.model"), 310)


def a_run(folder, tokenizer, Config=pretrain.Config, kind="dots1", name="ckpt.pt", step=7, **changes):
    """Save a run of one of the stages with a random model; return (model, cfg, optimizers)."""
    model = random_model(kind)
    cfg = Config(out_dir=str(folder), batch_size=4, grad_accum=2, seq_len=16, **changes)
    optimizers = make_optimizers(model, cfg)
    save(name, cfg, ALONE, step, model, optimizers, tokenizer, best_val=math.inf)
    return model, cfg, optimizers


def test_checkpoint_round_trip(tmp_path, tokenizer):
    folder = tmp_path / "out" / "run"
    model, cfg, _ = a_run(folder, tokenizer)
    assert sorted(os.listdir(folder)) == ["ckpt.pt", "tokenizer.model"]  # nothing temporary is left
    for place in (str(folder / "ckpt.pt"), str(folder)):
        back = load_checkpoint(place)
        assert back["stage"] == "pretrain" and back["step"] == 7 and back["best_val"] == math.inf
        assert back["config"] == dataclasses.asdict(cfg) and back["lora"] is None
        again, its_tokenizer, _ = load_model(place)
        assert its_tokenizer.fingerprint == tokenizer.fingerprint
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    ids = torch.randint(0, V, (1, 9))
    assert torch.equal(again(ids), model(ids)) and not again.training


def test_the_tokenizer_beside_a_checkpoint_is_the_one_it_was_trained_with(tmp_path, tokenizer, other_tokenizer):
    """Starting again in the same folder with other data must not leave the old tokenizer there."""
    for tok in (tokenizer, other_tokenizer, other_tokenizer):
        a_run(tmp_path / "run", tok)
        assert (tmp_path / "run" / "tokenizer.model").read_bytes() == tok.data


def test_a_checkpoint_that_lacks_or_adds_a_weight_is_refused(tmp_path, tokenizer):
    a_run(tmp_path, tokenizer, kind="llama")
    for change in (lambda w: w.pop("norm.weight"), lambda w: w.update(extra=torch.zeros(1))):
        checkpoint = load_checkpoint(str(tmp_path))
        change(checkpoint["model"])
        save_checkpoint(str(tmp_path / "changed.pt"), checkpoint)
        with pytest.raises(RuntimeError, match="norm.weight|extra"):
            load_model(str(tmp_path / "changed.pt"))


def test_a_reward_model_writes_no_text_and_no_other_run_scores(tmp_path, tokenizer):
    a_run(tmp_path, tokenizer)
    with pytest.raises(SystemExit, match="is a run of pretrain.py, wanted one of reward.py"):
        common.load_reward_model(str(tmp_path))
    save_checkpoint(str(tmp_path / "ckpt.pt"), {**load_checkpoint(str(tmp_path)), "stage": "reward"})
    with pytest.raises(SystemExit, match="is a reward model: it scores answers and writes none"):
        load_model(str(tmp_path))


def test_a_model_and_the_tokenizer_beside_it_must_belong_together(tmp_path, tokenizer, other_tokenizer):
    a_run(tmp_path, tokenizer)
    other_tokenizer.save(str(tmp_path / "tokenizer.model"))
    with pytest.raises(SystemExit) as left:
        load_model(str(tmp_path))
    assert other_tokenizer.fingerprint[:12] in str(left.value) and tokenizer.fingerprint[:12] in str(left.value)


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
    for load in (load_checkpoint, load_model, common.load_reward_model):
        with pytest.raises(SystemExit) as left:
            load(str(path))
        message = str(left.value)
        assert message.startswith(f"error: {path} ") and "\n" not in message and len(message) < 200 + len(str(path))
        assert "cannot be read as a checkpoint" in message or "is not a checkpoint of this project" in message
    assert not os.path.exists(Evil.marker)


def test_a_checkpoint_cut_short_gets_one_sentence(tmp_path, tokenizer):
    a_run(tmp_path, tokenizer, kind="llama")
    path = tmp_path / "ckpt.pt"
    whole = path.read_bytes()
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


def test_a_tokenizer_that_could_not_be_written_whole_is_written_again(tmp_path, tokenizer):
    """What a full disk leaves of tokenizer.model must not be taken for it when there is room again."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.data[:100])
    a_run(tmp_path, tokenizer)
    assert load_model(str(tmp_path))[1].fingerprint == tokenizer.fingerprint


# ---------------------------------------------------------------------------- one writer, one stage, one run


def test_two_runs_cannot_write_one_folder(tmp_path):
    folder = str(tmp_path / "run")
    first = Env(0, 1, torch.device("cpu"), torch.float32)
    lock(folder, first)
    with pytest.raises(SystemExit, match=f"another process is writing to {folder}. Wait for it, or choose another"):
        lock(folder, Env(0, 1, torch.device("cpu"), torch.float32))
    lock(folder, Env(1, 2, torch.device("cpu"), torch.float32))  # the other ranks of one run write nothing
    lock(str(tmp_path / "other"), Env(0, 1, torch.device("cpu"), torch.float32))
    first.lock.close()
    lock(folder, Env(0, 1, torch.device("cpu"), torch.float32))


def test_the_lock_goes_with_the_process(tmp_path):
    """However a process ends, also by kill -9, its folder is free."""
    code = ("import sys, time, torch; from common import Env, lock\n"
            "env = Env(0, 1, torch.device('cpu'), torch.float32)\n"
            "lock(sys.argv[1], env)\nprint('locked', flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(SystemExit, match="another process is writing"):
        lock(str(tmp_path), Env(0, 1, torch.device("cpu"), torch.float32))
    process.kill()
    process.communicate()
    lock(str(tmp_path), Env(0, 1, torch.device("cpu"), torch.float32))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if name != ".lock"}


def refused_resume(cfg, model, optimizers, tokenizer):
    """resume() must exit with an error; return it. The folder stays as it was."""
    env = Env(0, 1, torch.device("cpu"), torch.float32)
    with pytest.raises(SystemExit) as left:
        resume(cfg, env, model, optimizers, tokenizer)
    if env.lock:
        env.lock.close()
    assert str(left.value).startswith("error: ") and "\n" not in str(left.value)
    return str(left.value)


@pytest.mark.parametrize("go_on", [True, False])
def test_another_stages_run_is_refused_and_untouched(tmp_path, tokenizer, go_on):
    """Also with --resume=False: a finished pretraining must not be lost to a wrong --out_dir."""
    model, cfg, optimizers = a_run(tmp_path / "run", tokenizer)
    log(cfg, ALONE, 7, {"loss": 1.0})
    before = contents(tmp_path / "run")
    other = sft.Config(out_dir=cfg.out_dir, init_from=str(tmp_path / "base"), batch_size=4, grad_accum=2, resume=go_on)
    message = refused_resume(other, model, optimizers, tokenizer)
    assert "holds a run of pretrain.py, and sft.py would overwrite it. Choose another --out_dir" in message
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("go_on", [True, False])
@pytest.mark.parametrize("spelled", ["run", "run/", "./run", "run/ckpt.pt", "run/best.pt", "link"])
def test_a_stage_never_writes_to_the_folder_it_starts_from(tmp_path, tokenizer, monkeypatch, go_on, spelled):
    monkeypatch.chdir(tmp_path)
    os.symlink("run", "link")
    model, _, optimizers = a_run(tmp_path / "run", tokenizer, sft.Config)
    before = contents(tmp_path / "run")
    cfg = sft.Config(out_dir="run", init_from=spelled, batch_size=4, grad_accum=2, resume=go_on)
    message = refused_resume(cfg, model, optimizers, tokenizer)
    assert "out_dir=run is the run that this one starts from" in message
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("change", [dict(batch_size=8), dict(grad_accum=1), dict(batch_size=2), dict(seq_len=8),
                                    dict(optimizer="muon"), dict(seed=5), dict(data_dir="data/other")])
def test_other_batches_are_refused_by_name(tmp_path, tokenizer, change):
    """Which rows a step holds follows from its number: with other batches, rows would be left out or learned twice."""
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    before = contents(tmp_path)
    message = refused_resume(dataclasses.replace(cfg, **change), model, optimizers, tokenizer)
    (key, value), = change.items()
    assert f"is of another run: {key}={getattr(cfg, key)} there, {value} here" in message
    assert "--out_dir" in message and "--resume=False" in message
    assert contents(tmp_path) == before


def test_a_resumed_run_follows_changed_rates(tmp_path, tokenizer):
    """The state of the optimizers is the checkpoint's; lr, decay and momentum are what the settings say now."""
    model, cfg, optimizers = a_run(tmp_path, tokenizer, optimizer="muon")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    save("ckpt.pt", cfg, ALONE, 7, model, optimizers, tokenizer, best_val=math.inf)
    lower = dataclasses.replace(cfg, lr=3e-4, weight_decay=0.5, momentum=0.5)
    again = make_optimizers(model, lower)
    env = Env(0, 1, torch.device("cpu"), torch.float32)
    resume(lower, env, model, again, tokenizer)
    env.lock.close()
    adam, muon = again
    assert {group["peak_lr"] for group in adam.param_groups + muon.param_groups} == {3e-4}
    assert {group["weight_decay"] for group in muon.param_groups} == {0.5}
    assert {group["momentum"] for group in muon.param_groups} == {0.5}
    for before, after in zip(optimizers, again):
        for a, b in zip(before.state_dict()["state"].values(), after.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)


def test_a_run_in_bf16_goes_on_in_fp16(tmp_path, tokenizer):
    """As on an older GPU: the checkpoint has no scale of losses yet."""
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    env = Env(0, 1, torch.device("cpu"), torch.float16)
    assert env.scaler.is_enabled() and load_checkpoint(str(tmp_path))["scaler"] == {}
    assert resume(cfg, env, model, optimizers, tokenizer)[0] == 7
    env.lock.close()


@pytest.mark.parametrize("lacking", [{"config": {}}, {"optimizers": []}])
def test_imported_and_merged_weights_are_no_run_to_go_on_with(tmp_path, tokenizer, lacking):
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    save_checkpoint(str(tmp_path / "ckpt.pt"), {**load_checkpoint(str(tmp_path)), **lacking})
    message = refused_resume(cfg, model, optimizers, tokenizer)
    assert "holds weights alone (imported or merged)" in message and "--out_dir" in message


@pytest.mark.parametrize("stage,change", [
    (sft, dict(init_from="out/other")), (dpo, dict(loss="ipo")), (ppo, dict(advantage="rloo", group_size=2)),
    (reward, dict(centre=0.0))])
def test_another_start_or_method_is_refused_by_name(tmp_path, tokenizer, stage, change):
    model = random_model("llama")
    cfg = stage.Config(out_dir=str(tmp_path), init_from="out/base", batch_size=4, grad_accum=2)
    optimizers = make_optimizers(model, cfg)
    save("ckpt.pt", cfg, ALONE, 7, model, optimizers, tokenizer, best_val=math.inf)
    message = refused_resume(dataclasses.replace(cfg, **change), model, optimizers, tokenizer)
    assert "is of another run: " in message and next(iter(change)) in message


def test_another_spelling_of_a_folder_is_the_same(tmp_path, tokenizer):
    model, cfg, optimizers = a_run(tmp_path, tokenizer, data_dir="data/poems")
    env = Env(0, 1, torch.device("cpu"), torch.float32)
    assert resume(dataclasses.replace(cfg, data_dir="./data/poems/"), env, model, optimizers, tokenizer)[0] == 7
    env.lock.close()


def test_where_a_folder_lies_counts_not_its_spelling(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, cfg, optimizers = a_run(tmp_path, tokenizer, data_dir="data/poems")
    env = Env(0, 1, torch.device("cpu"), torch.float32)
    whole = dataclasses.replace(cfg, data_dir=str(tmp_path / "data" / "poems"))
    assert resume(whole, env, model, optimizers, tokenizer)[0] == 7
    env.lock.close()


def test_a_critic_that_is_not_finite_is_not_saved(tmp_path, tokenizer):
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match="after step 8 not all weights are finite"):
        save("ckpt.pt", cfg, ALONE, 8, model, optimizers, tokenizer, critic={"head.bias": torch.tensor([math.nan])})
    assert contents(tmp_path) == before


def test_weights_that_are_not_finite_are_not_saved(tmp_path, tokenizer):
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    before = contents(tmp_path)
    with torch.no_grad():
        model.norm.weight[3] = math.inf
    with pytest.raises(SystemExit, match="after step 8 not all weights are finite.*Lower --lr"):
        save("ckpt.pt", cfg, ALONE, 8, model, optimizers, tokenizer, best_val=math.inf)
    assert contents(tmp_path) == before


def test_another_model_or_tokenizer_is_refused_by_name(tmp_path, tokenizer, other_tokenizer):
    model, cfg, optimizers = a_run(tmp_path, tokenizer, kind="llama")
    message = refused_resume(cfg, Transformer(config_of("llama", n_layers=3, hidden_dim=64)), optimizers, tokenizer)
    assert "n_layers=2 there, 3 here" in message and "hidden_dim=80 there, 64 here" in message
    message = refused_resume(cfg, model, optimizers, other_tokenizer)
    assert f"tokenizer={tokenizer.fingerprint[:12]} there, {other_tokenizer.fingerprint[:12]} here" in message


def test_the_same_rows_shared_out_otherwise_go_on(tmp_path, tokenizer):
    """4 rows twice are 8 rows once are 2 rows four times: the step stays the same."""
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    for batch_size, grad_accum in ((4, 2), (8, 1), (2, 4)):
        same = dataclasses.replace(cfg, batch_size=batch_size, grad_accum=grad_accum)
        env = Env(0, 1, torch.device("cpu"), torch.float32)
        step, best_val, checkpoint = resume(same, env, model, optimizers, tokenizer)
        env.lock.close()
        assert (step, best_val, checkpoint["stage"]) == (7, math.inf, "pretrain")


def test_missing_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match="no checkpoint at"):
        load_checkpoint(str(tmp_path))


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
    done = subprocess.run([sys.executable, "-c", KILL_LOOP, path, "60"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=100)
    assert done.returncode == 0, done.stderr
    cut, seen = map(int, done.stdout.split())
    assert cut >= 5, f"only {cut} kills fell into a save: the test tests nothing"
    assert seen == 2


def test_newest_run(tmp_path):
    for i, (name, stage) in enumerate((("a", "pretrain"), ("b", "sft"), ("c", "reward"), ("d", None))):
        if stage:
            save_checkpoint(str(tmp_path / name / "ckpt.pt"),
                            {"stage": stage, "model": {}, "model_config": {}, "fingerprint": ""})
            os.utime(tmp_path / name / "ckpt.pt", (1000 + i, 1000 + i))
        else:
            os.makedirs(tmp_path / name)  # a run that has saved nothing yet
    assert newest_run(["pretrain", "sft", "reward"], str(tmp_path)) == str(tmp_path / "c")
    assert newest_run(["pretrain", "sft"], str(tmp_path)) == str(tmp_path / "b")
    for root in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(SystemExit, match="Train one first"):
            newest_run(["ppo"], root)


# ---------------------------------------------------------------------------- log


def test_log_line_and_record(tmp_path, capsys):
    cfg = SimpleNamespace(out_dir=str(tmp_path / "run"), max_steps=50)
    os.makedirs(cfg.out_dir)  # lock() has made it in a run
    record = {"loss": 1.23456, "lr": 3e-4, "norm": 2.5, "tok/s": 12345.6, "seconds": 86.65, "mfu": 0.417}
    log(cfg, ALONE, 7, record)
    line = capsys.readouterr().out
    assert line == ("step 7/50 | loss 1.2346 | lr 3.00e-04 | norm 2.5000 | tok/s 12,346 | seconds 86.6500 | mfu 42% "
                    "| left 1h02m05s\n")
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


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', '{"st', "", "[]", "7", "{}", "\0" * 9,
                                  '{"step": 3, "x": "\ud83c'])
def test_a_torn_last_line_is_no_error(tmp_path, torn):
    """A kill may cut the log anywhere, also within a character, and a crash leave zeros; the rest is readable."""
    path = tmp_path / "log.jsonl"
    whole = "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in (1, 2))
    path.write_bytes((whole + torn).encode(errors="surrogatepass"))
    trim_log(str(tmp_path), 3)
    log(SimpleNamespace(out_dir=str(tmp_path), max_steps=9), ALONE, 4, {"loss": 0.5})
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps[:2] == [1, 2] and steps[-1] == 4 and set(steps[2:-1]) <= {3}
    trim_log(str(tmp_path), -1)
    assert path.read_bytes() == b""


# ---------------------------------------------------------------------------- Muon


def with_singular_values(values, rows, columns):
    """A random matrix (rows, columns) with these singular values, and the U V' it belongs to."""
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    return (u * values) @ vh, u @ vh


@pytest.mark.parametrize("rows, columns", [(32, 32), (16, 64), (64, 16), (96, 32), (1, 8)])
@pytest.mark.parametrize("condition", [1, 10, 100])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_orthogonalize_against_an_svd(rows, columns, condition, size):
    """Singular values close to 1, directions those of U V'. Five steps leave them within 15 %."""
    values = size * torch.logspace(0, -math.log10(condition), min(rows, columns))
    x, wanted = with_singular_values(values, rows, columns)
    got = orthogonalize(x[None])[0]
    found = torch.linalg.svdvals(got)
    assert 0.85 < found.min() and found.max() < 1.15
    assert (got - wanted).norm() < 0.15 * wanted.norm()
    # singular vectors are kept exactly: got = U f(S) V', so wanted' got is symmetric
    product = wanted.mT @ got
    assert (product - product.mT).norm() < 1e-3 * product.norm()


def test_orthogonalize_many_at_once_and_nothing():
    x = torch.randn(5, 24, 8)
    together = orthogonalize(x)
    assert together.shape == (5, 24, 8)
    for one, of_all in zip(x, together):
        assert (orthogonalize(one[None])[0] - of_all).abs().max() < 1e-5
    assert not orthogonalize(torch.zeros(2, 4, 4)).any()  # no gradient, no step, no NaN


def test_muon_multiplies_in_the_dtype_of_products():
    """Where products are in bf16, Muon's are, and the step differs by no more than bf16 rounds."""
    steps = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = torch.nn.Linear(32, 64, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.randn(64, 32)
        env = Env(0, 1, torch.device("cpu"), dtype)
        optimizer_step(layer, [Muon([layer.weight], lr=0.1)], adamw(), env)
        assert layer.weight.dtype == torch.float32
        steps.append(layer.weight.detach() - before)
    exact, rounded = steps
    assert 0 < (exact - rounded).norm() < 0.03 * exact.norm()


def polynomial(x):
    """What the five steps make of one singular value, in double precision."""
    for a, b, c in common.POLAR_EXPRESS:
        x = a * x + b * x ** 3 + c * x ** 5
    return x


def test_muon_steps_by_hand():
    """Two steps on matrices whose singular values are all the same, so that orthogonalising is one number's affair:
    p <- p (1 - lr wd) - lr 0.2 sqrt(max(rows, columns)) f(Nesterov momentum)."""
    directions = with_singular_values(torch.ones(3), 3, 7)[1]
    p = torch.nn.Parameter(torch.randn(3, 7))
    start = p.detach().clone()
    optimizer = Muon([p], lr=0.1, weight_decay=0.5, momentum=0.9)
    momentum = 0.0
    wanted = start.double()
    for size in (4.0, -1.5, 0.25):
        p.grad = size * directions
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * size
        update = 0.1 * size + 0.9 * momentum
        # all three singular values of the update are |update|; its norm is sqrt(3) times that
        value = polynomial(abs(update) / (1.02 * math.sqrt(3) * abs(update) + 1e-6))
        step = 0.1 * 0.2 * math.sqrt(7) * math.copysign(value, update)
        wanted = wanted * (1 - 0.1 * 0.5) - step * directions.double()
        assert (p.detach() - wanted).abs().max() < 1e-5
        assert (optimizer.state[p]["momentum"] - momentum * directions).abs().max() < 1e-6


def test_muon_treats_matrices_of_one_shape_as_if_alone():
    shapes = [(8, 16), (16, 8), (8, 16), (8, 8), (8, 16)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together, lr=0.1, weight_decay=0.1)] + [Muon([p], lr=0.1, weight_decay=0.1) for p in alone]
    for step in range(3):
        for a, b in zip(together, alone):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        together[3].grad = alone[3].grad = None  # without a gradient: no step, no decay
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone):
        assert (a - b).abs().max() < 1e-5


def test_muon_treats_the_matrices_in_one_parameter_as_if_apart():
    """q, k, v lie in one matrix, gate and up in another; each is orthogonalized and stepped by itself."""
    fused = torch.nn.Parameter(torch.randn(16, 6))
    apart = [torch.nn.Parameter(part.clone()) for part in fused.detach().split([8, 4, 4])]
    optimizers = [Muon([{"params": [fused], "parts": (8, 4, 4)}], lr=0.1, weight_decay=0.1),
                  Muon(apart, lr=0.1, weight_decay=0.1)]
    for step in range(3):
        fused.grad = torch.randn(16, 6)
        for p, grad in zip(apart, fused.grad.split([8, 4, 4])):
            p.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (fused - torch.cat(apart)).abs().max() < 1e-5


def test_muon_knows_which_matrices_lie_in_one_parameter():
    """By the shapes of the model: 8 query heads and 2 key heads of 4 channels, a feed-forward layer 80 wide."""
    model = random_model("llama_gqa")
    muon = make_optimizers(model, adamw(optimizer="muon", momentum=0.8))[1]
    found = {}
    for group in muon.param_groups:
        assert group["momentum"] == 0.8
        for name in names(model, group["params"]):
            found[name.removeprefix("blocks.1.")] = list(group["parts"])
    assert found["attn.qkv.weight"] == [32, 8, 8] and found["ffn.gate_up.weight"] == [80, 80]
    assert found["attn.out.weight"] == [32] and found["ffn.down.weight"] == [32]


def test_muon_goes_on_from_its_state_to_the_last_bit():
    def fresh():
        torch.manual_seed(4)
        model = random_model("llama", 2)
        return model, make_optimizers(model, adamw(optimizer="muon"))

    def train(model, optimizers, steps):
        for step in steps:
            ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(step))
            cross_entropy(model(ids[:, :-1]), model.head_weight, ids[:, 1:]).backward()
            optimizer_step(model, optimizers, adamw(), ALONE)

    whole = fresh()
    train(*whole, range(6))
    first = fresh()
    train(*first, range(3))
    stored = bytes_of([first[0].state_dict(), [optimizer.state_dict() for optimizer in first[1]]])
    weights, states = torch.load(io.BytesIO(stored), weights_only=True)
    second = fresh()
    second[0].load_state_dict(weights)
    for optimizer, state in zip(second[1], states):
        optimizer.load_state_dict(state)
    train(*second, range(3, 6))
    for a, b in zip(whole[0].parameters(), second[0].parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer, spoilt", [("adamw", "embed.weight"), ("muon", "embed.weight"),
                                               ("muon", "blocks.0.attn.qkv.weight")])
def test_the_scaler_decides_once_for_all_optimizers(optimizer, spoilt):
    """fp16: one infinite gradient anywhere, and no optimizer steps; half a step would tear the model in two."""
    model = random_model("llama")
    cfg = adamw(optimizer=optimizer)
    optimizers = make_optimizers(model, cfg)
    env = Env(0, 1, torch.device("cpu"), torch.float16)
    assert env.scaler.is_enabled()
    params = dict(model.named_parameters())

    def step(bad):
        for name, p in params.items():
            p.grad = env.scaler.scale(torch.full_like(p, 0.01))
            if name == bad:
                p.grad.view(-1)[0] = torch.inf
        before = {name: p.detach().clone() for name, p in params.items()}
        norm = optimizer_step(model, optimizers, cfg, env)
        return norm, {name for name, p in params.items() if not torch.equal(p, before[name])}

    norm, moved = step(None)
    assert math.isfinite(norm) and moved == params.keys()
    scale = env.scaler.get_scale()
    norm, moved = step(spoilt)
    assert not math.isfinite(norm) and moved == set()
    assert env.scaler.get_scale() == scale / 2
    norm, moved = step(None)
    assert math.isfinite(norm) and moved == params.keys()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights(optimizer, bad):
    model = random_model("llama")
    cfg = adamw(optimizer=optimizer, out_dir="out/here", lr=0.25)
    optimizers = make_optimizers(model, cfg)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.norm.weight.grad[3] = bad
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(SystemExit, match="the gradient's norm is (nan|inf). out/here/ckpt.pt is the last good .*0.25"):
        optimizer_step(model, optimizers, cfg, ALONE)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------------------- several processes


@pytest.fixture
def group_of_one(tmp_path):
    """A process group whose only member we are, told that it is one of two: enough for DDP to do all its work."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield Env(0, 2, torch.device("cpu"), torch.float32)
    dist.destroy_process_group()


def test_gradients_travel_while_the_backward_pass_still_runs(group_of_one):
    """The last layers' gradients travel before the first layers' are made; and only in the last micro-step."""
    model = Transformer(config_of("llama", dim=128, n_layers=6, hidden_dim=512, tie_embeddings=False)).train()
    net = parallel(model, group_of_one)
    events = []

    def reduce(state, bucket):
        events.append("bucket")
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    net.register_comm_hook(None, reduce)
    model.blocks[0].attn.qkv.weight.register_post_accumulate_grad_hook(lambda p: events.append("first block"))
    ids = torch.randint(0, V, (2, 16))
    for sync in (True, True, False, True):
        events.clear()
        net.require_backward_grad_sync = sync
        cross_entropy(net(ids), model.head_weight, ids).backward()
        if not sync:
            assert events == ["first block"]
    # the first step has one bucket; from the second on DDP has several, in the order in which gradients are made
    assert events == ["bucket", "first block", "bucket"]
    assert net.config is model.config and net.head_weight is model.head_weight  # the wrapper shows the model's own


def test_alone_nothing_is_wrapped():
    model = random_model("llama")
    assert parallel(model, ALONE) is model


# ---------------------------------------------------------------------------- the machine


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 NVL", 989), ("NVIDIA H20", 148),
    ("NVIDIA H200", 989), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71), ("Tesla T4", 65),
    ("Tesla V100-SXM2-16GB", 125), ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA L40", 181),
    ("NVIDIA RTX A6000", 155), ("NVIDIA GeForce RTX 4060 Ti", 30), ("NVIDIA A800-SXM4-80GB", 312),
    # whole words only: these hold a known name, and are other cards
    ("NVIDIA RTX A1000", 0), ("NVIDIA RTX A1000 Laptop GPU", 0), ("NVIDIA A100X", 0), ("NVIDIA A10G", 0),
    ("NVIDIA T400 4GB", 0), ("NVIDIA GeForce GTX 1080", 0), ("NVIDIA GeForce RTX 2060", 0), ("", 0),
    ("NVIDIA RTX 6000 Ada Generation", 0), ("AMD Instinct MI300X", 0)])
def test_names_of_gpus(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_flops(Env(0, 1, torch.device("cuda"), torch.bfloat16)) == tflops * 1e12
    assert peak_flops(ALONE) == 0


def test_importing_has_no_side_effects():
    """Nothing is printed, started or written when a file is imported."""
    files = [name[:-3] for name in os.listdir(ROOT) if name.endswith(".py")]
    code = f"import signal, torch; before = signal.getsignal(signal.SIGTERM)\nimport {', '.join(files)}\n" \
           "assert signal.getsignal(signal.SIGTERM) == before\n" \
           "assert not torch.distributed.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------------------- compiling


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def train_a_little(model, steps, rows=2, autocast=False):
    """Train for some steps on random rows of 16 tokens; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        ids = torch.randint(0, V, (rows, 17), generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(model(ids[:, :-1]), model.head_weight, ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model, "update_router_bias"):
            model.update_router_bias(0.001)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama_gqa", "dots1"])
def test_blocks_are_compiled_whole_and_once(kind, autocast, fresh_dynamo):
    """No graph breaks (fullgraph), one graph for all blocks of a kind, and no other one in later steps."""
    model = random_model(kind, 1, n_layers=4).train()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    kinds = 2 if kind == "dots1" else 1  # the first block of dots1 is dense
    with torch._dynamo.config.patch(error_on_recompile=kinds == 1):
        losses = train_a_little(model, 1, autocast=autocast)
    assert fresh_dynamo["unique_graphs"] == kinds
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train_a_little(model, 4, autocast=autocast)
    assert fresh_dynamo["unique_graphs"] == kinds
    assert all(map(math.isfinite, losses))
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("kind", ["llama_gqa", "dots1"])
def test_blocks_that_keep_little_can_be_compiled(kind, fresh_dynamo):
    """--checkpoint_blocks and compile together: the losses of the plain model."""
    wanted = train_a_little(random_model(kind, 1).train(), 3)
    model = random_model(kind, 1).train()
    model.checkpoint_blocks = True
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert train_a_little(model, 3) == pytest.approx(wanted, abs=1e-5)


def test_sampling_compiles_nothing(fresh_dynamo):
    """A sample between two steps of a compiled run: a graph for each length of the cache would take minutes."""
    from common.generate import generate
    model = random_model("llama_gqa", 1).train()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    train_a_little(model, 1)
    graphs = fresh_dynamo["unique_graphs"]
    with no_grad_eval(model):
        generate(model, [[1, 2, 3]], 12)
        generate(model, [[1, 2, 3], [4]], 12)
    train_a_little(model, 1)
    assert fresh_dynamo["unique_graphs"] == graphs


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_mixture_of_experts_trains_in_fp32(fresh_dynamo):
    """With the real compiler, which knows no grouped product in fp32 of its own: the losses of the plain model.
    The mixture alone, as compiling takes a while; test_pretrain.py compiles whole blocks."""
    changes = dict(n_layers=1, first_dense=0, n_shared_experts=0)
    wanted = train_a_little(random_model("dots1", 1, **changes).train(), 4)
    model = random_model("dots1", 1, **changes).train()
    model.blocks[0].ffn.compile(fullgraph=True)
    assert train_a_little(model, 4) == pytest.approx(wanted, abs=1e-4)
    assert fresh_dynamo["unique_graphs"] == 1


def test_without_a_compiler_it_runs_uncompiled(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = random_model("llama")
    compile_blocks(model, SimpleNamespace(compile=True), ALONE)
    assert "a C++ compiler is missing, so the model runs uncompiled" in capsys.readouterr().out
    compile_blocks(model, SimpleNamespace(compile=False), ALONE)
    assert capsys.readouterr().out == ""
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_data_that_was_prepared_anew_is_said(tmp_path, tokenizer, capsys):
    meta = tmp_path / "data" / "meta.json"
    meta.parent.mkdir()
    meta.write_text('{"train": {"tokens": 100}}')
    model, cfg, optimizers = a_run(tmp_path / "run", tokenizer, data_dir=str(meta.parent))
    for tokens, said in ((100, "settings changed since: none"), (50, "'the data itself': {'tokens': 50}")):
        meta.write_text(f'{{"train": {{"tokens": {tokens}}}}}')
        env = Env(0, 1, torch.device("cpu"), torch.float32)
        resume(cfg, env, model, optimizers, tokenizer)
        env.lock.close()
        assert said in capsys.readouterr().out


def test_a_checkpoint_that_says_nothing_of_its_data_is_no_change(tmp_path, tokenizer, capsys):
    """As those of older versions: that the data are others is not known."""
    meta = tmp_path / "data" / "meta.json"
    meta.parent.mkdir()
    meta.write_text('{"train": {"tokens": 100}}')
    model, cfg, optimizers = a_run(tmp_path / "run", tokenizer, data_dir=str(meta.parent))
    path = str(tmp_path / "run" / "ckpt.pt")
    checkpoint = load_checkpoint(path)
    del checkpoint["data"]
    save_checkpoint(path, checkpoint)
    env = Env(0, 1, torch.device("cpu"), torch.float32)
    resume(cfg, env, model, optimizers, tokenizer)
    env.lock.close()
    assert "settings changed since: none" in capsys.readouterr().out
