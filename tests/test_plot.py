"""tools/plot.py: what it reads, which panels and curves it draws, and that the picture is there."""
import json
import os

import pytest

from tools.plot import Config, draw, draw_quickstart, draw_runs, main, means, read

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402


def write_log(folder, records):
    os.makedirs(folder)
    with open(f"{folder}/log.jsonl", "w") as f:
        f.writelines(json.dumps({"step": step, **record}) + "\n" for step, record in enumerate(records, 1))


@pytest.fixture(autouse=True)
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


def test_panels_follow_the_log():
    """A panel for what the log holds, in one order for all stages; a field asked for by name has its own."""
    figure = Figure()
    draw_runs(figure, ["out/poems"], Config())
    assert panels(figure) == {
        "loss": {"loss", "val_loss"}, "bits a byte": {"val_bits_per_byte"}, "learning rate": {"lr"}}
    figure = Figure()
    draw_runs(figure, ["out/poems-ppo"], Config())
    assert list(panels(figure)) == [
        "reward", "watched rule", "KL (nats an answer)", "entropy (nats a token)", "learning rate"]
    assert panels(figure)["reward"] == {"score", "val_score"}
    assert all(axis.get_xlabel() == "step" for axis in figure.axes)
    figure = Figure()
    draw_runs(figure, ["out/poems"], Config(y="norm,tok/s"))
    assert panels(figure) == {"norm": {"norm"}, "tok/s": {"tok/s"}}
    with pytest.raises(SystemExit, match="no such field in the log as 'los': it has entropy, kl, lr, score, step"):
        draw_runs(Figure(), ["out/poems-ppo"], Config(y="los"))


def test_curves_can_be_told_without_colour():
    axis = Figure().subplots()
    assert draw(axis, ["out/poems", "out/poems-wide"], ("loss", "val_loss"), Config()) == 4
    looks = {(line.get_linestyle(), line.get_marker()) for line in axis.get_lines()}
    assert len(looks) == 4
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["out/poems loss", "out/poems val_loss", "out/poems-wide loss", "out/poems-wide val_loss"]


def test_against_another_field():
    """The root of the KL goes up although the run came down it."""
    axis = Figure().subplots()
    draw(axis, ["out/poems-ppo"], ("score",), Config(x="sqrt(kl)", smooth=1))
    line, = axis.get_lines()
    assert list(line.get_xdata()) == [s ** 0.5 for s in range(1, 10)] and line.get_ydata()[0] == pytest.approx(8 / 9)


def test_pictures(capsys):
    main(Config(runs="out/poems,out/poems-wide"))
    main(Config(runs="out/poems-ppo", x="sqrt(kl)", y="score,watched", out="over.png"))
    assert capsys.readouterr().out == "out/poems/plot.png\nover.png\n"
    for path in ("out/poems/plot.png", "over.png"):
        with open(path, "rb") as f:
            assert f.read(8) == b"\x89PNG\r\n\x1a\n"
    for runs in ("", ","):
        with pytest.raises(SystemExit, match="name a run"):
            main(Config(runs=runs))


def test_quickstart(capsys):
    """The stages that are there; with out/evaluate.json also its shares, each run's with intervals."""
    figure = Figure()
    draw_quickstart(figure, Config())
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["1. pretraining", "4. PPO: reward", "4. PPO: distance from SFT"]
    share = {"share": 0.5, "low": 0.4, "high": 0.7, "n": 10}
    results = {"out/poems": {"bits_per_byte": 2.0, "idioms": share, "recital": "床前"}, "out/poems-ppo": {"form": share},
               "out/poems-reward": {"poem lists": share}}
    with open("out/evaluate.json", "w", encoding="utf-8") as f:
        json.dump(results, f)
    main(Config(runs="quickstart"))
    assert capsys.readouterr().out == "out/quickstart.png\n" and os.path.getsize("out/quickstart.png") > 10_000
    figure = Figure()
    draw_quickstart(figure, Config())
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["out/poems", "out/poems-ppo"]
    os.remove("out/poems/log.jsonl")
    os.remove("out/poems-ppo/log.jsonl")
    with pytest.raises(SystemExit, match="no run of the quickstart"):
        main(Config(runs="quickstart"))


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        main(Config(runs="out/poems"))
