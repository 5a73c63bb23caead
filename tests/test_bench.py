"""tools/bench.py on tiny models: both sides compute the same, turns are taken one by one, rates are those measured."""
import json
import os
import re

import numpy as np
import pytest
import torch

from common.distributed import Env
from configurator import load_config
from model import ModelConfig, Transformer
from pairs import make_run, one_thread  # noqa: F401
from tools import bench
from tools.bench import Config, load_transformers, main, measure, ratios, run_ours, run_theirs, spread
from tokenizer import train_tokenizer

CPU = Env(0, 1, torch.device("cpu"), torch.float32)
TINY = dict(vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, max_seq_len=64)
FAST = dict(repeats=2, warmup=1, batch_size=2, seq_len=16, batches="1,2", prompt_len=4, new_tokens=6, compile=False,
            device="cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "small", TINY)


def test_measure_takes_turns(monkeypatch):
    """A B A B …; the first turns are not counted; seconds are those of the function alone."""
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    said = []

    def wait(name, seconds):
        said.append(name)
        clock[0] += seconds

    sides = {"a": lambda: wait("a", 1.0), "b": lambda: wait("b", 0.5)}
    seconds, most = measure(sides, Config(repeats=3, warmup=2), CPU)
    assert said == ["a", "b"] * 5 and seconds == {"a": [1.0] * 3, "b": [0.5] * 3} and most == {"a": 0, "b": 0}


def test_spread_and_ratios():
    assert spread([1000.4, 3000.0, 2000.0]) == "2,000 (1,000 – 3,000)" and spread([0.25], 2) == "0.25 (0.25 – 0.25)"
    assert ratios([2.0, 3.0], [1.0, 6.0]) == [2.0, 0.5]
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_settings_are_checked():
    for word, message in (("what=fly", "known are train, moe"), ("repeats=0", "repeats wants"), ("vs=x", "known are")):
        with pytest.raises(SystemExit, match=message):
            load_config(Config, [f"--{word}"])


@pytest.mark.parametrize("changes", [{}, bench.EXPERTS], ids=["dense", "moe"])
def test_theirs_computes_the_same(changes):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**TINY, **changes})).eval()
    theirs = load_transformers(model, Config()).eval()
    ids = torch.randint(96, (2, 20))
    with torch.no_grad():
        assert torch.allclose(model.logits(model(ids)), theirs(ids).logits, atol=1e-5)
    x, y = ids[:, :-1], ids[:, 1:]
    assert abs(bench.our_loss(model, x, y) - bench.their_loss(theirs, x, y)) < 1e-5
    prompts = [torch.randint(1, 96, (n,)).tolist() for n in (3, 1, 7)]
    for stop_ids in ((), [5, 6, 7, 8, 9, 10, 11, 12]):
        ours = run_ours(model, prompts, 12, Config(temperature=0.0), CPU, stop_ids)
        new = run_theirs(theirs, prompts, 12, Config(temperature=0.0), CPU, list(stop_ids) or None)
        assert [row[:len(ids)] for row, ids in zip(new.tolist(), ours)] == ours


def test_without_transformers(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    model = Transformer(ModelConfig(**TINY))
    assert load_transformers(model, Config(vs="none")) is None and load_transformers(model, Config()) is None
    assert capsys.readouterr().out.count("pip install -r requirements-dev.txt") == 1
    for what in ("train", "generate"):
        main(Config(what=what, **FAST))
        out = capsys.readouterr().out
        assert "mingyue" in out and "nan" not in out


def rows_of(out, names):
    """{name: the numbers of its line in the table}."""
    lines = {name: [line for line in out.split("\n") if re.match(rf"{re.escape(name)}\s+[\d]", line)] for name in names}
    return {name: [float(word.replace(",", "")) for word in re.findall(r"\d[\d,.]*", found[-1].removeprefix(name))]
            for name, found in lines.items()}


def test_training_rows(capsys):
    """Both first losses agree; a row a side; the ratio is that of the tokens a second."""
    pytest.importorskip("transformers")
    main(Config(what="train", **FAST))
    out = capsys.readouterr().out
    losses = re.findall(r"first step of (\S+) .* loss ([\d.]+)", out)
    assert [name for name, _ in losses] == ["mingyue", "transformers"]
    assert abs(float(losses[0][1]) - float(losses[1][1])) < 1e-4
    rows = rows_of(out, ["mingyue", "transformers"])
    assert all(rate > 0 for row in rows.values() for rate in row[:3]) and rows["mingyue"][3] == 1
    main(Config(what="moe", **FAST))
    out = capsys.readouterr().out
    assert rows_of(out, ["mingyue moe", "mingyue dense", "transformers"])["mingyue dense"][0] > 0


def test_moe_costs_a_token_what_the_dense_model_costs():
    """Apart from the router: expert_hidden_dim is chosen so."""
    for size, tolerance in (("small", 0.1), ("baby", 0.01)):
        counts = [Transformer(ModelConfig(**{**bench.SIZES[size], "tie_embeddings": False, **more, "n_layers": 2}))
                  .count()[1] for more in ({}, bench.EXPERTS)]
        assert abs(counts[1] / counts[0] - 1) < tolerance


def test_decoding_rows(capsys):
    pytest.importorskip("transformers")
    main(Config(what="generate", **FAST))
    out = capsys.readouterr().out
    rows = rows_of(out, ["1", "2", "2, mixed"])
    for row in rows.values():
        assert len(row) == 10 and row[1] <= row[0] <= row[2] and row[3] > 0  # both sides, a step's time, the ratio


def test_rollout_row(tmp_path, monkeypatch, capsys):
    """Answer tokens a second of a run on the prompts of a data folder, with groups of answers."""
    monkeypatch.chdir(tmp_path)
    tok = train_tokenizer(["春夜月好坏。0123456789 user assistant system\n"], "tok", 300, character_coverage=1.0)
    make_run("out/sft", tok)
    os.makedirs("data/prompts")
    prompts = [tok.encode("春夜"), tok.encode("月"), tok.encode("好坏春")]
    idx = np.cumsum([0] + [len(ids) for ids in prompts]).astype(np.int64)
    for split in ("train", "val"):
        np.array(sum(prompts, []), "<u2").tofile(f"data/prompts/{split}.bin")
        idx.tofile(f"data/prompts/{split}.idx")
    part = {"tokens": int(idx[-1]), "documents": 3}
    json.dump({"kind": "prompts", "dtype": "uint16", "fingerprint": tok.fingerprint, "train": part, "val": part},
              open("data/prompts/meta.json", "w"))
    cfg = Config(what="rollout", run="out/sft", data_dir="data/prompts", n_prompts=3, group_size=2, max_new_tokens=5,
                 vs="none", **FAST)
    main(cfg)
    rate, low, high, length, *_ = rows_of(capsys.readouterr().out, ["mingyue"])["mingyue"]
    assert 0 < low <= rate <= high and 1 <= length <= 5
    with pytest.raises(SystemExit, match="has 3 prompts, n_prompts=64"):
        main(Config(**{**cfg.__dict__, "n_prompts": 64}))


def test_experts_that_get_nothing_are_dead(tmp_path, monkeypatch, capsys):
    """A router that is told to ask experts 0 and 1 alone: each gets half of all, the other two are dead."""
    monkeypatch.chdir(tmp_path)
    tok = train_tokenizer(["春夜月好坏。0123456789 user assistant system\n"], "tok", 300, character_coverage=1.0)
    make_run("out/moe", tok, n_experts=4, n_active_experts=2, n_layers=2, first_dense=1)
    checkpoint = torch.load("out/moe/ckpt.pt")
    checkpoint["model"]["blocks.1.ffn.bias"] = torch.tensor([9.0, 9.0, 0.0, 0.0])
    torch.save(checkpoint, "out/moe/ckpt.pt")
    os.makedirs("data/text")
    for split in ("train", "val"):
        np.arange(200, dtype="<u2").tofile(f"data/text/{split}.bin")
    part = {"tokens": 200, "documents": 1, "bytes": 400}
    json.dump({"kind": "text", "dtype": "uint16", "fingerprint": tok.fingerprint, "train": part, "val": part},
              open("data/text/meta.json", "w"))
    main(Config(what="experts", run="out/moe", data_dir="data/text", **FAST))
    lines = capsys.readouterr().out.splitlines()
    assert "1       0.00                 2.00    2 of 4" in lines
