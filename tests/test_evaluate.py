"""evaluate.py, rewards.py and plot.py against numbers worked by hand and direct sums."""
import json
import math
import types

import pytest
import torch

import evaluate
from common import Env
from evaluate import Config, cell, evaluate_run, idiom_choice, logps_of, reward_accuracy, scores_of, share, wilson
from model import ModelConfig, ScalarModel, Transformer
from pairs import make_run, one_thread, write_pairs  # noqa: F401
from plot import read
from rewards import quatrain
from tokenizer import render_chat, train_tokenizer

CPU = Env(0, 1, torch.device("cpu"), torch.float32)
SMALL = dict(vocab_size=448, dim=32, n_layers=2, n_heads=4, max_seq_len=96)
DOCUMENTS = [([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 8, 7, 6, 5, 4, 3], [0, 1, 1, 0, 0, 1, 0]), ([1, 2], [0, 1]),
             ([40, 41, 42, 43, 44], [0, 1, 1, 1, 0]), ([7, 9, 8], [0, 1, 0])]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_tokenizer(["春夜月好坏。0123456789 user assistant system\n"], str(tmp_path_factory.mktemp("t") / "tok"),
                           300, character_coverage=1.0)


def ask(question, answer, tok):
    return render_chat(tok, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def test_wilson():
    """z² = 3.8416. 5 of 10: 0.5 ± 1.96 · √(0.025 + 0.009604) / 1.38416; 0 of 10: up to 3.8416 / 13.8416."""
    assert wilson(5, 10) == pytest.approx((0.5 - 0.26341, 0.5 + 0.26341), abs=1e-5)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 10) == (0.0, pytest.approx(3.8416 / 13.8416)) and wilson(0, 0) == (0.0, 1.0)
    assert all(0 <= wilson(0, n)[0] and wilson(n, n)[1] <= 1 for n in range(1, 500))


def test_cell_formats():
    assert cell(None) == "–" and cell(1.23456) == "1.235" and cell("sft") == "sft" and cell(3) == "3"
    assert share([True, False] * 5) == {"share": 0.5, "low": wilson(5, 10)[0], "high": wilson(5, 10)[1], "n": 10}
    assert cell(share([True, False] * 5)) == "50.0% [24, 76]"
    assert cell(share([False] * 10)) == "0.0% [0, 28]" and cell(share([True] * 10)) == "100.0% [72, 100]"


def test_answer_logps_is_the_direct_sum():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL))
    for temperature in (1.0, 0.7):
        wanted = []
        for ids, mask in DOCUMENTS:
            logps = (model(torch.tensor([ids]))[0] / temperature).log_softmax(-1)
            wanted.append(sum(logps[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]))
        got = logps_of(model, DOCUMENTS, 2, CPU, temperature)
        assert got == pytest.approx(wanted, abs=1e-4)


def test_score_reads_the_last_learned_token():
    torch.manual_seed(0)
    model, last = ScalarModel(ModelConfig(**SMALL)).eval(), [3, 5, 1, 3, 1]
    rows = [model(torch.tensor([ids]))[0] for ids, _ in DOCUMENTS]
    got = scores_of(model, DOCUMENTS, 2, CPU)
    assert got == pytest.approx([row[t].item() for row, t in zip(rows, last)], abs=1e-5)
    assert min(abs(a - row[t - 1].item()) for a, row, t in zip(got, rows, last)) > 1e-3  # the token before is another


class Reader:
    """Stands for a model: value(idiom, whether its word is there too) a token where it reads that explanation."""

    def __init__(self, tok, idioms, value):
        self.tok, self.idioms, self.value = tok, idioms, value
        self.config = types.SimpleNamespace(max_seq_len=96)

    def logps(self, ids, targets, mask, temperature):
        texts = [self.tok.decode(row) for row in torch.cat([ids[:, :1], targets], 1).tolist()]
        rows = [max((self.value(i, i["word"] in text) for i in self.idioms if i["explanation"] in text), default=-3.0)
                for text in texts]
        return torch.tensor(rows)[:, None] * mask


@pytest.mark.parametrize("chat", [True, False])
def test_idiom_choice(tok, chat):
    idioms = [{"word": f"春{i}夜", "explanation": f"好{i}月" + "坏" * (i % 3)} for i in range(10)]

    def hits(value):
        return idiom_choice(Reader(tok, idioms, value), tok, idioms, chat, Config(n_idioms=6, batch_size=4), CPU)

    assert hits(lambda i, own: -2.0 if own else -3.0) == [True] * 6
    assert hits(lambda i, own: -3.0 if own else -2.0) == [False] * 6
    easy = {i["explanation"]: -0.5 - 0.5 * n for n, i in enumerate(idioms)}  # the prior must not decide
    assert hits(lambda i, own: easy[i["explanation"]] + 0.1 * own) == [True] * 6
    for tie in (-3.0, math.nan):  # a model that knows nothing, or is broken, hits nothing
        assert hits(lambda i, own: tie) == [False] * 6
    same = [dict(i, explanation="春春") for i in idioms[:3]] + idioms[3:9]  # one meaning: never set against another
    reader = Reader(tok, same, lambda i, own: -2.0 if own else -3.0)
    assert idiom_choice(reader, tok, same, chat, Config(), CPU) == [True] * 9


def test_reward_accuracy(tok, tmp_path, monkeypatch):
    """A reward model that counts 好. The list: 2 > 1 right, 2 > 3 wrong, 1 > 3 wrong; idioms right and wrong; a tie."""
    monkeypatch.chdir(tmp_path)
    good, = tok.encode("好")
    val = [[ask("春", "好好", tok), ask("春", "好", tok), ask("春", "好好好", tok)],
           [ask("春夜月是", "好", tok), ask("春夜月是", "坏", tok)], [ask("春夜月是", "坏", tok), ask("春夜月是", "好", tok)],
           [ask("夜", "好", tok), ask("夜", "坏好", tok)]]
    write_pairs("data/poems-pairs", tok, {"train": val[:1], "val": val})

    def count(ids):
        return (ids == good).cumsum(1).float()

    count.config = types.SimpleNamespace(max_seq_len=96)
    got = reward_accuracy(count, tok, [{"word": "春夜月"}], Config(batch_size=4), CPU)
    assert {kind: (v["share"], v["n"]) for kind, v in got.items()} == {
        "poem lists": (pytest.approx(1 / 3), 3), "idiom pairs": (0.5, 2), "people": (0.0, 1)}


def test_evaluate_run_of_a_chat_model(tok, tmp_path, monkeypatch):
    make_run(str(tmp_path), tok, max_seq_len=160)
    monkeypatch.setattr(evaluate, "open_data", lambda *args: (None, None, None))
    monkeypatch.setattr(evaluate, "validation_loss", lambda *args: (0.0, 1.5))
    monkeypatch.setattr(evaluate, "idiom_choice", lambda *args: [True])
    poems = [{"form": "五言绝句", "title": "春"}, {"form": "七言绝句", "title": "夜"}]
    same = evaluate.load_model(str(tmp_path))[0]
    alone = evaluate_run(str(tmp_path), Config(n_each=2), CPU, poems, [], None, None)
    got = evaluate_run(str(tmp_path), Config(n_each=2), CPU, poems, [], same, ScalarModel(same.config))
    assert "kl" not in alone and alone["bits_per_byte"] == 1.5 and alone["idioms"]["share"] == 1
    assert got["form"] == {"share": 0, "low": 0, "high": wilson(0, 4)[1], "n": 4} and got["rhymes"]["n"] == 0
    assert abs(got["kl"]) < 1e-3 and math.isfinite(got["reward"]) and got["examples"] == alone["examples"]


def test_quatrain():
    """Four lines of five: right lines, less the lines missing or too many, over four."""
    line, ask_for = "床前明月光", "写一首五言绝句，题目是《春》。"
    got = [quatrain(ask_for, "，".join([line] * n)) for n in (4, 3, 5, 8, 0, 20)]
    assert got == [1.0, 0.5, 0.75, 0.0, -1.0, -1.0]
    assert quatrain(ask_for, "床前明月光，疑是地上。举头望明月，低头思故乡。") == 0.75
    assert quatrain("写一首七言绝句", "，".join([line] * 4)) == 0 and quatrain("你好", "，".join([line] * 4)) == 0
    assert quatrain("写一首七言律诗", "\n".join(["朝辞白帝彩云间"] * 8)) == 1


def test_plot_read(tmp_path):
    records = [{"step": 1, "kl": 4.0, "score": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "kl": -0.1, "score": 0.7}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 4, "sc')
    assert read(str(tmp_path), "sqrt(kl)", "score") == [(2.0, 0.5), (0.0, 0.7)]
    assert read(str(tmp_path), "step", "score") == [(1, 0.5), (3, 0.7)]
    with pytest.raises(SystemExit, match="no log at"):
        read(str(tmp_path / "none"), "step", "loss")
