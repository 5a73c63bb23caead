"""The data sets of docs/data.md: a sample of each in its form, rebuilt here, prepared with the very command that stands
there. Nothing of the sets themselves is in it."""
import csv
import gzip
import json
import os
import re
import shlex

import numpy as np
import pytest

import prepare
from configurator import load_config
from conftest import ROOT
from prepared import Folder, messages, small_tokenizer, write

N = 40


def tale(i):
    return f"第{i}天渔夫去了河边，修好了{i}条船，天黑才回来。"


def turns(*words, names=("role", "content"), roles=("user", "assistant")):
    return [{names[0]: roles[i % 2], names[1]: text} for i, text in enumerate(words)]


def qa(make):
    """Records of a question and an answer."""
    return [make(f"第{i}天渔夫做了什么？", tale(i), f"不{i}") for i in range(N)]


def lines(path, records):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write(path, records)


def array(path, records):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(records, f, ensure_ascii=False)


def texts(make):
    return [make(tale(i)) for i in range(N)]


# ---------------------------------------------------------------- a sample of each, by the name in the command


def wiki():
    array("wikipedia-cn-20230720-filtered.json", texts(lambda t: {"completion": t, "source": "wikipedia.zh2307"}))


def baike():
    lines("563w_baidubaike.json", [{"title": f"渔夫{i}", "summary": "一种人。", "tags": ["人"], "url": "http://a.b/c", "sections":
                                    [{"title": "简介", "content": tale(i)}, {"title": "", "content": "完。"}]} for i in range(N)])


def c4():
    os.makedirs("c4-zh")
    for part in range(2):
        with gzip.open(f"c4-zh/{part}.json.gz", "wt", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": tale(i), "timestamp": "2020-01-01T00:00:00Z", "url": "http://a.b/c"}) + "\n"
                         for i in range(part, N, 2))


def wudao():
    for part in range(2):
        array(f"WuDaoCorpus/part-{part}.json", [{"id": i, "uniqueKey": "a", "titleUkey": "b", "dataType": "百科", "title":
                                                 f"渔夫{i}", "content": tale(i)} for i in range(part, N, 2)])


def skypile():
    lines("SkyPile/2020-40_zh_head_0000.jsonl", texts(lambda t: {"text": t}))


def medical():
    lines("medical_book_zh.json", texts(lambda t: {"text": t})[:20])
    lines("train_encyclopedia.json", texts(lambda t: {"text": t})[20:])


def stories():
    array("TinyStoriesChinese/data00_zh.json", [{"story": f"One day boat {i} sailed out.", "summary": "短", "source": "GPT-4",
                                                 "instruction": {"words": ["boat"]}, "story_zh": tale(i)} for i in range(N)])


def mini():
    lines("pretrain_hq.jsonl", [{"text": f"<|im_start|>{tale(i)}<|im_end|> <|im_start|>{tale(i + 1)}<|im_end|>"}
                                for i in range(0, N, 2)])


def baby():
    import sentencepiece
    os.makedirs("chatglm2")
    os.makedirs("baby")
    with open("chatglm2/tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts(str)), model_writer=f, vocab_size=400, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity")
    tok = sentencepiece.SentencePieceProcessor(model_file="chatglm2/tokenizer.model")
    for part in range(2):
        # its own [gMASK] and sop stand before some of the texts, as ids after those of the vocabulary
        ids = [[tok.vocab_size() + 1, tok.vocab_size() + 3] * part + tok.encode(tale(i)) + [2] for i in range(part, N, 2)]
        np.concatenate(ids).astype(np.uint16).tofile(f"baby/{part}.bin")


def alpaca():
    array("alpaca_gpt4_data_zh.json", qa(lambda q, a, b: {"instruction": q, "input": "", "output": a}))


def belle():
    lines("train_2M_CN.json", qa(lambda q, a, b: {"instruction": q, "input": "", "output": a})[:20])
    lines("school_math_0.25M.json", qa(lambda q, a, b: {"instruction": q, "input": "", "output": a})[20:])


def multiturn():
    lines("multiturn_chat_0.8M.json", qa(lambda q, a, b: {
        "instruction": f"Human:你好\nAssistant:你好，请说\nHuman:{q}\nAssistant:", "input": "", "output": a}))


def firefly():
    lines("firefly-train-1.1M.jsonl", qa(lambda q, a, b: {"kind": "NLI", "input": q, "target": a}))


def moss2():
    lines("moss-002.jsonl", qa(lambda q, a, b: {
        "id": 1, "prefix": "你是一个助手。", "num_turns": 2, "plain_text":
        f"[Human]: 你好<eoh> [MOSS]: 你好！<eoa> [Human]: {q}<eoh> [MOSS]: {a}<eoa> ", "is_code_related": False}))


def moss3():
    lines("moss-003.jsonl", qa(lambda q, a, b: {
        "conversation_id": "1", "meta_instruction": "你是一个助手。", "num_turns": 1, "category": "Brainstorming", "chat": {
            "turn_1": {"Human": f"<|Human|>: {q}<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n", "Commands":
                       "<|Commands|>: None<eoc>\n", "Tool Responses": "<|Results|>: None<eor>\n",
                       "MOSS": f"<|MOSS|>: {a}<eom>\n"}}}))


def cognition():
    lines("self_cognition.jsonl", [{"query": f"你是谁{i}？", "response": f"我是{{{{NAME}}}}。{tale(i)}", "tag": "zh"} for i in range(N)])


def sharegpt():
    lines("common_zh_70k.jsonl", qa(lambda q, a, b: {
        "conversation_id": "1", "category": "Brainstorming", "conversation": [{"human": "你好", "assistant": "你好！"},
                                                                              {"human": q, "assistant": a}]}))


def deepctrl():
    lines("sft_data_zh.jsonl", qa(lambda q, a, b: {
        "id": 1, "instruction": q, "input": "", "output": a, "history": [["你好", "你好！"]], "language": "zh",
        "data_source": "某处", "input_len": 9, "output_len": 20, "num_utter": 2}))


def cqia():
    lines("coig-cqia.jsonl", qa(lambda q, a, b: {
        "instruction": q, "input": "", "output": a, "task_type": {"major": ["问答"], "minor": ["常识"]}, "domain": ["百科"],
        "metadata": None, "answer_from": "human", "human_verified": False, "copyright": "作者个人公开"}))


def exams():
    lines("exam_instructions.jsonl", qa(lambda q, a, b: {
        "textbox_q_instruction": "请回答。", "textbox_q_context": "", "textbox_question": q, "textbox_answer": a,
        "textbox_answer_analysis": "略"}))


def minisft():
    lines("sft_mini_512.jsonl", qa(lambda q, a, b: {"conversations": turns("你好", "你好！", q, a)}))


def dpo20k():
    array("dpo_zh.json", qa(lambda q, a, b: {
        "conversations": turns(q, names=("from", "value"), roles=("human", "gpt")), "chosen": {"from": "gpt", "value": a},
        "rejected": {"from": "gpt", "value": b}}))


def hh():
    records = qa(lambda q, a, b: {"context": turns(q, names=("role", "text"), roles=("human", "assistant")),
                                  "chosen": {"role": "assistant", "text": a}, "rejected": {"role": "assistant", "text": b}})
    lines("hh_rlhf_cn/helpful_base_cn_train.jsonl", records[:30])
    lines("hh_rlhf_cn/helpful_base_cn_test.jsonl", records[30:])


def cvalues():
    records = qa(lambda q, a, b: {"prompt": q, "pos_resp": a, "neg_resp": b, "pos_type": "拒绝&正向建议", "neg_type": "风险回复"})
    lines("cvalues/train.jsonl", records[:30])
    lines("cvalues/test.jsonl", records[30:])


def zhihu():
    with open("zhihu_3k_rlhf.tsv", "w", encoding="utf-8", newline="") as f:
        rows = csv.writer(f, delimiter="\t")
        rows.writerows([["prompt", "chosen", "rejected"], *qa(lambda q, a, b: [q, a, b])])


def ultra():
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    os.makedirs("ultrafeedback")
    records = qa(lambda q, a, b: {"prompt": q, "prompt_id": "a", "chosen": turns(q, a), "rejected": turns(q, b),
                                  "messages": turns(q, a), "score_chosen": 9.0, "score_rejected": 3.0})
    for name, part in (("train_prefs", records[:30]), ("test_prefs", records[30:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), f"ultrafeedback/{name}-00000-of-00001.parquet")


def minidpo():
    lines("dpo.jsonl", qa(lambda q, a, b: {"chosen": turns(q, a), "rejected": turns(q, b)}))


def rlaif():
    lines("rlaif-mini.jsonl", qa(lambda q, a, b: {"conversations": turns(q, "空")}))


SAMPLES = {"wiki": wiki, "baike": baike, "c4": c4, "wudao": wudao, "skypile": skypile, "medical": medical, "stories": stories,
           "mini": mini, "baby": baby, "alpaca": alpaca, "belle": belle, "turns": multiturn, "firefly": firefly, "moss2": moss2,
           "moss3": moss3, "self": cognition, "sharegpt": sharegpt, "deepctrl": deepctrl, "cqia": cqia, "exams": exams,
           "minisft": minisft, "dpo20k": dpo20k, "hh": hh, "cvalues": cvalues, "zhihu": zhihu, "ultra": ultra,
           "minidpo": minidpo, "rlaif": rlaif}


def commands(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        found = [shlex.split(line) for line in re.findall(r"^\|.*?`python prepare\.py ([^`]+)`", f.read(), re.MULTILINE)]
    return {command[0]: command for command in found}


COMMANDS = commands("docs/data.md")


def test_every_data_set_has_a_sample():
    assert list(COMMANDS) == list(SAMPLES) and commands("docs/data_zh.md") == COMMANDS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    small_tokenizer(folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_each_form_is_read_with_the_command_of_the_docs(tmp_path, monkeypatch, base, name):
    monkeypatch.chdir(tmp_path)
    SAMPLES[name]()
    os.makedirs("data")
    os.symlink(base, "data/base")
    argv = [*COMMANDS[name], "--workers=1"]
    if not any(word.startswith("--tokenizer") for word in argv):
        argv.append("--vocab_size=400")
    folder = Folder(prepare.prepare(load_config(prepare.Config, argv, positional="name")))
    meta = folder.meta
    # every record is accounted for, and none is lost
    assert meta["read"] == meta["kept"] == N and meta["dropped"] == meta["skipped"] == {}
    found = "".join(folder.texts() + folder.texts("val"))
    if meta["kind"] == "prompts":
        assert all(f"第{i}天渔夫做了什么？" in found for i in range(N)) and "空" not in found
        return
    assert all(tale(i) in found for i in range(N))
    assert meta["val"]["documents"] > 0
    if meta["kind"] == "text":
        return
    # the answer is what is learned, the question is not
    learned = folder.learned() + folder.learned("val")
    wanted = {"moss2": "你好！", "minisft": "你好！", "sharegpt": "你好！", "turns": "你好，请说", "deepctrl": "你好！"}.get(name)
    assert all(any(tale(i) in text for text in learned) for i in range(N)) and "做了什么" not in "".join(learned)
    assert wanted is None or all(text.startswith(wanted) for text in learned)
    if meta["kind"] == "pairs":
        answers = dict(zip(np.flatnonzero(np.diff(folder.array("train.group", np.int32), prepend=-1)), learned[::2]))
        assert all("渔夫" in answer for answer in list(answers.values())[:20])  # the best one comes first
    if name in ("moss2", "moss3"):
        assert not re.search("<eo|MOSS", "".join(learned))


def test_messages_of_this_file():
    assert turns("问", "答") == messages("u:问", "a:答")
