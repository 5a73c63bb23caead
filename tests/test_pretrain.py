"""pretrain.py: which rows a step sees, that micro-steps are one batch, and a run that learns, saves and says what
is wrong."""
import dataclasses
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import CPU, assert_same, refused, run, settings, write_folder

import pretrain
from common.checkpoint import load_checkpoint, load_model
from common.data import open_data
from common.generate import generate
from model import ModelConfig, Transformer
from pretrain import get_batch
from tokenizer import train_tokenizer


def test_which_rows_a_step_sees_depends_on_seed_step_and_micro_step_alone():
    cfg = pretrain.Config(batch_size=4, grad_accum=2, seq_len=8)
    tokens = np.arange(10_000, dtype=np.uint16)
    rows = lambda cfg, step, micro: get_batch(tokens, cfg, step, micro, CPU.device)[0][:, 0].tolist()  # noqa: E731
    first = [rows(cfg, step, micro) for step in range(3) for micro in range(2)]
    assert first == [rows(cfg, step, micro) for step in range(3) for micro in range(2)]
    assert len(set(sum(first, []))) > 22 and rows(dataclasses.replace(cfg, seed=5), 0, 0) != first[0]
    # 2 micro-steps of 4 rows are 1 of 8: the same step, shared out otherwise
    assert rows(dataclasses.replace(cfg, batch_size=8, grad_accum=1), 1, 0) == first[2] + first[3]


def test_the_gradient_is_that_of_one_large_batch(place, tmp_path):
    """Two micro-steps of 4 rows give the loss and the gradient norm of the 8 rows together, from whole logits."""
    cfg = settings(place[0], "pretrain", str(tmp_path), max_steps=1)
    checkpoint, (record,) = run(cfg)
    torch.manual_seed(cfg.seed)
    model = Transformer(ModelConfig(**checkpoint["model_config"]))
    tokens = open_data(cfg.data_dir)[0].tokens
    x, y = (torch.cat(parts) for parts in zip(*(get_batch(tokens, cfg, 0, i, CPU.device) for i in range(2))))
    loss = F.cross_entropy(model.logits(model(x)).flatten(0, 1), y.flatten())
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["norm"] == pytest.approx(norm, rel=1e-4)


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Counting songs, letter by letter: after a number comes the next, so there is something to learn."""
    root = str(tmp_path_factory.mktemp("songs"))
    numbers = "一二三四五六七八九十"
    tok = train_tokenizer([numbers * 9], f"{root}/tok", 320)
    one = [token for letter in numbers for token in tok.encode(letter)]
    text = sum(([tok.eot_id] + one[i:] + one + one[:i] for i in range(10)), [])
    write_folder(f"{root}/data", tok, "text", {"train": text * 20, "val": text[:300]})
    return root, tok


def test_it_learns_saves_and_can_be_loaded(songs, tmp_path, capsys):
    root, tok = songs
    cfg = settings(root, "pretrain", str(tmp_path), data_dir="data", max_steps=60, eval_every=20, lr=1e-2,
                   sample_start="一二")
    checkpoint, records = run(cfg)
    out = capsys.readouterr().out
    assert [r["step"] for r in records] == list(range(1, 61))
    assert records[0]["loss"] == pytest.approx(math.log(320), abs=0.3)
    assert records[-1]["loss"] < 0.8 and records[-1]["val_loss"] < 0.8
    assert [r["step"] for r in records if "val_loss" in r] == [20, 40, 60]
    assert out.count("step 7/60 | loss") == 1 and out.count("sample: 一二") == 3
    assert sorted(os.listdir(tmp_path)) == [".lock", "best.pt", "ckpt.pt", "log.jsonl", "tokenizer.model"]
    assert checkpoint["stage"] == "pretrain" and checkpoint["step"] == 60
    assert checkpoint["fingerprint"] == tok.fingerprint and checkpoint["config"] == dataclasses.asdict(cfg)
    assert all(w.dtype == torch.float32 for w in checkpoint["model"].values())
    assert checkpoint["model_config"]["vocab_size"] == 64 * math.ceil(tok.vocab_size / 64)
    model, tokenizer, _ = load_model(str(tmp_path))
    prompt = [tok.eot_id] + [token for letter in "一二三四五" for token in tok.encode(letter)]
    assert tokenizer.decode(generate(model, [prompt], 4, temperature=0)[0]) == "六七八九"


def test_best_checkpoint_is_the_lowest_validation_loss(place, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 3.5, 6.0])
    monkeypatch.setattr(pretrain, "text_loss", lambda *args: (next(losses), 1.0))
    last, _ = run(settings(place[0], "pretrain", str(tmp_path), max_steps=10, eval_every=2))
    best = load_checkpoint(f"{tmp_path}/best.pt")
    assert (best["step"], best["best_val"], last["step"], last["best_val"]) == (4, 3.0, 10, 3.0)
    assert not torch.equal(best["model"]["embed.weight"], last["model"]["embed.weight"])


def test_going_on_with_another_text(place, tmp_path):
    """--init_from: weights of a run, of which the shape comes too, and its tokenizer must be that of the text."""
    root, tok = place
    cfg = pretrain.Config(init_from=f"{root}/base", data_dir=f"{root}/text", out_dir=f"{tmp_path}/run", lr=1e-30,
                          min_lr=1e-30, max_steps=1, seq_len=32, batch_size=4, device="cpu", dtype="float32", compile=False)
    still, _ = run(cfg)
    base = load_checkpoint(f"{root}/base")
    assert_same(dict(still["model"]), dict(base["model"]), atol=1e-9)
    assert still["model_config"] == base["model_config"]
    assert "{'dim': 64} would change nothing" in refused(dataclasses.replace(cfg, dim=64))
    other = train_tokenizer(["春夏秋冬"] * 9, f"{tmp_path}/tok", 300)
    write_folder(f"{tmp_path}/data", other, "text", {"train": [5, 6, 7] * 50, "val": []})
    words = refused(dataclasses.replace(cfg, data_dir=f"{tmp_path}/data"))
    assert "tokenizer than" in words and f"--tokenizer={root}/base" in words
