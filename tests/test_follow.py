"""tools/follow.py: every whole line of a log reaches the logger, half a line does not."""
import json

import pytest

from tools import follow


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
