"""evaluate.py, recipes/poems_eval.py, exams.py and rewards.py against numbers worked by hand and direct sums."""
import itertools
import json
import math
import os
import types

import numpy as np
import pytest
import torch

from tools import evaluate
from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from common.distributed import Env
from tools.evaluate import Config, cell, minimal_pairs, share, table, text_bits, wilson
from model import ModelConfig, ScalarModel, Transformer
from pairs import make_run, one_thread, write_pairs  # noqa: F401
from recipes import exams, poems_eval
from recipes.exams import logps_of
from recipes.poems_eval import Material, answer_all, evaluate_run, famous_quatrains, idiom_choice, names_itself, repeats
from recipes.poems_eval import measure_chat, measure_sft, reward_accuracy, scores_of
from recipes.rewards import quatrain, rhyming
from tokenizer import render_chat, train_tokenizer

CPU = Env(0, 1, torch.device("cpu"), torch.float32)
SMALL = dict(vocab_size=448, dim=32, n_layers=2, n_heads=4, max_seq_len=96)
DOCUMENTS = [([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 8, 7, 6, 5, 4, 3], [0, 1, 1, 0, 0, 1, 0]), ([1, 2], [0, 1]),
             ([40, 41, 42, 43, 44], [0, 1, 1, 1, 0]), ([7, 9, 8], [0, 1, 0])]


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


def ask(question, answer, tok):
    return render_chat(tok, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def direct_logp(model, ids, mask, temperature=1.0):
    """log p of the tokens under the mask, one row at a time."""
    logps = (model.logits(model(torch.tensor([ids[:-1]])))[0] / temperature).log_softmax(-1)
    return sum(logps[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])


# ---------------------------------------------------------------------------- shares and tables


def test_wilson():
    """z² = 3.8416. 5 of 10: 0.5 ± 1.96 · √(0.025 + 0.009604) / 1.38416; 0 of 10: up to 3.8416 / 13.8416."""
    assert wilson(5, 10) == pytest.approx((0.5 - 0.26341, 0.5 + 0.26341), abs=1e-5)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 10) == (0.0, pytest.approx(3.8416 / 13.8416)) and wilson(0, 0) == (0.0, 1.0)
    assert all(0 <= wilson(0, n)[0] and wilson(n, n)[1] <= 1 for n in range(1, 500))


def test_cell_formats():
    assert cell(None) == "–" and cell(1.23456) == "1.235" and cell(3) == "3.000"
    assert share([True, False] * 5) == {"share": 0.5, "low": wilson(5, 10)[0], "high": wilson(5, 10)[1], "n": 10}
    assert cell(share([True, False] * 5)) == "50.0% [24, 76]"
    assert cell(share([False] * 10)) == "0.0% [0, 28]" and cell(share([True] * 10)) == "100.0% [72, 100]"


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


def test_main_says_what_is_missing(tmp_path, monkeypatch, tok, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="nothing to measure"):
        evaluate.main(Config(device="cpu"))
    assert capsys.readouterr().err.count("holds no checkpoint and is left out") == 4
    make_run("out/a", tok)
    with pytest.raises(SystemExit, match="name what to measure on with --input="):
        evaluate.main(Config("text", runs="out/a", device="cpu"))
    for what, message in (("ceval", "no questions of ceval .* wanted files like val/"), ("pairs", "no .jsonl file in")):
        with pytest.raises(SystemExit, match=message):
            evaluate.main(Config(what, runs="out/a", input=str(tmp_path), device="cpu"))
    save_checkpoint("out/b/ckpt.pt", {**load_checkpoint("out/a"), "stage": "reward"})
    with pytest.raises(SystemExit, match="out/b is a reward model: it scores answers and writes none"):
        evaluate.main(Config("text", runs="out/b", input=str(tmp_path), device="cpu"))


# ---------------------------------------------------------------------------- by likelihood


def test_logps_are_the_direct_sum(model):
    wanted = [direct_logp(model, ids, mask) for ids, mask in DOCUMENTS]
    logps, lengths = logps_of(model, DOCUMENTS, 2, CPU)
    assert logps.tolist() == pytest.approx(wanted, abs=1e-4) and lengths.tolist() == [2, 3, 1, 3, 1]
    for temperature in (1.0, 0.7):
        wanted = [direct_logp(model, ids, mask, temperature) for ids, mask in DOCUMENTS]
        assert poems_eval.logps_of(model, DOCUMENTS, 2, CPU, temperature) == pytest.approx(wanted, abs=1e-4)


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
    path.write_text("")
    with pytest.raises(SystemExit, match="is empty"):
        text_bits(model, tok, Config("text", input=str(path)), CPU)


def test_minimal_pairs(model, tok, tmp_path):
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
    (tmp_path / "b.jsonl").write_text('{"sentence_good": "春"}\n')
    with pytest.raises(SystemExit, match="b.jsonl, line 1: no sentence_good or no sentence_bad"):
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


# ---------------------------------------------------------------------------- exams


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


def test_exam_of_a_model(model, tok, tmp_path):
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


def test_exam_files_that_are_not_exams(tmp_path):
    write_exam(tmp_path, "ceval")
    (tmp_path / "val/law_val.csv").write_text("id,question,A,B,C,answer\n0,好,a,b,c,A\n")
    with pytest.raises(SystemExit, match="law_val.csv has no column d"):
        exams.questions("ceval", str(tmp_path), 0)
    (tmp_path / "val/law_val.csv").write_text("id,question,A,B,C,D,answer\n0,好,a,b,c,d,E\n")
    with pytest.raises(SystemExit, match="a question whose answer is 'E'"):
        exams.questions("ceval", str(tmp_path), 0)


# ---------------------------------------------------------------------------- the poems


def test_score_reads_the_last_learned_token():
    torch.manual_seed(0)
    model, last = ScalarModel(ModelConfig(**SMALL)).eval(), [3, 5, 1, 3, 1]
    rows = [model(torch.tensor([ids]))[0] for ids, _ in DOCUMENTS]
    got = scores_of(model, DOCUMENTS, 2, CPU)
    assert got == pytest.approx([row[t].item() for row, t in zip(rows, last)], abs=1e-5)
    assert min(abs(a - row[t - 1].item()) for a, row, t in zip(got, rows, last)) > 1e-3  # the token before is another


@pytest.mark.parametrize("chat", [True, False])
def test_idiom_choice(tok, chat, monkeypatch):
    """value(idiom, whether its word is there too) is the log-prob of that explanation, and -3 that of anything else."""
    idioms = [{"word": f"春{i}夜", "explanation": f"好{i}月" + "坏" * (i % 3)} for i in range(10)]
    nobody = types.SimpleNamespace(config=types.SimpleNamespace(max_seq_len=96))

    def hits(value, rows=idioms):
        def logps(model, documents, pad_id, env):
            totals = []
            for ids, mask in documents:
                text, learned = tok.decode(ids), tok.decode([i for i, m in zip(ids, mask) if m], skip_special=True)
                totals.append(max(value(i, i["word"] in text) for i in rows if i["explanation"] == learned))
            return totals

        monkeypatch.setattr(poems_eval, "logps_of", logps)
        return idiom_choice(nobody, tok, rows, chat, Config(n_idioms=6, batch_size=4), CPU)

    assert hits(lambda i, own: -2.0 if own else -3.0) == [True] * 6
    assert hits(lambda i, own: -3.0 if own else -2.0) == [False] * 6
    easy = {i["explanation"]: -0.5 - 0.5 * n for n, i in enumerate(idioms)}  # the prior must not decide
    assert hits(lambda i, own: easy[i["explanation"]] + 0.1 * own) == [True] * 6
    for tie in (-3.0, math.nan):  # a model that knows nothing, or is broken, hits nothing
        assert hits(lambda i, own: tie) == [False] * 6
    same = [dict(i, explanation="春春") for i in idioms[:2]] + idioms[2:8]  # one meaning: never set against another
    assert hits(lambda i, own: -2.0 if own else -3.0, same) == [True] * 6


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
    assert got == {"poem lists": [True, False, False], "idiom pairs": [True, False], "people": [False]}


def test_names_itself():
    assert names_itself("我是明月，一个会写诗的模型。") and names_itself("明月")
    assert not names_itself("我是明月，我是明月，我是明月。") and not names_itself("我是一个模型。") and not names_itself("")
    assert not names_itself("我是明月。我会写诗，\n我是明月")  # whatever stands between them
    assert len(set(poems_eval.smalltalk.HELD_OUT)) == 20


def test_repeats():
    assert repeats("我是明月，我是明月，我是明月。") and not repeats("我是明月，我是明月。")
    assert repeats("处处闻啼鸟，春眠不觉晓，春眠不觉晓，春") and not repeats("春眠不觉晓，处处闻啼鸟。")
    assert repeats("好" * 7) and not repeats("好" * 6) and not repeats("")
    assert not repeats("一二三四五，一二三四五。") and repeats("一二三四五六一二三四五六")


def test_famous_quatrains(tmp_path):
    """The layout that names the form; the first of two with one title; no poem of another form, nothing without npm."""
    assert famous_quatrains(str(tmp_path)) == {}
    body = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    texts = [f"五言绝句《静夜思》李白\n{body}", f"《静夜思》李白\n{body}", body, f"{body}\n——李白《静夜思》",
             "七言绝句《春晓》孟浩然\n春", "五言绝句《静夜思》无名氏\n别的", "成语：春"]
    os.makedirs(tmp_path / "poems-famous")
    (tmp_path / "poems-famous/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert famous_quatrains(str(tmp_path)) == {"静夜思": body}


class Parrot:
    """Stands for a model and for generate(): its answer is a function of the question and of how often it was asked."""

    def __init__(self, tok, answer):
        self.tok, self.answer, self.asked = tok, answer, []
        self.config = types.SimpleNamespace(max_seq_len=1000)

    def generate(self, prompts, max_new_tokens, temperature, stop_ids, **settings):
        new = []
        for ids in prompts:
            question = self.tok.decode(ids, skip_special=True).removeprefix("user\n").removesuffix("\nassistant\n")
            self.asked.append((question, temperature))
            new.append(self.tok.encode(self.answer(question, temperature)) + [stop_ids[0]])
        return new


@pytest.fixture
def parrots(monkeypatch):
    monkeypatch.setattr(poems_eval, "generate", lambda model, *args, **settings: model.generate(*args, **settings))


def test_measure_chat(tok, parrots, tmp_path, monkeypatch):
    """Greedy it names itself half of the time, sampled always; it knows one of two poems, to the character."""
    monkeypatch.chdir(tmp_path)

    def answer(question, temperature):
        if question.startswith("背诵"):
            return {"背诵《春》": "春夜月，\n好坏。", "背诵《夜》": "春夜月。"}[question]
        return "我是明月。" if temperature or poems_eval.smalltalk.HELD_OUT.index(question) % 2 else "我是明月，我是明月。"

    model = Parrot(tok, answer)
    material = Material([], [], {"春": "春夜月，\n好坏。", "夜": "春夜月"}, None, None)
    got = measure_chat(model, tok, material, Config(batch_size=7), CPU)
    assert got == {"identity": [False, True] * 10, "identity_sampled": [True] * 100, "recited": [True, False]}
    assert [t for _, t in model.asked] == [0.0] * 20 + [0.7] * 100 + [0.0] * 2
    without = measure_chat(model, tok, Material([], [], {}, None, None), Config(), CPU)
    assert without.keys() == {"identity", "identity_sampled"}


def test_measure_sft(tok, model, tmp_path, monkeypatch):
    """Bits a byte and nats per token of the answers, by direct sums; greedy answers to their first questions."""
    monkeypatch.chdir(tmp_path)
    documents = [ask("春", "好坏", tok), ask("夜", "霜", tok),
                 render_chat(tok, [{"role": role, "content": text} for role, text in
                                   (("user", "月"), ("assistant", "好"), ("user", "坏"), ("assistant", "春夜"))])]
    write_pairs("data/poems-sft", tok, {"train": [documents], "val": [documents]})
    meta = json.load(open("data/poems-sft/meta.json"))
    json.dump({**meta, "kind": "sft"}, open("data/poems-sft/meta.json", "w"))
    asked = []

    def answer_all(model, tokenizer, prompts, temperature, cfg, env):
        asked.extend(prompts)
        return [tok.encode("好坏春夜月。" * 2)] + [tok.encode("好")] * 2

    monkeypatch.setattr(poems_eval, "answer_all", answer_all)
    got = measure_sft(model, tok, "data/poems-sft", Config(), CPU)
    nats = -sum(direct_logp(model, ids, mask) for ids, mask in documents)
    assert got["sft_nats"] == pytest.approx(nats / sum(sum(mask) for _, mask in documents), rel=1e-5)
    assert got["sft_bits"] == pytest.approx(nats / math.log(2) / len("好坏霜好春夜".encode()), rel=1e-5)
    assert got["unrepeated"] == got["unrepeated_greedy"] == [False, True, True]
    prompts = [render_chat(tok, [{"role": "user", "content": text}], add_generation_prompt=True)[0] for text in "春夜月"]
    assert sorted(asked) == sorted(prompts * 2)  # greedy, and at the temperature of a chat


def test_answers_do_not_depend_on_the_batch(tok, model):
    prompts = [[tok.eot_id] + tok.encode(text) for text in ("春", "夜月", "好坏。", "1")]
    alone = answer_all(model, tok, prompts, 1.0, Config(batch_size=1), CPU)
    assert answer_all(model, tok, prompts, 1.0, Config(batch_size=3), CPU) == alone
    assert all(len(ids) <= 96 - 4 for ids in alone)


def test_evaluate_run_of_a_chat_model(tok, tmp_path, monkeypatch):
    make_run(str(tmp_path), tok, max_seq_len=160)
    monkeypatch.setattr(poems_eval, "open_data", lambda *args: (None, None, None))
    monkeypatch.setattr(poems_eval, "text_loss", lambda *args: (0.0, 1.5))
    monkeypatch.setattr(poems_eval, "idiom_choice", lambda *args: [True])
    monkeypatch.setattr(poems_eval, "measure_chat", lambda *args: {})
    poems = [{"form": "五言绝句", "title": "春"}, {"form": "七言绝句", "title": "夜"}]
    same = load_model(str(tmp_path))[0]
    alone = evaluate_run(str(tmp_path), Material(poems, [], {}, None, None), Config(), CPU)
    got = evaluate_run(str(tmp_path), Material(poems, [], {}, same, ScalarModel(same.config)), Config(), CPU)
    assert "kl" not in alone and alone["bits_per_byte"] == 1.5 and alone["idioms"] == [True]
    assert got["form"] == [False] * 8 and got["rhymes"] == [] and len(got["ends"]) == 8
    assert abs(got["kl"]) < 1e-3 and math.isfinite(got["reward"]) and got["examples"] == alone["examples"]


def test_poems_from_the_command_line(tok, tmp_path, monkeypatch, capsys):
    """The quickstart's last command on folders like the quickstart's: a table of every run, the reward model too."""
    monkeypatch.chdir(tmp_path)
    stages = {"poems": "pretrain", "poems-sft": "sft", "poems-ppo": "ppo", "poems-reward": "reward"}
    for folder, stage in stages.items():
        make_run(f"out/{folder}", tok, max_seq_len=160)
        checkpoint = {**load_checkpoint(f"out/{folder}"), "stage": stage}
        if stage == "reward":
            checkpoint["model"] = ScalarModel(ModelConfig(**checkpoint["model_config"])).state_dict()
        save_checkpoint(f"out/{folder}/ckpt.pt", checkpoint)
    text = tok.encode("春夜月好坏。" * 40)
    os.makedirs("data/poems")
    np.array(text, "<u2").tofile("data/poems/train.bin")
    np.array(text, "<u2").tofile("data/poems/val.bin")
    part = {"tokens": len(text), "documents": 1, "bytes": 18 * 40}
    json.dump({"kind": "text", "dtype": "uint16", "fingerprint": tok.fingerprint, "train": part, "val": part},
              open("data/poems/meta.json", "w"))
    pairs = [[ask("春", "好好", tok), ask("春", "好", tok), ask("春", "好好好", tok)]]
    write_pairs("data/poems-pairs", tok, {"train": pairs, "val": pairs})
    os.makedirs("data/raw/poems-heldout")
    poems = [{"title": f"春{i}", "author": "月", "form": "五言绝句", "body": "好"} for i in range(3)]
    idioms = [{"word": f"春{i}夜", "explanation": f"好{i}月"} for i in range(6)]
    for name, rows in (("heldout_poems", poems), ("heldout_idioms", idioms)):
        with open(f"data/raw/poems-heldout/{name}.jsonl", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setattr(poems_eval, "FREE_SAMPLES", 4)
    monkeypatch.setattr(poems_eval, "ANSWERS", 1)
    evaluate.main(Config(n_titles=2, device="cpu"))
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["out/poems", "out/poems-sft", "out/poems-ppo", "out/poems-reward"]
    kept = json.load(open("out/evaluate.json", encoding="utf-8"))
    assert kept["out/poems"].keys() == {"bits_per_byte", "idioms", "free_equal_lines", "recital"}
    assert kept["out/poems-ppo"].keys() == {"bits_per_byte", "idioms", "form", "ends", "rhymes", "examples", "reward",
                                            "kl", "identity", "identity_sampled"}
    assert kept["out/poems-reward"].keys() == {"poem lists"} and kept["out/poems-ppo"]["form"]["n"] == 2
    assert abs(kept["out/poems-sft"]["kl"]) < 1e-4 and abs(kept["out/poems-ppo"]["kl"]) < 1e-4  # the same weights
    assert kept["out/poems"]["recital"].startswith("床前明月光") and "out/poems, recital:" in out


# ---------------------------------------------------------------------------- rewards by rule


def test_quatrain():
    """Four lines of five: right lines, less the lines missing or too many, over four."""
    line, ask_for = "床前明月光", "写一首五言绝句，题目是《春》。"
    got = [quatrain(ask_for, "，".join([line] * n)) for n in (4, 3, 5, 8, 0, 20)]
    assert got == [1.0, 0.5, 0.75, 0.0, -1.0, -1.0]
    assert quatrain(ask_for, "床前明月光，疑是地上。举头望明月，低头思故乡。") == 0.75
    assert quatrain("写一首七言绝句", "，".join([line] * 4)) == 0 and quatrain("你好", "，".join([line] * 4)) == 0
    assert quatrain("写一首七言律诗", "\n".join(["朝辞白帝彩云间"] * 8)) == 1


def test_rhyming():
    """光 霜 望 乡 are of one class (ang), 月 (e) and 天 (an) are not."""
    five = "写一首五言绝句，题目是《春》。"
    whole = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"
    assert rhyming(five, whole) == 1.0
    assert rhyming(five, whole.replace("故乡", "故月")) == 0.5        # the right form alone
    assert rhyming(five, whole.replace("故乡", "落霜")) == 0.5        # 霜 and 霜 is no rhyme
    assert rhyming(five, "床前明月光，疑是地上霜。床前明月光，低头思故乡。") == 0.75   # one line of four said twice
    assert rhyming(five, "床前明月光，疑是地上霜。") == 0.0               # two lines right, two missing
    assert rhyming(five, "床前明月光，疑是地上霜。举头望明月，低头故乡。") == 0.5 * 0.75     # three lines of four are right
    assert rhyming(five, "") == 0.0 and rhyming("你好", whole) == 0.0 and rhyming("写一首七言绝句", whole) == 0.0
    eight = ["床前明月光", "疑是地上霜", "举头望明月", "低头思故乡", "春眠不觉晓", "处处闻啼章", "夜来风雨声", "花落知多天"]
    assert rhyming("写一首五言律诗", "，".join(eight)) == pytest.approx(0.5 + 0.5 * 2 / 3)   # 霜 乡 章 of four ends


def test_rhyming_never_leaves_its_range():
    rng = np.random.default_rng(0)
    for _ in range(300):
        lines = ["".join(rng.choice(list("春夜月好坏光霜乡天"), rng.integers(3, 9))) for _ in range(rng.integers(0, 12))]
        for form in ("五言绝句", "七言律诗"):
            answer = "，".join(lines)
            got = rhyming(f"写一首{form}", answer)
            assert 0 <= got <= 1
            assert got <= 0.5 or quatrain(f"写一首{form}", answer) == 1  # no rhyme counts before the form is right
