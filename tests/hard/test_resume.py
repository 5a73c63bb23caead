"""Which run may go on in a folder, and what is said of what has changed since."""
import dataclasses
import os

import pytest
import torch
from oracles import config_of
from small_runs import CPU, assert_same

import dpo
import grpo
import ppo
import pretrain
import reward
import sft
from common.checkpoint import load_checkpoint, own, save_checkpoint
from common.distributed import Env
from common.optim import make_optimizers
from model import Transformer
from test_checkpoint import a_run, contents, go_on, other_tokenizer, refuses, save_run, tokenizer  # noqa: F401


@pytest.mark.parametrize("spelled", ["run", "run/", "./run", "run/ckpt.pt", "run/best.pt", "link"])
def test_a_stage_never_writes_to_the_folder_it_starts_from(tmp_path, monkeypatch, spelled):
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    os.symlink("run", "link")
    refuses(lambda: own(sft.Config(out_dir="run"), CPU, spelled), "out_dir=run is the run that this one starts from")
    assert not os.listdir("run")


def test_another_model_or_tokenizer_is_refused_by_name(tmp_path, tokenizer, other_tokenizer):
    model, cfg, optimizers = a_run(tmp_path, tokenizer, kind="llama")
    other = Transformer(config_of("llama", n_layers=3, hidden_dim=64))
    refuses(lambda: go_on(pretrain, cfg, other, optimizers, tokenizer), "n_layers=2 there, 3 here",
            "hidden_dim=80 there, 64 here")
    refuses(lambda: go_on(pretrain, cfg, model, optimizers, other_tokenizer),
            f"tokenizer={tokenizer.fingerprint[:12]} there, {other_tokenizer.fingerprint[:12]} here")


@pytest.mark.parametrize("lacking", [{"config": {}}, {"optimizers": []}])
def test_imported_and_merged_weights_are_no_run_to_go_on_with(tmp_path, tokenizer, lacking):
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    save_checkpoint(str(tmp_path / "ckpt.pt"), {**load_checkpoint(str(tmp_path)), **lacking})
    refuses(lambda: go_on(pretrain, cfg, model, optimizers, tokenizer), "holds weights alone (imported or merged)")


@pytest.mark.parametrize("change", [
    dict(batch_size=8, grad_accum=1), dict(batch_size=2, grad_accum=4), dict(data_dir="./data/poems/"),
    dict(data_dir=os.path.abspath("data/poems"))])
def test_the_same_run_said_otherwise_goes_on(tmp_path, tokenizer, change):
    """4 rows twice are 8 rows once, and a folder can be spelled in several ways."""
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    assert go_on(pretrain, dataclasses.replace(cfg, **change), model, optimizers, tokenizer) == 7
    assert go_on(pretrain, dataclasses.replace(cfg, resume=False), model, optimizers, tokenizer) == 0


def test_a_resumed_run_follows_changed_rates(tmp_path, tokenizer):
    """The averages of the optimizers are the checkpoint's; lr, decay and momentum are what the settings say now."""
    model, cfg, optimizers = a_run(tmp_path, tokenizer, optimizer="muon")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    save_run(pretrain, cfg, model, optimizers, tokenizer)
    lower = dataclasses.replace(cfg, lr=3e-4, weight_decay=0.5, momentum=0.5)
    again = make_optimizers(model, lower, CPU)
    go_on(pretrain, lower, model, again, tokenizer)
    adam, muon = again
    assert {group["peak_lr"] for group in adam.param_groups + muon.param_groups} == {3e-4}
    assert {group["weight_decay"] for group in muon.param_groups} == {0.5}
    assert {group["momentum"] for group in muon.param_groups} == {0.5}
    for before, after in zip(optimizers, again):
        assert_same(before.state_dict()["state"], after.state_dict()["state"])


def test_a_run_in_bf16_goes_on_in_fp16(tmp_path, tokenizer):
    """As on an older GPU: the checkpoint has no scale of losses yet."""
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    env = Env(0, 1, torch.device("cpu"), torch.float16)
    assert env.scaler.is_enabled() and load_checkpoint(str(tmp_path))["scaler"] == {}
    assert go_on(pretrain, cfg, model, optimizers, tokenizer, env) == 7


def test_what_has_changed_is_said(tmp_path, tokenizer, capsys):
    """Settings by name; data of another size were prepared anew, and come in another order from here on."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.bin").write_bytes(b"x" * 100)
    model, cfg, optimizers = a_run(tmp_path / "run", tokenizer, data_dir=str(data))
    go_on(pretrain, cfg, model, optimizers, tokenizer)
    assert "at step 7 of 1000; settings changed since: none" in capsys.readouterr().out
    (data / "train.bin").write_bytes(b"x" * 50)
    go_on(pretrain, dataclasses.replace(cfg, lr=5e-3, max_steps=7), model, optimizers, tokenizer)
    out = capsys.readouterr().out
    assert "settings changed since: {'max_steps': 7, 'lr': 0.005, 'the data itself': 'prepared anew'}" in out
    assert "it is finished: raise --max_steps" in out


@pytest.mark.parametrize("stage, change", [
    *((pretrain, change) for change in (
        dict(seq_len=8), dict(optimizer="muon"), dict(seed=5), dict(data_dir="data/other"), dict(init_from="out/a"))),
    (sft, dict(init_from="out/b")), (sft, dict(teacher="out/c")), (dpo, dict(loss="ipo")), (reward, dict(centre=0.0)),
    (ppo, dict(data_dir="data/other")), (grpo, dict(advantage="rloo")), (grpo, dict(group_size=2)),
    *((stage, dict(batch_size=8)) for stage in (pretrain, ppo, grpo))])
def test_a_run_with_other_settings_is_another_run(tmp_path, tokenizer, stage, change):
    """Which rows a step holds follows from its number: with other batches, rows would be left out or learned twice."""
    model, cfg, optimizers = a_run(tmp_path, tokenizer, stage)
    before = contents(tmp_path)
    refuses(lambda: go_on(stage, dataclasses.replace(cfg, **change), model, optimizers, tokenizer),
            "is of another run: ", next(iter(change)), "--out_dir", "--resume=False")
    assert contents(tmp_path) == before
