"""common/checkpoint.py: what a run leaves on disk, which run may go on from it, and the log."""
import dataclasses
import json
import math
import os

import pytest
import torch
from oracles import V, config_of, random_model
from small_runs import CPU, assert_same

import dpo
import grpo
import ppo
import pretrain
import reward
import sft
from common.checkpoint import (
    find, load_checkpoint, load_model, load_reward_model, log, newest_run, own, restore, save, save_checkpoint, trim_log)
from common.distributed import Env
from common.optim import make_optimizers
from model import Transformer
from tokenizer import train_tokenizer

TEXTS = ["一二三四五六七八九十", "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, str(tmp_path_factory.mktemp("one") / "tokenizer.model"), 300)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS + ["春夏秋冬东南西北"] * 3, str(tmp_path_factory.mktemp("two") / "tok.model"), 310)


def a_run(folder, tokenizer, stage=pretrain, kind="dots1", **changes):
    """Save a run of one of the stages with a random model; return (model, cfg, optimizers)."""
    model = random_model(kind)
    length = {"seq_len": 16} if stage in (pretrain, sft) else {}
    cfg = stage.Config(out_dir=str(folder), batch_size=4, grad_accum=2, **{**length, **changes})
    if not hasattr(cfg, "optimizer"):
        cfg.optimizer = "adamw"  # for make_optimizers
    optimizers = make_optimizers(model, cfg, CPU)
    save_run(stage, cfg, model, optimizers, tokenizer)
    return model, cfg, optimizers


def save_run(stage, cfg, model, optimizers, tokenizer, step=7, **extra):
    os.makedirs(cfg.out_dir, exist_ok=True)
    save("ckpt.pt", stage.STAGE, cfg, CPU, step, model, optimizers, tokenizer, best_val=math.inf, **extra)


def go_on(stage, cfg, model, optimizers, tokenizer, env=CPU):
    """What a stage does before its loop; return the step that it begins with."""
    return restore(find(stage.STAGE, stage.SAME, cfg, env, model, tokenizer), model, optimizers, env)[0]


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def refuses(call, *words):
    """The call must end with one line that has these words."""
    with pytest.raises(SystemExit) as left:
        call()
    message = str(left.value)
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message, message


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
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    ids = torch.randint(0, V, (1, 9))
    assert torch.equal(again(ids), model(ids))


def test_a_checkpoint_that_lacks_or_adds_a_weight_is_refused(tmp_path, tokenizer):
    a_run(tmp_path, tokenizer, kind="llama")
    for change in (lambda w: w.pop("norm.weight"), lambda w: w.update(extra=torch.zeros(1))):
        checkpoint = load_checkpoint(str(tmp_path))
        change(checkpoint["model"])
        save_checkpoint(str(tmp_path / "changed.pt"), checkpoint)
        with pytest.raises(RuntimeError, match="norm.weight|extra"):
            load_model(str(tmp_path / "changed.pt"))


def test_who_may_load_what(tmp_path, tokenizer, other_tokenizer):
    """A reward model writes no text, no other run scores, and a model is used with its own tokenizer alone."""
    path = str(tmp_path)
    a_run(tmp_path, tokenizer)
    refuses(lambda: load_checkpoint(path + "/none"), "no checkpoint at")
    refuses(lambda: load_reward_model(path), "is a run of pretrain.py, wanted one of reward.py")
    other_tokenizer.save(path + "/tokenizer.model")
    refuses(lambda: load_model(path), other_tokenizer.fingerprint[:12], tokenizer.fingerprint[:12])
    save_checkpoint(path + "/ckpt.pt", {**load_checkpoint(path), "stage": "reward"})
    refuses(lambda: load_model(path), "is a reward model: it scores answers and writes none")
    refuses(lambda: load_reward_model(path, fingerprint="f" * 64), "was trained with another tokenizer", "f" * 12)


def test_the_tokenizer_beside_a_checkpoint_is_the_one_it_was_trained_with(tmp_path, tokenizer, other_tokenizer):
    """Also after a start with other data in the same folder, and where a full disk has left half of it."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.data[:100])
    for tok in (tokenizer, other_tokenizer, other_tokenizer):
        a_run(tmp_path, tok)
        assert (tmp_path / "tokenizer.model").read_bytes() == tok.data


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


def test_newest_run(tmp_path):
    for i, (name, stage) in enumerate((("a", "pretrain"), ("b", "sft"), ("c", "reward"), ("d", None))):
        os.makedirs(tmp_path / name)  # d: a run that has saved nothing yet
        if stage:
            save_checkpoint(f"{tmp_path}/{name}/ckpt.pt", {"stage": stage, "model": {}, "model_config": {},
                                                           "fingerprint": ""})
            os.utime(f"{tmp_path}/{name}/ckpt.pt", (1000 + i, 1000 + i))
    assert newest_run(["pretrain", "sft", "reward"], str(tmp_path)) == str(tmp_path / "c")
    assert newest_run(["pretrain", "sft"], str(tmp_path)) == str(tmp_path / "b")
    for root in (str(tmp_path), str(tmp_path / "none")):
        refuses(lambda: newest_run(["ppo"], root), "Train one first")


# ---------------------------------------------------------------------------- going on


@pytest.mark.parametrize("resume", [True, False])
def test_another_stages_run_is_refused_and_untouched(tmp_path, tokenizer, resume):
    """Also with --resume=False: a finished pretraining must not be lost to a wrong --out_dir."""
    model, cfg, optimizers = a_run(tmp_path, tokenizer)
    before = contents(tmp_path)
    other = sft.Config(out_dir=cfg.out_dir, batch_size=4, grad_accum=2, resume=resume)
    refuses(lambda: go_on(sft, other, model, optimizers, tokenizer),
            "holds a run of pretrain.py, and sft.py would overwrite it. Choose another --out_dir")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("spelled", ["run", "run/", "./run", "run/ckpt.pt", "run/best.pt", "link"])
def test_a_stage_never_writes_to_the_folder_it_starts_from(tmp_path, monkeypatch, spelled):
    monkeypatch.chdir(tmp_path)
    os.mkdir("run")
    os.symlink("run", "link")
    refuses(lambda: own(sft.Config(out_dir="run"), CPU, spelled), "out_dir=run is the run that this one starts from")
    assert not os.listdir("run")


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
    assert "settings changed since: {'max_steps': 7, 'lr': 0.005, 'the data itself': 50}" in out
    assert "it is finished: raise --max_steps" in out


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


# ---------------------------------------------------------------------------- log


def test_log_line_and_record(tmp_path, capsys):
    cfg = pretrain.Config(out_dir=str(tmp_path), max_steps=50)
    record = {"loss": 1.23456, "lr": 3e-4, "norm": 2.5, "tok/s": 12345.6, "seconds": 86.65}
    log(cfg, CPU, 7, record)
    assert capsys.readouterr().out == (
        "step 7/50 | loss 1.2346 | lr 3.00e-04 | norm 2.5000 | tok/s 12,346 | seconds 86.6500 | left 1h02m05s\n")
    log(cfg, Env(1, 2, torch.device("cpu"), torch.float32), 8, record)  # other ranks are silent
    assert capsys.readouterr().out == ""
    log(cfg, CPU, 8, {"loss": 1.0})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 7, **record}, {"step": 8, "loss": 1.0}]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', '{"st', "", "[]", "7", "{}", "\0" * 9,
                                  '{"step": 3, "x": "\ud83c'])
def test_a_torn_last_line_is_no_error(tmp_path, torn):
    """Steps that will be done again leave the log. A kill may cut it anywhere, also within a character."""
    cfg = pretrain.Config(out_dir=str(tmp_path), max_steps=9)
    trim_log(cfg, CPU, 3)  # no log, no error
    path = tmp_path / "log.jsonl"
    whole = "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in (1, 2, 5, 6))
    path.write_bytes((whole + torn).encode(errors="surrogatepass"))
    trim_log(cfg, CPU, 3)
    log(cfg, CPU, 4, {"loss": 0.5})
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps[:2] == [1, 2] and steps[-1] == 4 and set(steps[2:-1]) <= {3}
    trim_log(cfg, CPU, 0)
    assert path.read_bytes() == b""
