"""common/checkpoint.py: what a run leaves on disk, which run may go on from it, and the log."""
import dataclasses
import json
import math
import os

import pytest
import torch
from oracles import V, random_model
from small_runs import CPU, assert_same

import pretrain
import sft
from common.checkpoint import find, load_checkpoint, load_model, load_reward_model, log, restore, save, save_checkpoint
from common.distributed import Env
from common.optim import make_optimizers
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
