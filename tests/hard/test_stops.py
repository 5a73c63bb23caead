"""Runs that end early: signals, locks, crashes, numbers that are not finite. What they leave is whole, and they go
on."""
import dataclasses
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from small_runs import CPU, MOE, STAGES, assert_same, forget_run, read_log, refused, run, settings

import dpo
import grpo
import ppo
import pretrain
import reward
import sft
from common.checkpoint import catch_signals, load_checkpoint, own
from common.distributed import Env

MODULES = {module.STAGE: module for module in (pretrain, sft, reward, ppo, grpo, dpo)}


def env_of(rank=0, world=1):
    return Env(rank, world, torch.device("cpu"), torch.float32)


def stop_during(monkeypatch, stage, at, how):
    """Let step `at` (counted from 0) be interrupted by how()."""
    real = stage.lr_at

    def interrupted(step, cfg, *decay):
        if step == at:
            monkeypatch.setattr(stage, "lr_at", real)
            how()
        return real(step, cfg, *decay)

    monkeypatch.setattr(stage, "lr_at", interrupted)


def crash():
    raise KeyError("power cut")


# ---------------------------------------------------------------------------- signals and crashes


@pytest.mark.parametrize("stage, changes", [
    *((stage, {}) for stage in STAGES), ("pretrain", dict(MOE, optimizer="muon", adam_lr=5e-3, decay_steps=6)),
    ("sft", dict(optimizer="muon", adam_lr=5e-4, weight_decay=0.1)), ("grpo", dict(advantage="rloo"))])
@pytest.mark.parametrize("how", ["SIGTERM", "crash"])
def test_what_was_stopped_goes_on_to_the_same_end(place, tmp_path, monkeypatch, capsys, stage, changes, how):
    """SIGTERM in the sixth step: it is finished (or, before an update, left) and saved. A crash there: saved was
    step 4; what came after leaves the log. The same command then ends where the run ends that nobody stopped, to
    the last bit."""
    whole = settings(place[0], stage, f"{tmp_path}/whole", **changes)
    a, log = run(whole)
    parts = dataclasses.replace(whole, out_dir=f"{tmp_path}/parts")
    capsys.readouterr()
    if how == "crash":
        stop_during(monkeypatch, MODULES[stage], 5, crash)
        with pytest.raises(KeyError):
            run(parts)
        assert load_checkpoint(parts.out_dir)["step"] == 4 and read_log(parts.out_dir)[-1]["step"] == 5
    else:
        stop_during(monkeypatch, MODULES[stage], 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as left:
            run(parts)
        step = 5 if stage in ("ppo", "grpo") else 6
        said = f"ckpt.pt: step {step}, stopped by SIGTERM; the same command goes on from here."
        assert left.value.code == 3 and said in capsys.readouterr().out  # `pretrain.py … && sft.py …` must not go on
        assert load_checkpoint(parts.out_dir)["step"] == step
    forget_run()
    torch.manual_seed(999)  # what ran in between does not matter
    b, other = run(parts)
    assert_same(a, b)
    assert log == other
    if os.path.exists(f"{whole.out_dir}/best.pt"):
        assert_same(*(load_checkpoint(f"{cfg.out_dir}/best.pt") for cfg in (whole, parts)))


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_all_processes_stop_where_one_was_asked_to(place, tmp_path, monkeypatch, capsys, stage):
    """Another process got the signal, in the third step: ours saves and ends with it."""
    module = MODULES[stage]
    real = module.all_sum
    calls = []

    def all_sum(values, env):
        *sums, stop = real(values, env)
        calls.append(values)
        return *sums, stop + (len(calls) == 3)

    monkeypatch.setattr(module, "all_sum", all_sum)
    cfg = settings(place[0], stage, str(tmp_path))
    with pytest.raises(SystemExit):
        run(cfg)
    forget_run()
    assert "step 3, stopped by another process; the same command goes on from here." in capsys.readouterr().out
    assert load_checkpoint(cfg.out_dir)["step"] == 3
    monkeypatch.undo()
    assert len(run(cfg)[1]) == 8


def test_nohup_holds():
    """What was ignored when the run began, as nohup ignores SIGHUP, stays ignored; the rest is caught."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    env = env_of()
    catch_signals(env)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    assert env.signals == ["SIGTERM"]


def test_a_finished_run_is_left_as_it_is_and_can_begin_anew(place, tmp_path, capsys):
    cfg = settings(place[0], "pretrain", str(tmp_path), max_steps=3)
    before, _ = run(cfg)
    capsys.readouterr()
    after, log = run(cfg)
    assert "it is finished: raise --max_steps" in capsys.readouterr().out
    assert_same(before, after)
    assert len(log) == 3
    checkpoint, log = run(dataclasses.replace(cfg, resume=False, max_steps=2))
    assert checkpoint["step"] == len(log) == 2


# ---------------------------------------------------------------------------- one writer


def test_two_runs_cannot_write_one_folder(tmp_path):
    cfg = pretrain.Config(out_dir=str(tmp_path / "run"))
    first = env_of()
    own(cfg, first)
    with pytest.raises(SystemExit, match=f"another process is writing to {cfg.out_dir}. Wait for it, or choose "):
        own(cfg, env_of())
    own(cfg, env_of(1, 2))  # the other ranks of one run write nothing
    own(pretrain.Config(out_dir=str(tmp_path / "other")), env_of())
    first.lock.close()
    own(cfg, env_of())


def test_a_run_that_has_ended_leaves_its_folder(place, tmp_path):
    """Also within one process, as in a notebook: what holds the folder goes when main() returns."""
    cfg = settings(place[0], "pretrain", str(tmp_path), max_steps=1)
    pretrain.main(cfg)
    pretrain.main(dataclasses.replace(cfg, max_steps=2))
    assert load_checkpoint(cfg.out_dir)["step"] == 2


def test_the_lock_goes_with_the_process(tmp_path):
    """However a process ends, also by kill -9, its folder is free."""
    code = ("import sys, time, torch, pretrain\nfrom common.checkpoint import own\nfrom common.distributed import Env\n"
            "env = Env(0, 1, torch.device('cpu'), torch.float32)\n"
            "own(pretrain.Config(out_dir=sys.argv[1]), env)\nprint('locked', flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    cfg = pretrain.Config(out_dir=str(tmp_path))
    with pytest.raises(SystemExit, match="another process is writing"):
        own(cfg, env_of())
    process.kill()
    process.communicate()
    own(cfg, env_of())


# ---------------------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights(place, tmp_path, monkeypatch, stage):
    """The loss may be fine and its gradient not: the weights must not be spoilt, nor replace the good ones on disk."""
    module = MODULES[stage]
    cfg = settings(place[0], stage, str(tmp_path), eval_every=1)
    real = module.clip_grad_norm_
    models = []

    def clip(parameters, limit):
        parameters = list(parameters)
        models.append([p.detach().clone() for p in parameters])
        if len(models) > 12:
            parameters[0].grad[0] = math.nan
        norm = real(parameters, limit)
        models[-1] = (models[-1], parameters, norm)
        return norm

    monkeypatch.setattr(module, "clip_grad_norm_", clip)
    message = refused(dataclasses.replace(cfg, max_steps=20))
    assert "the gradient's norm is nan" in message and f"{cfg.out_dir}/ckpt.pt is the last good checkpoint" in message
    before, parameters, _ = models[-1]
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(w.isfinite().all() for w in load_checkpoint(cfg.out_dir)["model"].values())


def test_a_learning_rate_far_too_large_ends_in_one_line(place, tmp_path):
    cfg = settings(place[0], "pretrain", str(tmp_path), lr=1e30, warmup_steps=0, max_steps=30, eval_every=1)
    message = refused(cfg)
    assert f"{tmp_path}/ckpt.pt" in message and "--lr (now 1e+30)" in message
    assert all(w.isfinite().all() for w in load_checkpoint(str(tmp_path))["model"].values())


@pytest.mark.parametrize("stage, changes, spoilt", [
    ("pretrain", {}, "embed.weight"), ("pretrain", dict(optimizer="muon"), "embed.weight"),
    ("pretrain", dict(optimizer="muon"), "blocks.0.attn.qkv.weight"), ("sft", dict(optimizer="muon"), "norm.weight"),
    ("reward", {}, "trunk.norm.weight"), ("dpo", {}, "norm.weight")])
def test_the_scaler_decides_once_for_all_optimizers(place, tmp_path, monkeypatch, stage, changes, spoilt):
    """fp16: one infinite gradient anywhere, and no optimizer steps; half a step would tear the model in two. The
    scale is halved, and the run goes on."""
    module = MODULES[stage]
    env = Env(0, 1, torch.device("cpu"), torch.float16)
    env.autocast = CPU.autocast  # the matmuls themselves stay in fp32
    env.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    monkeypatch.setattr(module, "start", lambda cfg, dtype: env)
    seen = []
    real = module.clip_grad_norm_

    def spoil(at):
        def hook(grad):
            return grad + math.inf if len(seen) == at else grad
        return hook

    def clip(parameters, limit):
        parameters = list(parameters)
        norm = real(parameters, limit)
        seen.append(([p.detach().clone() for p in parameters], env.scaler.get_scale()))
        return norm

    def find(stage_name, same, cfg, env, model, tokenizer):
        dict(model.named_parameters())[spoilt].register_hook(spoil(2))
        return None

    monkeypatch.setattr(module, "clip_grad_norm_", clip)
    monkeypatch.setattr(module, "find", find)
    run(settings(place[0], stage, str(tmp_path), max_steps=4, **changes))
    weights, scales = zip(*seen)
    assert scales == (16, 16, 16, 8)
    moved = [[not torch.equal(a, b) for a, b in zip(weights[i], weights[i + 1])] for i in range(3)]
    learns = moved[0]
    assert any(learns) and moved[1] == learns and not any(moved[2])


def test_a_step_is_saved_before_its_answers_are_printed(place, tmp_path, monkeypatch):
    """Whatever happens while answers are looked at, the step is on the disk."""
    cfg = settings(place[0], "sft", str(tmp_path), eval_every=2)
    saved = []

    def print_answers(*_):
        saved.append((load_checkpoint(cfg.out_dir)["step"], load_checkpoint(f"{cfg.out_dir}/best.pt")["step"]))
        raise RuntimeError("no console")

    monkeypatch.setattr(sft, "print_answers", print_answers)
    with pytest.raises(RuntimeError, match="no console"):
        run(cfg)
    assert saved == [(2, 2)]
