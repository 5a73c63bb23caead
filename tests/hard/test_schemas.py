"""readers/: which field means what, and the folders made of it."""
import collections
import json
import os

import numpy as np
import pytest

from common.data import FILES
from prepared import messages, run, small_tokenizer, write
from common import rows
from readers.account import Skip
from readers.files import split_of
from readers.schemas import convert
from tokenizer import render_chat


@pytest.fixture(scope="module")
def tok_file(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("record,text", [
    ({"text": "诗", "meta": {"pile_set_name": "x"}}, "诗"),
    ({"content": "诗"}, "诗"),
    ({"title": "题", "content": "诗"}, "题\n诗"),
    ({"completion": "诗"}, "诗"),
    ({"title": "题", "summary": "摘要", "sections": [{"title": "一", "content": "甲"}, {"title": "二", "content": "乙"}]},
     "题\n摘要\n一\n甲\n二\n乙"),
    ({"title": "题", "summary": None, "sections": [{"title": "一", "content": "甲"}]}, "题\n一\n甲"),
    ("诗", "诗"),
])
def test_text_schemas(record, text):
    assert convert(record, "text")[0] == text


CONVERSATIONS = [
    ({"instruction": "翻译", "input": "月", "output": "moon"}, ["u:翻译\n月", "a:moon"]),
    ({"instruction": "写诗", "input": "", "output": "诗"}, ["u:写诗", "a:诗"]),
    ({"instruction": "写诗", "output": "诗", "system": "诗人", "history": [["甲", "乙"]]},
     ["s:诗人", "u:甲", "a:乙", "u:写诗", "a:诗"]),
    ({"prompt": "问", "response": "答"}, ["u:问", "a:答"]),
    ({"question": "问", "answer": "答"}, ["u:问", "a:答"]),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}, ["u:问", "a:答"]),
    ({"system": "诗人", "conversations": [{"from": "user", "value": "问"}, {"from": "assistant", "value": "答"}]},
     ["s:诗人", "u:问", "a:答"]),
    ({"messages": [{"role": "system", "content": "诗人"}, {"role": "user", "content": "问"},
                   {"role": "assistant", "content": "答"}, {"role": "user", "content": "再问"},
                   {"role": "assistant", "content": "再答"}]}, ["s:诗人", "u:问", "a:答", "u:再问", "a:再答"]),
    ({"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, ["u:问", "a:答"]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]},
                   {"role": "assistant", "content": "答"}]}, ["u:问", "a:答"]),
    ([{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], ["u:问", "a:答"]),
    # left out: an empty system turn, a question without an answer, whatever follows an empty answer
    ({"messages": messages("s:", "u:问", "a:答", "u:再问")}, ["u:问", "a:答"]),
    ({"messages": messages("u:问", "a:答", "u:甲", "a: ", "u:乙", "a:丙")}, ["u:问", "a:答"]),
]


@pytest.mark.parametrize("record,turns", CONVERSATIONS)
def test_conversation_schemas(record, turns):
    assert convert(record, "sft")[0] == messages(*turns)


@pytest.mark.parametrize("record,reason", [
    ({"text": "诗"}, "no question and answer"),
    ({"instruction": "问", "output": ""}, "empty"),
    ({"instruction": "", "output": "答"}, "empty"),
    ({"conversations": [{"from": "alien", "value": "问"}]}, "unknown role"),
    ({"messages": []}, "no question and answer"),
])
def test_conversations_that_cannot_be_used(record, reason):
    with pytest.raises(Skip) as e:
        convert(record, "sft")
    assert e.value.reason == reason


PROMPT = messages("u:问")
RANKINGS = [
    ({"prompt": "问", "chosen": "好", "rejected": "坏"}, PROMPT, ["好", "坏"]),
    ({"prompt": "问", "chosen": "好", "reject": "坏"}, PROMPT, ["好", "坏"]),
    ({"system": "诗人", "question": "问", "chosen": "好", "rejected": "坏"}, messages("s:诗人", "u:问"), ["好", "坏"]),
    ({"prompt": PROMPT, "chosen": messages("a:好"), "rejected": messages("a:坏")}, PROMPT, ["好", "坏"]),
    ({"prompt": PROMPT, "chosen": messages("u:问", "a:好"), "rejected": messages("u:问", "a:坏")}, PROMPT, ["好", "坏"]),
    ({"chosen": messages("u:甲", "a:乙", "u:问", "a:好"), "rejected": messages("u:甲", "a:乙", "u:问", "a:坏")},
     messages("u:甲", "a:乙", "u:问"), ["好", "坏"]),
    ({"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "好"},
      "rejected": {"from": "gpt", "value": "坏"}}, PROMPT, ["好", "坏"]),
    ({"prompt": "问", "responses": ["中", "坏", "好"], "ranks": [2, 3, 1]}, PROMPT, ["好", "中", "坏"]),
    ({"prompt": "问", "responses": ["中", "坏", "好"], "order": [2, 0, 1]}, PROMPT, ["好", "中", "坏"]),
    ({"prompt": "问", "responses": ["中", "坏", "好", "也中"], "ranks": [2, 3, 1, 2]}, PROMPT, ["好", "中", "坏"]),
    ({"prompt": "问", "responses": ["好", "好", "坏"], "ranks": [1, 2, 3]}, PROMPT, ["好", "坏"]),
]


@pytest.mark.parametrize("record,prompt,answers", RANKINGS)
def test_preference_schemas(record, prompt, answers):
    got, notes = convert(record, "pairs")
    assert got == {"prompt": prompt, "answers": answers}
    assert notes.cut["tied or equal answers"] == len(record.get("responses", "ab")) - len(answers)


@pytest.mark.parametrize("record,reason", [
    ({"prompt": "问", "chosen": "好"}, "no ranked answers"),
    ({"prompt": "问", "responses": ["甲", "乙"]}, "no ranking"),
    ({"prompt": "问", "responses": ["甲", "乙"], "ranks": [1]}, "no ranking"),
    ({"prompt": "问", "responses": "[]"}, "no ranking"),
    ({"prompt": "问", "chosen": "好", "rejected": " "}, "empty"),
    ({"prompt": "问", "chosen": "好", "rejected": "nan"}, "empty"),
    ({"chosen": "好", "rejected": "坏"}, "empty"),
    ({"chosen": messages("u:甲", "a:好"), "rejected": messages("u:乙", "a:坏")}, "answers to different prompts"),
])
def test_preferences_that_cannot_be_used(record, reason):
    with pytest.raises(Skip) as e:
        convert(record, "pairs")
    assert e.value.reason == reason


@pytest.mark.parametrize("record,turns", [
    ({"prompt": "问"}, ["u:问"]),
    ({"instruction": "翻译", "input": "月", "output": "moon"}, ["u:翻译\n月"]),
    ({"messages": messages("s:诗人", "u:问", "a:答")}, ["s:诗人", "u:问"]),
    ({"conversations": messages("u:问", "a:答", "u:再问")}, ["u:问", "a:答", "u:再问"]),
])
def test_prompt_schemas(record, turns):
    assert convert(record, "prompts")[0] == messages(*turns)


def check_files(folder):
    """Sizes of the files against each other and meta.json."""
    for split in ("train", "val"):
        meta, tokens = folder.meta[split], folder.array(f"{split}.bin")
        assert len(tokens) == meta["tokens"]
        names = {f.split(".")[1] for f in os.listdir(folder.path) if f.startswith(split)}
        assert names == set(FILES[folder.meta["kind"]])
        if "idx" in names:
            offsets = folder.array(f"{split}.idx", np.int64)
            assert len(offsets) == meta["documents"] + 1 and offsets[0] == 0 and offsets[-1] == len(tokens)
        if "mask" in names:
            mask = folder.array(f"{split}.mask", np.uint8)
            assert len(mask) == len(tokens) and mask.sum() == meta["learned"]
        if "group" in names:
            group = folder.array(f"{split}.group", np.int32)
            assert len(group) == meta["documents"] and len(set(group)) == meta["groups"]
    assert sorted(os.listdir("data")) == [os.path.basename(folder.path)]
    assert folder.meta["fingerprint"] == folder.tok.fingerprint and folder.meta["vocab_size"] == folder.tok.vocab_size


@pytest.mark.parametrize("chunk_bytes", [300, 10**6])     # many chunks, and all in one
def test_sft_folder(tok_file, monkeypatch, chunk_bytes):
    monkeypatch.setattr(rows, "CHUNK_BYTES", chunk_bytes)
    os.mkdir("in")
    write("in/a.jsonl", [record for record, _ in CONVERSATIONS])
    folder = run(tok_file, kind="sft", val_fraction=0.3)
    check_files(folder)
    want = {tuple(map(tuple, zip(*render_chat(folder.tok, messages(*turns))))) for _, turns in CONVERSATIONS}
    got = {tuple(zip(ids, mask)) for split in ("train", "val")
           for ids, mask in zip(folder.rows(split), folder.rows(split, "mask", np.uint8))}
    assert got == want
    assert folder.meta["dropped"] == {"duplicate": len(CONVERSATIONS) - len(want)}
    words = "".join(folder.learned("train")).replace("<|im_end|>", "")
    assert folder.meta["train"]["bytes"] == len(words.encode())


@pytest.mark.parametrize("chunk_bytes", [300, 10**6])
def test_pairs_folder(tok_file, monkeypatch, chunk_bytes):
    monkeypatch.setattr(rows, "CHUNK_BYTES", chunk_bytes)
    os.mkdir("in")
    extra = [{"prompt": f"问{i}", "responses": ["甲", "乙", "丙", "丁"], "ranks": [4, 3, 2, 1]} for i in range(20)]
    same = {"prompt": "问", "chosen": "一样", "rejected": "一样"}
    long = {"prompt": "问", "responses": ["好", "龘" * 200, "坏"], "ranks": [1, 2, 3]}
    write("in/a.jsonl", [record for record, _, _ in RANKINGS] + extra + [same, long])
    folder = run(tok_file, kind="pairs", val_fraction=0.2, max_length=200)
    check_files(folder)
    assert folder.meta["dropped"]["fewer than two ranked answers"] == 1
    assert folder.meta["cut"] == {"tied or equal answers": 2, "answers longer than --max_length=200": 1}
    want = {(json.dumps(prompt, ensure_ascii=False), tuple(answers)) for _, prompt, answers in RANKINGS}
    want |= {(json.dumps(messages(f"u:问{i}"), ensure_ascii=False), ("丁", "丙", "乙", "甲")) for i in range(20)}
    by_row = {}     # (ids, what is learned) → rank
    for prompt, answers in want:
        for rank, answer in enumerate(answers):
            ids, _ = render_chat(folder.tok, json.loads(prompt) + messages("a:" + answer))
            by_row[tuple(ids), answer + "<|im_end|>"] = rank
    for split in ("train", "val"):
        groups = collections.defaultdict(list)
        for ids, learned, group in zip(folder.rows(split), folder.learned(split),
                                       folder.array(f"{split}.group", np.int32).tolist()):
            groups[group].append(by_row[tuple(ids), learned])       # the mask is on the last answer alone
        assert groups and list(groups) == list(range(len(groups)))
        assert all(len(ranks) >= 2 and ranks == sorted(ranks) for ranks in groups.values())


def test_one_instruction_with_many_instances(tok_file):
    os.mkdir("in")
    instances = [{"input": "月", "output": "moon"}, {"input": "山", "output": "mountain"}]
    write("in/a.jsonl", [{"id": 1, "instruction": "翻译", "instances": instances, "is_classification": False}])
    folder = run(tok_file, kind="sft", val_fraction=0.0)
    assert sorted(folder.learned()) == ["moon<|im_end|>", "mountain<|im_end|>"] and folder.meta["read"] == 2


def test_thumbs_down_is_dropped_and_counted(tok_file, capsys):
    os.mkdir("in")
    labels = [0, True, 1, "True"]
    write("in/a.jsonl", [{"prompt": f"问{i}", "completion": f"答{i}", "label": labels[i % 4]} for i in range(40)])
    folder = run(tok_file, kind="sft")
    assert folder.meta["dropped"] == {"thumbs down": 10} and folder.meta["kept"] == 30
    assert not {f"答{i}<|im_end|>" for i in range(0, 40, 4)} & set(folder.learned() + folder.learned("val"))


def test_used_and_ignored_fields_are_counted():
    _, notes = convert({"instruction": "问", "input": "", "output": "答", "category": "qa", "score": 3, "tags": [],
                        "split": "dev"}, "sft")
    assert notes.used == {"instruction", "output", "split"} and notes.ignored == {"category": 0, "score": 0}
    assert notes.split == "val"
    _, notes = convert({"messages": [{"role": "user", "content": "问", "emotion": "喜"}, *messages("a:答", "u:又问")],
                        "prompt": "问", "split": ["a"]}, "sft")
    assert notes.used == {"messages"} and notes.ignored == {"messages.emotion": 1, "prompt": 0, "split": 0}
    assert notes.cut == {"a question without an answer": 1}
    turn = {"role": "assistant", "content": "答", "text": "别的", "weight": 0.5, "thinking": "想", "reasoning": "思"}
    got, notes = convert({"messages": [*messages("u:问"), turn]}, "sft")
    assert notes.ignored == {"messages.text": 2, "messages.weight": 0, "messages.thinking": 1}
    assert got[1] == {"role": "assistant", "content": "<think>\n思\n</think>\n\n答"}
    _, notes = convert({"text": "诗", "url": "http://a.b/c", "note": "a b"}, "text")
    assert notes.ignored == {"url": 0, "note": 3}  # characters of text
    _, notes = convert({"messages": messages("u:甲", "a:乙", "u:丙", "a: ", "u:丁", "a:戊")}, "sft")
    assert notes.cut == {"turns from an empty one on": 1, "a question without an answer": 1}


@pytest.mark.parametrize("kind,fields,record,want", [
    ("text", "text:story", {"story": "很久以前", "summary": "短"}, "很久以前"),
    ("text", "text:title,text:body", {"title": "静夜思", "body": ["床前", "明月光"]}, "静夜思\n床前\n明月光"),
    ("text", "text:meta.words", {"meta": {"words": "很久以前"}}, "很久以前"),
    ("sft", "question:ask,answer:reply", {"ask": "问", "reply": "答", "answer": "别的"}, messages("u:问", "a:答")),
    ("sft", "question:ask,answer:good,system:role", {"ask": "问", "good": "答", "bad": "坏", "role": "诗人"},
     messages("s:诗人", "u:问", "a:答")),
    ("pairs", "question:ask,chosen:good,rejected:bad", {"ask": "问", "good": "好", "bad": "坏"},
     {"prompt": messages("u:问"), "answers": ["好", "坏"]}),
    ("sft", "messages:talk", {"talk": messages("u:问", "a:答")}, messages("u:问", "a:答")),
])
def test_fields_say_which_field_is_which(kind, fields, record, want):
    pairs = [tuple(item.split(":")) for item in fields.split(",")]
    got, notes = convert({**record, "split": "test"}, kind, pairs)
    assert got == want and notes.split == "val"
    assert notes.used == {theirs.split(".")[0] for _, theirs in pairs} | {"split"}
    with pytest.raises(Skip, match="no such field: --fields names .*, the fields are other"):
        convert({"other": 1}, kind, pairs)


def test_split_names():
    assert {split_of(name) for name in ("train", "TRAIN", "train_sft", "training")} == {"train"}
    assert {split_of(name) for name in ("validation", "valid", "val", "dev", "test", "eval", "Test_sft")} == {"val"}
    assert {split_of(name) for name in ("fold3", ["a"], None, 7, "")} == {None}


def test_splits_are_told_by_whole_words_of_files_and_folders(tok_file):
    assert {split_of(name) for name in ("my_train", "训练集", "训练数据", "train-00000-of-00002")} == {"train"}
    held_out = (" test", "cmrc2018_dev", "sft_dev_v2", "chat.test.v1", "held-out", "holdout", "测试集", "开发集")
    assert {split_of(name) for name in held_out} == {"val"}
    assert {split_of(name) for name in ("values", "testimony", "developer_notes", "traineeship")} == {None}
    os.makedirs("in/train")
    os.makedirs("in/test")
    write("in/train/a.jsonl", [{"text": f"床前明月光{i}"} for i in range(20)])
    write("in/test/a.jsonl", [{"text": f"疑是地上霜{i}"} for i in range(5)])
    write("in/values.jsonl", [{"text": f"举头望明月{i}"} for i in range(5)])
    folder = run(tok_file, val_fraction=0.0)
    assert folder.texts("val") == [f"疑是地上霜{i}" for i in range(5)] and len(folder.texts("train")) == 25


@pytest.mark.parametrize("kind", ["sft", "prompts"])
def test_lists_of_records_are_many_records(tok_file, kind):
    records = [{"instruction": f"问{i}", "output": f"答{i}"} for i in range(20)]
    os.mkdir("in")
    write("in/lines.jsonl", [records[:10]])
    write("in/data.jsonl", [{"data": records[10:]}])
    folder = run(tok_file, kind=kind)
    assert folder.meta["read"] == folder.meta["kept"] == 20
    if kind == "sft":
        assert set(folder.learned() + folder.learned("val")) == {f"答{i}<|im_end|>" for i in range(20)}


def test_a_folder_named_after_a_split_counts_more_than_a_file(tok_file):
    for name, text in (("train/test_cases", "床前明月光"), ("test/train_tickets", "疑是地上霜")):
        os.makedirs(f"in/{name.split('/')[0]}")
        write(f"in/{name}.jsonl", [{"text": f"{text}{i}"} for i in range(9)])
    folder = run(tok_file, val_fraction=0.0)
    assert folder.texts("val") == [f"疑是地上霜{i}" for i in range(9)]


def test_what_stands_beside_a_list_of_records(tok_file):
    os.mkdir("in")
    for split in ("train", "test"):
        data = [{"question": f"{split}{i}", "answer": "答"} for i in range(9)]
        write(f"in/{split}s.jsonl", [{"split": split, "source": "某处", "data": data}])
    folder = run(tok_file, kind="sft")
    assert len(folder.texts("val")) == 9 and folder.meta["fields"]["in/trains.jsonl"]["ignored"] == {"source": 9}
