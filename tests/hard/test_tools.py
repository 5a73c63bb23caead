"""tools/: what it takes to train a model, GPUs' data sheets, logs followed and drawn, sides compared turn by turn."""
import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from oracles import C, V, random_model
from small_runs import CPU, make_run, settings, write_folder

from common.distributed import Env
from configurator import changed, load_config
from model import ModelConfig, Transformer
from tools import bench, estimate, follow, plot
from tools.bench import load_transformers, measure, ratios, run_ours, run_theirs, spread
from tools.machine import count, flops_per_token, peak_flops
from tools.plot import draw, draw_quickstart, draw_runs, means, read


# ---------------------------------------------------------------------------- machine, estimate


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H20", 148), ("NVIDIA H200", 989),
    ("NVIDIA GeForce RTX 4090", 165), ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("NVIDIA L40S", 362),
    ("NVIDIA GeForce RTX 4060 Ti", 30),
    # whole words only: these hold a known name, and are other cards
    ("NVIDIA RTX A1000", 0), ("NVIDIA A100X", 0), ("NVIDIA A10G", 0), ("NVIDIA T400 4GB", 0), ("", 0),
    ("NVIDIA GeForce GTX 1080", 0), ("AMD Instinct MI300X", 0)])
def test_names_of_gpus(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_flops(Env(0, 1, torch.device("cuda"), torch.bfloat16)) == tflops * 1e12
    assert peak_flops(CPU) == 0


def test_counts():
    """Parameters that multiply a token: without the input embedding, and without the experts that it is not sent to."""
    with torch.device("meta"):
        seven = Transformer(ModelConfig(32000, 4096, 32, 32, hidden_dim=11008, max_seq_len=16, tie_embeddings=False))
    assert count(seven) == (6_738_415_616, 6_738_415_616 - 32000 * 4096)
    assert flops_per_token(seven, 100) == 6 * (6_738_415_616 - 32000 * 4096) + 6 * 32 * 4096 * 100
    moe = random_model("dots1")
    total, active = count(moe)
    expert = 3 * C * 16                          # gate, up, down
    assert total == sum(p.numel() for p in moe.parameters())
    assert total - active == V * C + 2 * (8 - 3) * expert  # input embedding; 5 of 8 experts idle in each of 2 layers


LARGE = dict(dim=4096, n_heads=32, n_kv_heads=0, hidden_dim=11008)


def test_estimate(place, tmp_path, capsys):
    """It prints the plan of a large model at once, and makes neither weights nor files."""
    cfg = settings(place[0], "pretrain", f"{tmp_path}/run", **LARGE, n_layers=32, max_seq_len=4096,
                   tie_embeddings=False, batch_size=2, grad_accum=8, max_steps=1000)
    estimate.main(cfg)
    out = capsys.readouterr().out
    vocab = place[1].vocab_size
    vocab += -vocab % 64
    total = 32 * (4 * 4096 ** 2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 2 * vocab * 4096
    assert f"{total:,} ({total - vocab * 4096:,} multiply each token)" in out
    assert f"{1000 * 8 * 2 * 4096:,} (1,000 steps of {8 * 2 * 4096:,})" in out
    flops = 6 * (total - vocab * 4096) + 6 * 32 * 4096 * 4096
    assert f"{flops / 1e9:.3f} GFLOPs a token, {flops * 65_536_000:.2e} in all" in out
    assert f"{16 * total / 2**30:.1f} GiB" in out
    assert f"H100            {flops * 65_536_000 / 989e12 / 0.4 / 3600:,.1f} hours at 40% of 989 TFLOP/s" in out
    assert not os.path.exists(cfg.out_dir)


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_the_estimate_of_memory_is_what_a_run_takes(place, tmp_path, capsys, checkpoint_blocks):
    """Measured in a process of its own, started by a shell: Linux counts what its parent holds when it starts, too."""
    cfg = settings(place[0], "pretrain", str(tmp_path), dim=64, n_layers=8, n_kv_heads=0, hidden_dim=192,
                   max_seq_len=256, batch_size=32, grad_accum=1, max_steps=3, eval_every=9, checkpoint_blocks=checkpoint_blocks)
    arguments = [f"--{k}={v}" for k, v in changed(cfg).items()]
    program = ("import resource, sys\nfrom configurator import load_config\nimport pretrain\n"
               "pretrain.main(load_config(pretrain.Config))\n"
               "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    shell = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", program, *arguments]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=170)
    measured = float(re.search(r"peak (\d+)", done.stdout)[1]) / 2 ** 20
    estimate.main(cfg)
    estimated = float(re.search(r"memory +([\d.]+) GiB", capsys.readouterr().out)[1])
    assert estimated == pytest.approx(measured, rel=0.15)


def test_the_estimate_of_shards(place, capsys):
    """8 G parameters: 120 GiB of weights, gradients and AdamW are shared; 3 GiB of gathered blocks and Python not."""
    estimate.main(settings(place[0], "pretrain", "x", **LARGE, n_layers=40, checkpoint_blocks=True))
    vocab = place[1].vocab_size + -place[1].vocab_size % 64
    total = 40 * (4 * 4096 ** 2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + vocab * 4096
    found = re.findall(r"shard=True +([\d.]+) GiB a process on (\d+) GPUs", capsys.readouterr().out)
    assert [int(n) for _, n in found] == [8, 64]
    for gib, n in found:
        assert 3 < float(gib) - 16 * total / int(n) / 2**30 < 4


# ---------------------------------------------------------------------------- follow


def test_whole_lines_are_sent(tmp_path, monkeypatch):
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "val_loss": 1.7}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "log.jsonl").write_text(lines + '{"step": 3, "lo')
    sent = []
    monkeypatch.setattr(follow, "open_logger", lambda cfg: lambda step, record: sent.append((step, record)))
    follow.main(follow.Config(run=str(tmp_path)))
    assert sent == [(1, {"loss": 2.0}), (2, {"loss": 1.5, "val_loss": 1.7})]


def test_tensorboard_reads_it_back(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    follow.main(follow.Config(run=str(tmp_path)))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]


def test_a_missing_log_or_package_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no log at"):
        follow.main(follow.Config(run=str(tmp_path)))
    (tmp_path / "log.jsonl").write_text("")
    monkeypatch.setitem(__import__("sys").modules, "swanlab", None)
    with pytest.raises(SystemExit, match="pip install swanlab"):
        follow.main(follow.Config(run=str(tmp_path), to="swanlab"))


# ---------------------------------------------------------------------------- plot


def write_log(folder, records):
    os.makedirs(folder)
    with open(f"{folder}/log.jsonl", "w") as f:
        f.writelines(json.dumps({"step": step, **record}) + "\n" for step, record in enumerate(records, 1))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The logs of three stages as these write them."""
    monkeypatch.chdir(tmp_path)
    pretrain = [{"loss": 5 - s / 100, "lr": 1e-3, "norm": 1.0, "tok/s": 9.0} for s in range(300)]
    for s in (99, 199, 299):
        pretrain[s].update(val_loss=5 - s / 100, val_bits_per_byte=3 - s / 200)
    write_log("out/poems", pretrain)
    write_log("out/poems-wide", pretrain[:200])
    write_log("out/poems-ppo", [{"score": s / 9, "kl": float(9 - s), "entropy": 2.0, "watched": 0.5, "lr": 1e-4,
                                 **({"val_score": 1.0, "val_kl": 2.0} if s % 4 == 0 else {})} for s in range(9)])


def panels(figure):
    return {axis.get_ylabel(): {line.get_label() for line in axis.get_lines()} for axis in figure.axes}


def test_read(tmp_path):
    records = [{"step": 1, "kl": 4.0, "score": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "kl": -0.1, "score": 0.7}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 4, "sc')
    assert read(str(tmp_path), "sqrt(kl)", "score") == [(2.0, 0.5), (0.0, 0.7)]
    assert read(str(tmp_path), "step", "score") == [(1, 0.5), (3, 0.7)]
    with pytest.raises(SystemExit, match="no log at"):
        read(str(tmp_path / "none"), "step", "loss")


def test_means():
    points = [(1, 2.0), (2, 4.0), (3, 9.0)]
    assert means(points, 1) == points == means(points, 0)
    assert means(points, 2) == [(1.5, 3.0), (3, 9.0)] and means([], 0) == []
    assert 100 <= len(means([(s, 0.0) for s in range(1550)], 0)) <= 110


def test_a_run_may_have_a_chinese_name(runs, recwarn, capsys):
    os.rename("out/poems", "out/古诗")
    plot.main(plot.Config(runs="out/古诗"))
    boxes = [warning for warning in recwarn if "missing from" in str(warning.message)]
    assert not boxes or "no font for them is installed" in capsys.readouterr().out


def test_panels_follow_the_log(runs):
    """A panel for what the log holds, in one order for all stages; a field asked for by name has its own."""
    figure = Figure()
    draw_runs(figure, ["out/poems"], plot.Config())
    assert panels(figure) == {
        "loss": {"loss", "val_loss"}, "bits per byte": {"val_bits_per_byte"}, "learning rate": {"lr"}}
    figure = Figure()
    draw_runs(figure, ["out/poems-ppo"], plot.Config())
    assert list(panels(figure)) == [
        "reward", "watched rule", "KL (nats per answer)", "entropy (nats per token)", "learning rate"]
    assert panels(figure)["reward"] == {"score", "val_score"}
    assert all(axis.get_xlabel() == "step" for axis in figure.axes)
    figure = Figure()
    draw_runs(figure, ["out/poems"], plot.Config(y="norm,tok/s"))
    assert panels(figure) == {"norm": {"norm"}, "tok/s": {"tok/s"}}
    with pytest.raises(SystemExit, match="no such field in the log as 'los': it has entropy, kl, lr, score, step"):
        draw_runs(Figure(), ["out/poems-ppo"], plot.Config(y="los"))


def test_curves_can_be_told_without_colour(runs):
    axis = Figure().subplots()
    assert draw(axis, ["out/poems", "out/poems-wide"], ("loss", "val_loss"), plot.Config()) == 4
    looks = {(line.get_linestyle(), line.get_marker()) for line in axis.get_lines()}
    assert len(looks) == 4
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["out/poems loss", "out/poems val_loss", "out/poems-wide loss", "out/poems-wide val_loss"]


def test_against_another_field(runs):
    """The root of the KL goes up although the run came down it."""
    axis = Figure().subplots()
    draw(axis, ["out/poems-ppo"], ("score",), plot.Config(x="sqrt(kl)", smooth=1))
    line, = axis.get_lines()
    assert list(line.get_xdata()) == [s ** 0.5 for s in range(1, 10)] and line.get_ydata()[0] == pytest.approx(8 / 9)


def test_pictures(runs, capsys):
    plot.main(plot.Config(runs="out/poems,out/poems-wide"))
    plot.main(plot.Config(runs="out/poems-ppo", x="sqrt(kl)", y="score,watched", out="over.png"))
    assert capsys.readouterr().out == "out/poems/plot.png\nover.png\n"
    for path in ("out/poems/plot.png", "over.png"):
        with open(path, "rb") as f:
            assert f.read(8) == b"\x89PNG\r\n\x1a\n"
    for runs in ("", ","):
        with pytest.raises(SystemExit, match="name a run"):
            plot.main(plot.Config(runs=runs))


def test_quickstart(runs, capsys):
    """The stages that are there; with out/evaluate.json also its shares, each run's with intervals."""
    figure = Figure()
    draw_quickstart(figure, plot.Config())
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["1. pretraining", "4. PPO: reward", "4. PPO: distance from SFT"]
    share = {"share": 0.5, "low": 0.4, "high": 0.7, "n": 10}
    results = {"out/poems": {"bits_per_byte": 2.0, "idioms": share, "recital": "床前"}, "out/poems-ppo": {"form": share},
               "out/poems-reward": {"poem lists": share}}
    with open("out/evaluate.json", "w", encoding="utf-8") as f:
        json.dump(results, f)
    plot.main(plot.Config(runs="quickstart"))
    assert capsys.readouterr().out == "out/quickstart.png\n" and os.path.getsize("out/quickstart.png") > 10_000
    figure = Figure()
    draw_quickstart(figure, plot.Config())
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["out/poems", "out/poems-ppo"]
    os.remove("out/poems/log.jsonl")
    os.remove("out/poems-ppo/log.jsonl")
    with pytest.raises(SystemExit, match="no run of the quickstart"):
        plot.main(plot.Config(runs="quickstart"))


def test_without_matplotlib(runs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        plot.main(plot.Config(runs="out/poems"))


# ---------------------------------------------------------------------------- bench


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
    seconds, most = measure(sides, bench.Config(repeats=3, warmup=2), CPU)
    assert said == ["a", "b"] * 5 and seconds == {"a": [1.0] * 3, "b": [0.5] * 3} and most == {"a": 0, "b": 0}


def test_spread_and_ratios():
    assert spread([1000.4, 3000.0, 2000.0]) == "2,000 (1,000 – 3,000)" and spread([0.25], 2) == "0.25 (0.25 – 0.25)"
    assert ratios([2.0, 3.0], [1.0, 6.0]) == [2.0, 0.5]
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_settings_are_checked():
    for word, message in (("what=fly", "known are train, moe"), ("repeats=0", "repeats wants"), ("vs=x", "known are")):
        with pytest.raises(SystemExit, match=message):
            load_config(bench.Config, [f"--{word}"])


@pytest.mark.parametrize("changes", [{}, bench.EXPERTS], ids=["dense", "moe"])
def test_theirs_computes_the_same(changes):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**TINY, **changes})).eval()
    theirs = load_transformers(model, bench.Config()).eval()
    ids = torch.randint(96, (2, 20))
    with torch.no_grad():
        assert torch.allclose(model.logits(model(ids)), theirs(ids).logits, atol=1e-5)
    x, y = ids[:, :-1], ids[:, 1:]
    assert abs(bench.our_loss(model, x, y) - bench.their_loss(theirs, x, y)) < 1e-5
    prompts = [torch.randint(1, 96, (n,)).tolist() for n in (3, 1, 7)]
    for stop_ids in ((), [5, 6, 7, 8, 9, 10, 11, 12]):
        ours = run_ours(model, prompts, 12, bench.Config(temperature=0.0), CPU, stop_ids)
        new = run_theirs(theirs, prompts, 12, bench.Config(temperature=0.0), CPU, list(stop_ids) or None)
        assert [row[:len(ids)] for row, ids in zip(new.tolist(), ours)] == ours


def test_without_transformers(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    model = Transformer(ModelConfig(**TINY))
    for vs in ("none", "transformers"):
        assert load_transformers(model, bench.Config(vs=vs)) is None
    assert capsys.readouterr().out.count("pip install -r requirements-dev.txt") == 1
    for what in ("train", "generate"):
        bench.main(bench.Config(what=what, **FAST))
        out = capsys.readouterr().out
        assert "mingyue" in out and "nan" not in out


def rows_of(out, names):
    """{name: the numbers of its line in the table}."""
    lines = {name: [line for line in out.split("\n") if re.match(rf"{re.escape(name)}\s+[\d]", line)] for name in names}
    return {name: [float(word.replace(",", "")) for word in re.findall(r"\d[\d,.]*", found[-1].removeprefix(name))]
            for name, found in lines.items()}


def test_training_rows(capsys):
    """Both first losses agree; a row a side; the ratio is that of the tokens per second."""
    pytest.importorskip("transformers")
    bench.main(bench.Config(what="train", **FAST))
    out = capsys.readouterr().out
    losses = re.findall(r"first step of (\S+) .* loss ([\d.]+)", out)
    assert [name for name, _ in losses] == ["mingyue", "transformers"]
    assert abs(float(losses[0][1]) - float(losses[1][1])) < 1e-4
    rows = rows_of(out, ["mingyue", "transformers"])
    assert all(rate > 0 for row in rows.values() for rate in row[:3]) and rows["mingyue"][3] == 1
    bench.main(bench.Config(what="moe", **FAST))
    out = capsys.readouterr().out
    assert rows_of(out, ["mingyue moe", "mingyue dense", "transformers"])["mingyue dense"][0] > 0


def test_moe_costs_a_token_what_the_dense_model_costs():
    """Apart from the router: expert_hidden_dim is chosen so."""
    for size, tolerance in (("small", 0.1), ("baby", 0.01)):
        counts = [count(Transformer(ModelConfig(**{**bench.SIZES[size], "tie_embeddings": False, **more, "n_layers": 2})))[1]
                  for more in ({}, bench.EXPERTS)]
        assert abs(counts[1] / counts[0] - 1) < tolerance


def test_decoding_rows(capsys):
    pytest.importorskip("transformers")
    bench.main(bench.Config(what="generate", **FAST))
    out = capsys.readouterr().out
    rows = rows_of(out, ["1", "2", "2, mixed"])
    for row in rows.values():
        assert len(row) == 10 and row[1] <= row[0] <= row[2] and row[3] > 0  # both sides, a step's time, the ratio


def test_rollout_row(place, capsys):
    """Answer tokens per second of a run on the prompts of a data folder, with groups of answers."""
    root, _ = place
    cfg = bench.Config(what="rollout", run=f"{root}/base", data_dir=f"{root}/prompts", n_prompts=3, group_size=2,
                       max_new_tokens=5, vs="none", **FAST)
    bench.main(cfg)
    rate, low, high, length, *_ = rows_of(capsys.readouterr().out, ["mingyue"])["mingyue"]
    assert 0 < low <= rate <= high and 1 <= length <= 5
    with pytest.raises(SystemExit, match="has 24 prompts, n_prompts=64"):
        bench.main(dataclasses.replace(cfg, n_prompts=64))


def test_experts_that_get_nothing_are_dead(place, tmp_path, capsys):
    """A router that is told to ask experts 0 and 1 alone: each gets half of all, the other two are dead."""
    make_run(f"{tmp_path}/moe", place[1], n_experts=4, n_active_experts=2, n_layers=2, first_dense=1)
    checkpoint = torch.load(f"{tmp_path}/moe/ckpt.pt")
    checkpoint["model"]["blocks.1.ffn.bias"] = torch.tensor([9.0, 9.0, 0.0, 0.0])
    torch.save(checkpoint, f"{tmp_path}/moe/ckpt.pt")
    write_folder(f"{tmp_path}/text", place[1], "text", {"train": np.arange(200), "val": np.arange(200)})
    bench.main(bench.Config(what="experts", run=f"{tmp_path}/moe", data_dir=f"{tmp_path}/text", **FAST))
    assert "1       0.00                 2.00    2 of 4" in capsys.readouterr().out.splitlines()
