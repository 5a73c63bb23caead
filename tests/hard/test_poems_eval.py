"""recipes/poems_eval.py: what the quickstart's runs are measured by, on models that say what they are told to."""
import json
import math
import os
import types

import numpy as np
import pytest
import torch
from small_runs import CPU, make_run, write_pairs

from common.checkpoint import load_checkpoint, load_model, save_checkpoint
from model import ModelConfig, ScalarModel
from recipes import poems_eval
from recipes.poems_eval import Material, answer_all, evaluate_run, famous_quatrains, idiom_choice, names_itself, repeats
from recipes.poems_eval import measure_chat, measure_sft, reward_accuracy, scores_of
from tokenizer import render_chat, train_tokenizer
from tools import evaluate
from tools.evaluate import Config

from test_evaluate import SMALL, direct_logp, model, tok  # noqa: F401 (fixtures)

DOCUMENTS = [([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 8, 7, 6, 5, 4, 3], [0, 1, 1, 0, 0, 1, 0]), ([1, 2], [0, 1]),
             ([40, 41, 42, 43, 44], [0, 1, 1, 1, 0]), ([7, 9, 8], [0, 1, 0])]


def ask(question, answer, tok):
    return render_chat(tok, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


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
    nobody = types.SimpleNamespace(config=types.SimpleNamespace(max_seq_len=96), trained_len=96)

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
    os.makedirs(tmp_path / "poems")
    (tmp_path / "poems/quatrains.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert famous_quatrains(str(tmp_path)) == {"静夜思": body}


class Parrot:
    """Stands for a model and for generate(): its answer is a function of the question and of how often it was asked."""

    def __init__(self, tok, answer):
        self.tok, self.answer, self.asked = tok, answer, []
        self.config = types.SimpleNamespace(max_seq_len=1000)
        self.trained_len = 1000

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
    """Bits a byte and nats a token of the answers, by direct sums; greedy answers to their first questions."""
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
    with pytest.raises(SystemExit, match="out/b/ckpt.pt is a reward model: it scores answers and writes none"):
        evaluate.main(Config("text", runs="out/b/ckpt.pt", input=str(tmp_path), device="cpu"))


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
    with pytest.raises(SystemExit, match="tokenizer"):
        make_run("out/other", train_tokenizer(["别的词汇。"], str(tmp_path / "other"), 280))
        evaluate.main(Config(n_titles=2, device="cpu", reference="out/other"))
    capsys.readouterr()
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
