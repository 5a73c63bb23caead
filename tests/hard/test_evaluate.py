"""tools/evaluate.py and recipes/exams.py by hand: shares, tables, which of two sentences is likelier, exam
questions."""
import itertools
import json
import math
import os

import pytest
import torch

from model import ModelConfig, Transformer
from recipes import exams
from small_runs import CPU
from tokenizer import make_tokenizer, train_tokenizer
from tools import evaluate
from tools.evaluate import Config, minimal_pairs, share, table, text_bits, wilson

SMALL = dict(vocab_size=448, dim=32, n_layers=2, n_heads=4, max_seq_len=96)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_tokenizer(["春夜月好坏。0123456789 user assistant system\n"], str(tmp_path_factory.mktemp("t") / "tok"),
                           300, character_coverage=1.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL)).eval()
    for p in model.parameters():  # a fresh model finds all tokens nearly equally likely
        p.data *= 5 if p.ndim > 1 else 1
    return model


def direct_logp(model, ids, mask, temperature=1.0):
    """log p of the tokens under the mask, one row at a time."""
    logps = (model.logits(model(torch.tensor([ids[:-1]])))[0] / temperature).log_softmax(-1)
    return sum(logps[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])


def test_wilson():
    """z² = 3.8416. 5 of 10: 0.5 ± 1.96 · √(0.025 + 0.009604) / 1.38416; 0 of 10: up to 3.8416 / 13.8416."""
    assert wilson(5, 10) == pytest.approx((0.5 - 0.26341, 0.5 + 0.26341), abs=1e-5)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 10) == (0.0, pytest.approx(3.8416 / 13.8416)) and wilson(0, 0) == (0.0, 1.0)
    assert all(0 <= wilson(0, n)[0] and wilson(n, n)[1] <= 1 for n in range(1, 500))


def test_table_and_report(tmp_path, monkeypatch, capsys):
    """A row a measure, a column a run; more than five runs go below; texts come after the numbers; all is in json."""
    monkeypatch.chdir(tmp_path)
    assert table({"out/a": {"x": 1.0}, "out/b": {"long": share([True] * 10)}}).split("\n") == [
        "      out/a  out/b", "x     1.000  –", "long  –      100.0% [72, 100]", ""]
    results = {f"out/{i}": {"bits": 0.5 * i, "hits": [True, False], "poem": "床前\n明月"} for i in range(7)}
    evaluate.report(results, "out/evaluate.json")
    lines = capsys.readouterr().out.split("\n")
    heads = [line.split() for line in lines if line.strip().startswith("out/") and ":" not in line]
    assert heads == [[f"out/{i}" for i in range(5)], ["out/5", "out/6"]]
    assert max(map(len, lines)) <= 130 and lines.count("out/3, poem:") == 1
    kept = json.load(open("out/evaluate.json", encoding="utf-8"))
    assert kept["out/6"] == {"bits": 3.0, "hits": share([True, False]), "poem": "床前\n明月"}


def test_bits_of_a_text(model, tok, tmp_path):
    """Every token but the first is predicted once, in windows of what the model sees."""
    text = "春夜月好。" * 65 + "坏 01\n" * 7
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeff".encode() + text.replace("\n", "\r\n").encode())
    ids = [tok.eot_id] + tok.encode(text)
    nats = 0.0
    for start in range(0, len(ids) - 1, 96):
        window = ids[start:start + 97]
        nats -= direct_logp(model, window, [0] + [1] * (len(window) - 1))
    assert len(ids) % 96 > 1 and len(ids) > 200
    for batch_size in (1, 2, 64):
        got = text_bits(model, tok, Config("text", input=str(path), batch_size=batch_size), CPU)["bits_per_byte"]
        assert got == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    # by position: the mean over the windows that begin at tokens 0, 2, 4, …
    starts = range(0, len(ids) - 16, 2)
    four = [0] * 5 + [1] * 4 + [0] * 8
    nats = -sum(direct_logp(model, ids[i:i + 17], four) for i in starts) / len(starts) / 4
    got = text_bits(model, tok, Config("text", input=str(path), window=16), CPU)
    assert list(got) == ["0-2", "2-4", "4-8", "8-12", "12-16"]
    assert got["4-8"] == pytest.approx(nats / math.log(2) * (len(ids) - 1) / len(text.encode()), rel=1e-5)
    with pytest.raises(SystemExit, match="window=97 is more than the 96 tokens"):
        text_bits(model, tok, Config("text", input=str(path), window=97), CPU)
    path.write_text("")
    with pytest.raises(SystemExit, match="is empty"):
        text_bits(model, tok, Config("text", input=str(path)), CPU)


def test_minimal_pairs(model, tok, tmp_path, monkeypatch):
    """log p / tokens^0.5 of each sentence, by hand; a tie is a miss; a folder is counted file by file too."""
    sentences = ["春夜月", "月夜春", "好坏", "春夜好坏", "好", "月月月月月月", "0 1", "坏春"]
    scores = {}
    for sentence in sentences:
        ids = tok.encode(sentence)
        scores[sentence] = direct_logp(model, [tok.eot_id] + ids, [0] + [1] * len(ids)) / len(ids) ** 0.5
    pairs = list(itertools.permutations(sentences, 2))
    records = [{"sentence_good": good, "sentence_bad": bad, "more": 1} for good, bad in pairs + [("春", "春")]]
    wanted = [scores[good] > scores[bad] for good, bad in pairs] + [False]
    same = [len(tok.encode(good)) == len(tok.encode(bad)) for good, bad in pairs] + [True]
    assert 0 < sum(wanted) < len(pairs) and 1 < sum(same) < len(pairs)
    for name, part in (("a", records[:3]), ("b", records[3:])):
        text = "".join(json.dumps(record) + "\n" for record in part)
        (tmp_path / f"{name}.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    got = minimal_pairs(model, tok, Config("pairs", input=str(tmp_path)), CPU)
    equal_length = [hit for hit, equal in zip(wanted, same) if equal]
    assert got == {"all pairs (chance 50%)": wanted, "pairs of equal length": equal_length,
                   "a": wanted[:3], "b": wanted[3:]}
    one = minimal_pairs(model, tok, Config("pairs", input=str(tmp_path / "b.jsonl")), CPU)
    assert one["all pairs (chance 50%)"] == wanted[3:] and len(one) == 2
    # a vocabulary whose documents open with another token: the words stand behind that one
    llama = make_tokenizer(tok.raw, {"start": ["<|im_start|>"]}, "")
    (tmp_path / "b.jsonl").write_text('{"sentence_good": "春夜", "sentence_bad": "夜春"}\n', encoding="utf-8")
    scored = []
    with monkeypatch.context() as patch:
        patch.setattr(exams, "logps_of", lambda model, documents, *_: scored.extend(documents) or (torch.ones(2),) * 2)
        minimal_pairs(model, llama, Config("pairs", input=str(tmp_path / "b.jsonl")), CPU)
    ids = tok.encode("春夜")
    assert scored[0] == ([tok.im_start_id, *ids], [0] + [1] * len(ids))
    for record, message in (('{"sentence_good": "春"}', "no sentence_good or no sentence_bad"),
                            ('{"sentence_good": "春", "sentence_bad": ""}', "sentence_bad is '', wanted a text")):
        (tmp_path / "b.jsonl").write_text(record + "\n", encoding="utf-8")
        with pytest.raises(SystemExit, match=f"b.jsonl, record 1: {message}"):
            minimal_pairs(model, tok, Config("pairs", input=str(tmp_path)), CPU)


def test_minimal_pairs_of_a_model_that_knows_nothing(tok, tmp_path):
    """All tokens equally likely: log p / n^0.5 = -n^0.5 log V. Shorter wins, and as long is a tie, so a miss."""
    model = Transformer(ModelConfig(**SMALL)).eval()
    model.embed.weight.data.zero_()
    pairs = [("好", "坏好坏好"), ("坏好坏好", "好"), ("好", "坏")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(dict(zip(("sentence_good", "sentence_bad"), pair))) + "\n" for pair in pairs))
    assert [len(tok.encode(text)) for text in "好坏"] == [1, 1]
    got = minimal_pairs(model, tok, Config("pairs", input=str(path)), CPU)
    assert got == {"all pairs (chance 50%)": [True, False, False], "pairs of equal length": [False]}
    model.embed.weight.data.fill_(math.nan)
    assert minimal_pairs(model, tok, Config("pairs", input=str(path)), CPU)["all pairs (chance 50%)"] == [False] * 3


def write_exam(folder, name):
    """Two examples and two questions of law, as the exam's files lie."""
    held_out = {"ceval": "val/law_val.csv", "cmmlu": "test/college_law.csv"}[name]
    dev = {"ceval": "dev/law_dev.csv", "cmmlu": "dev/college_law.csv"}[name]
    head = {"ceval": "id,question,A,B,C,D,answer\n", "cmmlu": ",Question,A,B,C,D,Answer\n"}[name]
    files = {dev: ['0,春？,1,2,3,4,B', '1," 夜，\n月 ",甲,乙,丙,丁,D'], held_out: ["0,好,a,b,c,d,A", "1,坏,a,b,c,d,C"]}
    for path, rows in files.items():
        os.makedirs(os.path.dirname(f"{folder}/{path}"), exist_ok=True)
        with open(f"{folder}/{path}", "w", encoding="utf-8-sig") as f:
            f.write(head + "\n".join(rows) + "\n")


@pytest.mark.parametrize("name, subject, intro", [
    ("ceval", "law", "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"),
    ("cmmlu", "college_law", "以下是关于大学法律的单项选择题，请直接给出正确答案的选项。\n\n")])
def test_exam_questions(tmp_path, name, subject, intro):
    """The text before the answer, character by character as in lm-eval's yaml files."""
    write_exam(tmp_path, name)
    last = "好\nA. a\nB. b\nC. c\nD. d\n答案："
    got = exams.questions(name, str(tmp_path), 0)
    assert list(got) == [subject] and [q.right for q in got[subject]] == [0, 2]
    assert got[subject][0].text == intro + last
    shots = ("春？\nA. 1\nB. 2\nC. 3\nD. 4\n答案： B\n\n夜，\n月\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案： D\n\n")
    assert exams.questions(name, str(tmp_path), 2)[subject][0].text == intro + shots + last
    with pytest.raises(SystemExit, match="shots=3, but .*law has 2 examples"):
        exams.questions(name, str(tmp_path), 3)


def test_exam_of_a_model(model, tok, tmp_path, capsys):
    """The likeliest of the four letters with its space; a question longer than the model sees loses its beginning."""
    write_exam(tmp_path, "ceval")
    for shots in (0, 2):
        wanted = []
        for question in exams.questions("ceval", str(tmp_path), shots)["law"]:
            logps = []
            for letter in "ABCD":
                ids = tok.encode(f"{question.text} {letter}")
                n = len(ids) - len(tok.encode(question.text))
                ids = ids[-97:]
                logps.append(direct_logp(model, ids, [0] * (len(ids) - n) + [1] * n))
            wanted.append(logps.index(max(logps)) == question.right)
        got = evaluate.exam(model, tok, Config("ceval", input=str(tmp_path), shots=shots), CPU)
        assert got == {f"ceval, {shots} shots (chance 25%)": wanted, "law": wanted}
    assert len(tok.encode(question.text)) > 97
    assert "note: 8 of 8 texts are longer than the 96 tokens" in capsys.readouterr().err


def test_exam_files_that_are_not_exams(tmp_path):
    write_exam(tmp_path, "ceval")
    (tmp_path / "val/law_val.csv").write_text("id,question,A,B,C,answer\n0,好,a,b,c,A\n")
    with pytest.raises(SystemExit, match="law_val.csv has no column d"):
        exams.questions("ceval", str(tmp_path), 0)
    (tmp_path / "val/law_val.csv").write_text("id,question,A,B,C,D,answer\n0,好,a,b,c,d,E\n")
    with pytest.raises(SystemExit, match="a question whose answer is 'E'"):
        exams.questions("ceval", str(tmp_path), 0)
