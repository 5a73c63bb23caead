"""readers/: formats, encodings, damaged files, every schema, and what is told of the fields."""
import bz2
import collections
import gzip
import json
import lzma
import os

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from common.data import FILES
from prepared import POEMS, messages, run, small_tokenizer, write
from common import rows
from common.documents import clean
from readers.account import Drop, Skip
from readers import report
from readers.files import split_of
from readers.schemas import convert
from tokenizer import render_chat


@pytest.fixture(scope="module")
def tok_file(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- formats and encodings

def write_format(name):
    """Three documents as `name`; returns nothing."""
    texts = POEMS[:3]
    if ".txt" in name.lower():
        data = "\n\n".join(texts).encode()
    elif ".jsonl" in name:
        data = "\n".join(json.dumps({"text": t}) for t in texts).encode()
    elif ".json" in name:
        data = json.dumps([{"text": t} for t in texts], ensure_ascii=False, indent=2).encode()
    elif ".csv" in name:
        data = ("id,text\r\n" + "".join(f'{i},"{t}"\r\n' for i, t in enumerate(texts))).encode()
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), f"in/{name}")
        return
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".bz2"):
        data = bz2.compress(data)
    if name.endswith(".xz"):
        data = lzma.compress(data)
    if name.endswith(".zst"):  # in two frames
        zstandard = pytest.importorskip("zstandard")
        data = zstandard.compress(data[:70]) + zstandard.compress(data[70:])
    with open(f"in/{name}", "wb") as f:
        f.write(data)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "A.TXT.gz", "a.jsonl.zst",
                                  "a.json.gz", "a.csv.zst", "a.txt.bz2", "a.jsonl.xz"])
def test_formats(tok_file, name):
    os.mkdir("in")
    write_format(name)
    folder = run(tok_file)
    assert folder.all_texts() == sorted(POEMS[:3])
    assert folder.meta["read"] == 3 and folder.meta["dropped"] == folder.meta["skipped"] == {}
    assert folder.meta["sources"] == [f"in/{name}"]


def test_a_folder_of_folders_and_one_file(tok_file):
    os.makedirs("in/sub/deep")
    for name in ("a.txt", "sub/b.jsonl", "sub/deep/c.json.gz"):
        write_format(name)
    with open("in/README", "w") as f:
        f.write("not data")
    folder = run(tok_file)
    assert folder.meta["read"] == 9 and folder.meta["dropped"] == {"duplicate": 6}
    assert run(tok_file, name="y", input="in/sub/b.jsonl").all_texts() == sorted(POEMS[:3])


@pytest.mark.parametrize("how,count", [("blank", 2), ("line", 3), ("file", 1)])
def test_where_a_txt_document_ends(tok_file, how, count):
    os.mkdir("in")
    with open("in/a.txt", "w") as f:
        f.write("\n床前明月光，\r\n疑是地上霜。\n\n \n\n白日依山尽，黄河入海流。")
    folder = run(tok_file, txt_document=how, val_fraction=0.0)
    assert len(folder.texts()) == count
    if how == "blank":
        assert folder.texts()[0] == "床前明月光，\n疑是地上霜。"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("ending", ["txt", "jsonl", "json", "csv"])
def test_encodings(tok_file, encoding, ending):
    os.mkdir("in")
    write_format(f"a.{ending}")
    if ending == "jsonl":
        write(f"in/a.{ending}", [{"text": t} for t in POEMS[:3]])
    with open(f"in/a.{ending}", encoding="utf-8", newline="") as f:
        text = f.read()
    with open(f"in/a.{ending}", "w", encoding=encoding, newline="") as f:
        f.write(text)
    assert run(tok_file).all_texts() == sorted(POEMS[:3])


def test_mixed_encodings_lose_nothing(tok_file, capsys):
    os.mkdir("in")
    lines = [f"{poem}{i}\n".encode("gb18030" if i % 3 == 1 else "utf-8") for i, poem in enumerate(POEMS * 20)]
    with open("in/a.txt", "wb") as f:
        f.writelines(lines[:40] + [b"\xff\xff\xc0\n"] + lines[40:])
    folder = run(tok_file, txt_document="line")
    assert folder.all_texts() == sorted(f"{poem}{i}" for i, poem in enumerate(POEMS * 20))
    assert folder.meta["skipped"] == {"wrong encoding": 1}
    assert "skipped in/a.txt:41: wrong encoding: neither UTF-8, GB18030" in capsys.readouterr().err


def test_utf8_lines_late_in_a_gb18030_file(tok_file):
    os.mkdir("in")
    texts = [f"{poem * 20}{i}" for i, poem in enumerate(POEMS * 20)]
    late = "春风又绿江南岸上"            # eight characters: its UTF-8 is valid GB18030 too, of other characters
    assert late.encode().decode("gb18030") != late
    with open("in/a.txt", "wb") as f:
        f.write("\n".join(texts * 20).encode("gb18030") + b"\n" + late.encode() + b"\n")
    assert run(tok_file, txt_document="line").all_texts() == sorted([*texts, late])


def test_old_mac_line_ends(tok_file):
    os.mkdir("in")
    with open("in/a.txt", "wb") as f:
        f.write("\r\r".join(POEMS).encode())
    assert run(tok_file).all_texts() == sorted(POEMS)


def test_gb18030_whose_bytes_look_like_json(tok_file):
    """The second byte of 乗 in GB18030 is a backslash: the line must be decoded before it is parsed."""
    os.mkdir("in")
    texts = [f"{poem}乗俓冾{i}" for i, poem in enumerate(POEMS)]
    assert b"\\" in texts[0].encode("gb18030")
    with open("in/a.jsonl", "wb") as f:
        f.write(json.dumps({"text": POEMS[0]}, ensure_ascii=False).encode() + b"\n")
        f.writelines(json.dumps({"text": t}, ensure_ascii=False).encode("gb18030") + b"\n" for t in texts)
    assert run(tok_file).all_texts() == sorted(texts + POEMS[:1])


# ---------------------------------------------------------------- damaged input

def test_damaged_files_are_reported_and_the_rest_kept(tok_file, capsys):
    os.mkdir("in")
    good = [f"{poem}{i}" for i, poem in enumerate(POEMS * 25)]
    with open("in/good.jsonl", "w") as f:
        for i, text in enumerate(good):
            f.write(json.dumps({"text": text}) + "\n")
            if i == 49:
                f.write('{"text": "never closed\n\n{"title": "no text"}\n{"text": "  "}\n{"text": 7}\n')
    open("in/empty.txt", "w").close()
    open("in/empty.json", "w").close()
    open("in/empty.csv", "w").close()
    open("in/empty.jsonl.gz", "w").close()
    with open("in/binary.txt", "wb") as f:
        f.write(bytes(range(256)) * 10)
    with open("in/notgzip.txt.gz", "wb") as f:
        f.write(b"not gzip")
    with open("in/nota.parquet", "wb") as f:
        f.write(b"nope")
    packed = gzip.compress("\n\n".join(f"{poem}第{i}首" for i, poem in enumerate(POEMS * 10_000)).encode())
    with open("in/cut.txt.gz", "wb") as f:
        f.write(packed[:len(packed) // 2])
    folder = run(tok_file, max_skipped=0.5)
    dropped = folder.meta["skipped"]
    assert dropped == {"broken JSON": 1, "no text field": 1, "empty": 1, "wrong type": 1, "binary file": 1,
                       "damaged file": len([1 for name in ("notgzip", "nota", "cut")])}
    kept = folder.all_texts()
    assert set(good) <= set(kept) and len(kept) > len(good) + 100        # and the readable half of the cut file
    assert folder.meta["read"] == len(kept) + sum(dropped.values())
    err = capsys.readouterr().err
    for message in ("good.jsonl:51: broken JSON", "no text field: the fields are title", "binary.txt: binary file",
                    "notgzip.txt.gz: damaged file: BadGzipFile", "nota.parquet: damaged file",
                    "cut.txt.gz: damaged file: EOFError", "it breaks off"):
        assert message in err


@pytest.mark.parametrize("ending", ["parquet", "jsonl.gz", "json.zst", "csv", "txt.xz"])
def test_an_empty_file_is_no_reason_to_stop(tok_file, ending):
    os.mkdir("in")
    open(f"in/a.{ending}", "w").close()
    with pytest.raises(SystemExit, match="no records|nothing is left|cannot be used"):
        run(tok_file)
    with open("in/b.txt", "w") as f:
        f.write("\n\n".join(POEMS))
    assert run(tok_file, max_skipped=0.2).all_texts() == sorted(POEMS)


def test_json_goes_on_after_a_broken_record(tok_file):
    os.mkdir("in")
    with open("in/a.json", "w") as f:
        f.write('[{"text": "%s"},\n {"text": "broken" oops},\n {"text": "%s"}, {"text": "%s"}\n]' % tuple(POEMS[:3]))
    with open("in/cut.json", "w") as f:
        f.write('[{"text": "%s"},\n {"text": "%s' % (POEMS[3], POEMS[0]))
    with open("in/open.json", "w") as f:
        f.write('[{"text": "%s尾"},\n' % POEMS[0])
    folder = run(tok_file, max_skipped=1.0)
    assert folder.all_texts() == sorted([*POEMS, POEMS[0] + "尾"])
    assert folder.meta["skipped"] == {"broken JSON": 1, "damaged file": 2}  # the two that do not end


def test_json_that_is_not_an_array(tok_file):
    os.mkdir("in")
    with open("in/one.json", "w") as f:
        json.dump({"text": POEMS[0], "meta": {"source": ["a"]}}, f, indent=2)
    write("in/lines.json", [{"text": POEMS[1]}, {"text": POEMS[2]}])
    with open("in/wudao.jsonl", "w") as f:
        f.write(json.dumps([{"title": "雪", "content": POEMS[3]}, {"content": POEMS[0] * 2}]))
    assert run(tok_file).all_texts() == sorted([*POEMS[:3], "雪\n" + POEMS[3], POEMS[0] * 2])


def test_large_json_array_is_streamed(tok_file):
    """Records cross the borders of the reader's buffer."""
    os.mkdir("in")
    texts = [f"{i}{poem * 300}" for i, poem in enumerate(POEMS * 40)]       # 2 MB, and a record larger than the buffer
    texts.append("长" * 1_500_000)
    with open("in/a.json", "w", encoding="utf-8") as f:
        json.dump([{"text": t} for t in texts], f, ensure_ascii=False)
    assert os.path.getsize("in/a.json") > 6_000_000
    assert run(tok_file).all_texts() == sorted(texts)


def test_a_line_without_end_is_cut(tok_file):
    os.mkdir("in")
    with open("in/a.txt", "w") as f:
        f.write("明月" * 1_200_000)
    folder = run(tok_file, val_fraction=0.0)
    assert sorted(map(len, folder.all_texts())) == [400_000, 1_000_000]
    assert folder.meta["read"] == 3 and folder.meta["dropped"] == {"duplicate": 1}


def test_too_many_skipped_stop_the_run(tok_file):
    os.mkdir("in")
    write("in/a.jsonl", [{"instruction": "写诗", "output": "诗"}] * 6 + [{"text": f"{POEMS[0]}{i}"} for i in range(94)])
    with pytest.raises(SystemExit, match=r"6 of 100 records cannot be used \(6.0%, more than max_skipped=0.05\): "
                                         r".*no text field.: 6.*--kind=text"):
        run(tok_file)
    assert not os.path.exists("data/x") and not os.path.exists("data/x.tmp")
    assert run(tok_file, max_skipped=0.06).meta["skipped"] == {"no text field": 6}


# ---------------------------------------------------------------- cleaning

def test_clean():
    assert clean("“你好”，——世界……（１２３）！？、；：《》\u3000「」～") == "“你好”，——世界……（１２３）！？、；：《》\u3000「」～"
    assert clean("\ufeff\n\na \r\nb\rc\u3000\n\n\n\n\nd\t\n") == "a\nb\nc\n\nd"
    assert clean("  缩进\n\t表") == "  缩进\n\t表"
    assert clean("a\x00b\x1b[0m\x7f\u200b\xad") == "ab[0m"
    assert clean("e\u0301") == "é"
    assert clean("👨\u200d👩") == "👨\u200d👩"
    assert clean("\ud83d半") == "半"


@settings(max_examples=300, deadline=None)
@given(strategies.text())
def test_cleaning_twice_changes_nothing(text):
    assert clean(clean(text)) == clean(text)


def test_min_length_and_duplicates(tok_file):
    os.mkdir("in")
    write("in/a.jsonl", [{"text": t} for t in [*POEMS, POEMS[0], POEMS[0] + "  \r\n", "短", "短句子"]])
    folder = run(tok_file, min_length=3)
    assert folder.meta["dropped"] == {"duplicate": 2, "too short": 1}
    assert folder.all_texts() == sorted([*POEMS, "短句子"])


# ---------------------------------------------------------------- schemas

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


# ---------------------------------------------------------------- the folders they make

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
    assert folder.meta["cut"] == {"tied or equal answers": 3, "answers longer than --max_length=200": 1}
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


# ---------------------------------------------------------------- encodings other than Chinese UTF-8 and GB18030

TRADITIONAL = "\n\n".join(f"第{i}回 春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。" for i in range(60))
JAPANESE = "\n\n".join(f"第{i}回 吾輩は猫である。名前はまだ無い。どこで生れたか見当がつかぬ。" for i in range(60))


@pytest.mark.parametrize("text,encoding", [(TRADITIONAL, "big5"), (JAPANESE, "shift-jis"), (JAPANESE, "euc_jp"),
                                           (TRADITIONAL, "gb18030"), (JAPANESE, "gb18030")])
def test_what_looks_like_gb18030_is_read_in_its_own_encoding(tok_file, text, encoding):
    os.mkdir("in")
    with open("in/a.txt", "wb") as f:
        f.write(text.encode(encoding))
    assert run(tok_file).all_texts() == sorted(text.split("\n\n"))


def test_korean_is_refused_by_name(tok_file, capsys):
    os.mkdir("in")
    with open("in/a.txt", "wb") as f:
        f.write(("나는 고양이다. 이름은 아직 없다. 어디서 태어났는지 도무지 짐작이 가지 않는다.\n\n" * 9).encode("euc_kr"))
    with pytest.raises(SystemExit, match="wrong encoding.: 9"):
        run(tok_file)
    assert "neither UTF-8, GB18030, Big5 nor Shift-JIS" in capsys.readouterr().err


def test_big5_lines_in_a_utf8_file(tok_file):
    os.mkdir("in")
    lines = TRADITIONAL.split("\n\n")
    with open("in/a.txt", "wb") as f:
        f.writelines(f"{line}\n".encode("big5" if i % 5 == 4 else "utf-8") for i, line in enumerate(lines))
    records = [json.dumps({"text": line + "尾"}, ensure_ascii=False) for line in lines]
    with open("in/b.json", "wb") as f:  # an array too
        f.write(b"[" + b",\n".join(r.encode("big5" if i % 5 == 4 else "utf-8") for i, r in enumerate(records)) + b"]")
    want = sorted(lines + [line + "尾" for line in lines])
    assert run(tok_file, txt_document="line").all_texts() == want


def test_names_without_a_single_common_character(tok_file):
    os.mkdir("in")
    names = [a + b + c for a in "赵钱孙李周吴郑王" for b in "伟芳娜敏国丽强磊" for c in "军洋勇艳杰娟涛超"]
    with open("in/a.txt", "wb") as f:
        f.write("\n".join(names).encode("gb18030"))
    with open("in/b.txt", "wb") as f:  # one in a file of UTF-8
        f.write("\n".join(POEMS).encode() + "\n冯婷霞".encode("gb18030"))
    assert run(tok_file, txt_document="line", min_length=1).all_texts() == sorted([*names, *POEMS, "冯婷霞"])


def test_zero_bytes_do_not_cost_a_text(tok_file):
    os.mkdir("in")
    with open("in/a.txt", "w") as f:
        f.write(f"{POEMS[0]}\0\n\n{POEMS[1]}")
    with open("in/a.jsonl", "w") as f:
        f.write("\0" * 5 + json.dumps({"text": POEMS[2]}) + "\n" + json.dumps({"text": POEMS[3] + "\0"}) + "\n")
    assert run(tok_file).all_texts() == sorted(POEMS)


# ---------------------------------------------------------------- files that are cut off or rotten: how much is lost

def long_texts(count=3000):
    return [f"{poem * 3}第{i}首{i * 7919 % 1000}" for i, poem in enumerate(POEMS * (count // 4))]


def cut(name, ending):
    """The first half of a packed file, of an array, or of lines, as in/<name>."""
    texts = long_texts()
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    if ending == "json":
        lines = json.dumps([{"text": t} for t in texts]).encode()
    def in_blocks(data):  # a whole block of .bz2 is lost at once
        return b"".join(bz2.compress(data[i:i + 20_000]) for i in range(0, len(data), 20_000))

    packers = {"gz": gzip.compress, "bz2": in_blocks, "xz": lzma.compress}
    if ending == "zst":
        packers["zst"] = pytest.importorskip("zstandard").compress
    data = packers.get(ending, bytes)(lines)
    with open(f"in/{name}", "wb") as f:
        f.write(data[:len(data) // 2 - 3])
    return texts


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst", "json", "jsonl"])
def test_a_file_that_is_cut_off_stops_the_run(tok_file, ending, capsys):
    os.mkdir("in")
    texts = cut(f"a.jsonl.{ending}" if ending not in ("json", "jsonl") else f"a.{ending}", ending)
    size = os.path.getsize(f"in/{os.listdir('in')[0]}")
    with pytest.raises(SystemExit, match=rf"{size // 2:,} of {size:,} bytes could not be read"):
        run(tok_file)
    assert "it breaks off" in capsys.readouterr().err
    folder = run(tok_file, max_skipped=1.0)
    assert folder.meta["skipped"] == {"damaged file": 1}
    assert folder.meta["noticed"] == {"bytes not read": size // 2}
    kept = folder.all_texts()
    assert set(kept) <= set(texts) and len(kept) > 1000


def test_among_many_files_one_that_is_cut_off_is_reported(tok_file, capsys):
    os.mkdir("in")
    for number in range(20):
        write(f"in/{number}.jsonl", [{"text": f"{number}{t}"} for t in long_texts()])
    cut("cut.jsonl.gz", "gz")
    size = os.path.getsize("in/cut.jsonl.gz")
    folder = run(tok_file)
    assert folder.meta["noticed"] == {"bytes not read": size // 2} and folder.meta["kept"] > 60_000
    report.report(folder.path)
    assert f"noticed: bytes not read {size // 2:,}" in capsys.readouterr().out


def test_a_rotten_middle_counts_what_comes_after_it(tok_file):
    os.mkdir("in")
    data = "".join(json.dumps({"text": f"{t}{os.urandom(60).hex()}"}) + "\n" for t in long_texts(9000)).encode()
    packed = bytearray(lzma.compress(data))
    place = len(packed) // 4
    packed[place:place + 50] = bytes(50)
    with open("in/a.jsonl.xz", "wb") as f:
        f.write(packed)
    with pytest.raises(SystemExit, match="bytes could not be read"):
        run(tok_file)
    folder = run(tok_file, max_skipped=1.0)
    assert folder.meta["skipped"]["damaged file"] == 1 and 1500 < folder.meta["kept"] < 3000


def test_json_that_python_cannot_parse_costs_no_other_record(tok_file):
    os.mkdir("in")
    bad = ['{"text": %s}' % ("9" * 5000), "[" * 5000, '{"text": ' + '{"a": ' * 3000, "nul", '{"a" 1}', "}{", "\\"]
    good = [json.dumps({"text": t}) for t in POEMS]
    with open("in/a.jsonl", "w") as f:
        f.writelines(f"{line}\n" for pair in zip(bad, good * 2) for line in pair)
    with open("in/b.json", "w") as f:
        f.write("[" + ",\n".join(f'{{"text": "{i}"}},\n{line}' for i, line in enumerate([*bad[:1], *bad[3:5]])) + "]")
    folder = run(tok_file, max_skipped=1.0, min_length=1)
    assert folder.all_texts() == sorted([*POEMS, "0", "1", "2"])
    assert set(folder.meta["skipped"]) == {"broken JSON"}


def test_broken_json_between_many_blank_lines_is_fast(tok_file):
    os.mkdir("in")
    with open("in/a.json", "w") as f:
        f.write('[{"text": oops' + "\n" * 500_000 + json.dumps({"text": POEMS[0]}) + "]")
    assert run(tok_file, max_skipped=1.0, val_fraction=0.0).texts() == POEMS[:1]


# ---------------------------------------------------------------- more schemas, as real files have them

CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"day": 1}'}}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"day": 1}}\n</tool_call>'


@pytest.mark.parametrize("record,turns", [
    ({"id": "7", "data": ["问", "答", "再问", "再答"]}, ["u:问", "a:答", "u:再问", "a:再答"]),
    ({"conversation": [{"human": "问", "assistant": "答"}, {"human": "再问", "assistant": "再答"}]},
     ["u:问", "a:答", "u:再问", "a:再答"]),
    ({"instruction": "谁？", "context": "船归磨坊主。", "response": "磨坊主。", "category": "qa"}, ["u:谁？\n船归磨坊主。", "a:磨坊主。"]),
    ({"instruction": "回答问题。", "question": "谁？", "answer": "我。"}, ["u:回答问题。\n谁？", "a:我。"]),
    ({"kind": "NLI", "input": "对吗？", "target": "对"}, ["u:对吗？", "a:对"]),
    ({"question": "0+1=?", "answer": 1}, ["u:0+1=?", "a:1"]),
    ({"question": "1-1=?", "answer": 0}, ["u:1-1=?", "a:0"]),
    ({"history": "[]", "question": "问", "answer": "答"}, ["u:问", "a:答"]),
    ({"history": '[["甲", "乙"]]', "question": "问", "answer": "答"}, ["u:甲", "a:乙", "u:问", "a:答"]),
    ({"prompt": "问", "completion": "答", "label": True}, ["u:问", "a:答"]),
    ({"prompt": "问", "completion": "答", "label": 1}, ["u:问", "a:答"]),
    ({"instruction": "问", "input": float("nan"), "output": "答"}, ["u:问", "a:答"]),
    ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "问"}]},
                   {"role": "assistant", "content": [{"type": "output_text", "text": "答"}]}]}, ["u:问", "a:答"]),
    ({"prompt": messages("u:问"), "completion": messages("a:答")}, ["u:问", "a:答"]),
    ({"messages": '[{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]'}, ["u:问", "a:答"]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "value": "问"}]}, *messages("a:答")]}, ["u:问", "a:答"]),
    ({"messages": [{"role": "developer", "content": "诗人"}, *messages("u:问", "a:答")]}, ["s:诗人", "u:问", "a:答"]),
    # transcripts in one text
    ({"instruction": "Human:你好\nAssistant:你好，请说\nHuman:吃什么？\nAssistant:", "input": "", "output": "面"},
     ["u:你好", "a:你好，请说", "u:吃什么？", "a:面"]),
    ({"text": "### Human: 问### Assistant: 答"}, ["u:问", "a:答"]),
    ({"prompt": "说说 Human: 和 Assistant: 的意思", "response": "答"}, ["u:说说 Human: 和 Assistant: 的意思", "a:答"]),
    # what a model thinks, and the tools it calls
    ({"messages": [*messages("u:1+1？"), {"role": "assistant", "content": "2", "reasoning_content": "先想"}]},
     ["u:1+1？", "a:<think>\n先想\n</think>\n\n2"]),
    ({"question": "1+1？", "reasoning": "先想", "answer": "2"}, ["u:1+1？", "a:<think>\n先想\n</think>\n\n2"]),
    ({"messages": [*messages("u:天气？"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
                   {"role": "tool", "content": "晴"}, *messages("a:晴天")]}, ["u:天气？", f"a:{CALLED}", "t:晴", "a:晴天"]),
    ({"messages": [*messages("u:天气？"), {"role": "assistant", "content": "看看", "tool_calls": [CALL, CALL]}]},
     ["u:天气？", f"a:看看\n{CALLED}\n{CALLED}"]),
    ({"conversations": [{"from": "human", "value": "天气？"},
                        {"from": "function_call", "value": '{"name": "weather", "arguments": {"day": 1}}'},
                        {"from": "observation", "value": "晴"}, {"from": "gpt", "value": "晴天"}],
      "tools": '[{"name": "weather"}]'},
     ['s:<tools>\n{"name": "weather"}\n</tools>', "u:天气？", f"a:{CALLED}", "t:晴", "a:晴天"]),
    ({"messages": messages("s:诗人", "u:问", "a:答"), "tools": [{"name": "甲"}, {"name": "乙"}]},
     ['s:诗人\n\n<tools>\n{"name": "甲"}\n{"name": "乙"}\n</tools>', "u:问", "a:答"]),
    ({"messages": messages("u:问", "a:答"), "tools": [{"type": "function", "function": {"name": "甲"}}, {"name": "乙"}]},
     ['s:<tools>\n{"name": "甲"}\n{"name": "乙"}\n</tools>', "u:问", "a:答"]),
])
def test_conversation_schemas_of_the_field(record, turns):
    assert convert(record, "sft")[0] == messages(*turns)


def test_tool_calls_can_be_parsed_back():
    record = {"messages": [*messages("u:天气？"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    turns = convert(record, "sft")[0]
    first, call, last = turns[1]["content"].split("\n")
    assert (first, last) == ("<tool_call>", "</tool_call>")
    assert json.loads(call) == {"name": "weather", "arguments": {"day": 1}}


@pytest.mark.parametrize("field", [{"weight": 0}, {"loss": False}, {"train": False}, {"weight": 0.0}, {"weight": "0"}])
def test_answers_of_weight_zero_are_kept_but_not_learned(field):
    bad = {"role": "assistant", "content": "坏答", **field}
    record = {"messages": [*messages("u:问"), bad, *messages("u:再来", "a:好答")]}
    got = convert(record, "sft")[0]
    assert got[1] == {"role": "assistant", "content": "坏答", "weight": 0} and got[3] == messages("a:好答")[0]
    record["messages"] = record["messages"][:2]
    with pytest.raises(Drop, match="no answer to learn"):
        convert(record, "sft")


@pytest.mark.parametrize("record,prompt,answers", [
    ({"instruction": "问", "input": "", "output": ["好", "中", "坏"], "history": []}, PROMPT, ["好", "中", "坏"]),
    ({"prompt": "问", "chosen_messages": messages("u:问", "a:好"), "rejected_messages": messages("u:问", "a:坏")}, PROMPT,
     ["好", "坏"]),
    ({"system": "", "history": [], "question": "问", "response_chosen": "好", "response_rejected": "坏"}, PROMPT,
     ["好", "坏"]),
    ({"prompt": "问", "messages": messages("u:问", "a:好"), "chosen": messages("u:问", "a:好"),
      "rejected": messages("u:问", "a:坏"), "score_chosen": 9.0}, PROMPT, ["好", "坏"]),
    ({"system": "诗人", "chosen": messages("u:问", "a:好"), "rejected": messages("u:问", "a:坏")}, messages("s:诗人", "u:问"),
     ["好", "坏"]),
    ({"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"}, PROMPT, ["好", "坏"]),
    ({"prompt": "问", "chosen": "好", "rejected": ["坏", "更坏"]}, PROMPT, ["好", "坏"]),
    ({"conversations": [{"from": "human", "value": "问"}], "chosen": {"value": "好"}, "rejected": {"value": "坏"}}, PROMPT,
     ["好", "坏"]),
    ({"prompt": "问", "chosen": "[1, 2]", "rejected": '{"a": 1}'}, PROMPT, ["[1, 2]", '{"a": 1}']),
])
def test_preference_schemas_of_the_field(record, prompt, answers):
    assert convert(record, "pairs")[0] == {"prompt": prompt, "answers": answers}


def test_one_instruction_with_many_instances(tok_file):
    os.mkdir("in")
    instances = [{"input": "月", "output": "moon"}, {"input": "山", "output": "mountain"}]
    write("in/a.jsonl", [{"id": 1, "instruction": "翻译", "instances": instances, "is_classification": False}])
    folder = run(tok_file, kind="sft", val_fraction=0.0)
    assert sorted(folder.learned()) == ["moon<|im_end|>", "mountain<|im_end|>"] and folder.meta["read"] == 2


# Records as published sets write them: question, two answers, a number → record. (UltraChat; MOSS as Firefly has it;
# ranked outputs; parts of a content; HelpSteer-like pairs of messages; self-instruct; tools; KTO.)
TOOL_TURNS = [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "晴"}]
SHAPES = {
    "data": ("sft", lambda q, good, bad, i: {"id": str(i), "data": [q, good]}),
    "human assistant": ("sft", lambda q, good, bad, i: {
        "conversation_id": i, "category": "Harmless", "conversation": [{"human": q, "assistant": good}]}),
    "ranked outputs": ("pairs", lambda q, good, bad, i: {
        "instruction": q, "input": "", "output": [good, bad] if good else [], "history": []}),
    "parts": ("sft", lambda q, good, bad, i: {"messages": [
        {"role": "user", "content": [{"type": "text", "value": q}]},
        {"role": "assistant", "content": [{"type": "text", "value": good}]}]}),
    "chosen_messages": ("pairs", lambda q, good, bad, i: {
        "prompt": q, "chosen_messages": messages(f"u:{q}", f"a:{good}"),
        "rejected_messages": messages(f"u:{q}", f"a:{bad}")}),
    "self-instruct": ("sft", lambda q, good, bad, i: {
        "id": f"seed_{i}", "instruction": q, "instances": [{"input": "", "output": good}], "is_classification": False}),
    "tools": ("sft", lambda q, good, bad, i: {
        "messages": messages(f"u:{q}") + (TOOL_TURNS if good else []) + messages(f"a:{good}"),
        "tools": [{"type": "function", "function": {"name": "weather"}}]}),
    "label": ("sft", lambda q, good, bad, i: {"prompt": q, "completion": good, "label": True}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_record_of_published_shapes_is_accounted_for(tok_file, shape):
    """100 records, 5 of them copies, 3 without an answer; and a line that breaks off."""
    kind, make = SHAPES[shape]
    records = [make(f"{i}？", f"第{i}答" if i > 2 else "", "不", i) for i in range(95)]
    records += records[50:55]
    os.mkdir("in")
    write("in/a.jsonl", records)
    with open("in/a.jsonl", "a", encoding="utf-8") as f:
        f.write('{"prompt": "断\n')
    folder = run(tok_file, kind=kind, val_fraction=0.0)
    assert (folder.meta["read"], folder.meta["kept"]) == (101, 92) and folder.meta["dropped"] == {"duplicate": 5}
    empty = "no ranked answers" if shape == "ranked outputs" else "empty"
    assert folder.meta["skipped"] == {empty: 3, "broken JSON": 1}
    learned = "".join(folder.learned())
    assert all(f"第{i}答" in learned for i in range(3, 95))


@pytest.mark.parametrize("record,kind,said", [
    ({"story": "很久以前", "instruction": {"words": []}, "summary": "短", "source": "x"}, "text",
     "the fields are story, instruction, summary, source; wanted text or content"),
    ({"prompt": "问", "completion": "答"}, "text", "the fields are prompt, completion"),
    ({"ask": "问", "reply": "答"}, "sft", "the fields are ask, reply; wanted messages, or a question (instruction, "),
    ({"question": "问", "answer": "甲", "response": "乙"}, "sft",
     "answer and response differ: --fields=question:question,answer:response learns response"),
    ({"instruction": "问", "output": ["好", "坏"]}, "sft", "output holds 2, best first? Then --kind=pairs ranks them"),
    ({"prompt": "问", "completion": "答", "label": False}, "pairs",
     "thumbs up or down of one answer: --kind=sft learns the good ones"),
    ({"prompt": "问", "good": "好", "bad": "坏"}, "pairs", "--fields=chosen:…,rejected:…"),
    ({"question": "问", "answers": {"text": ["答"]}}, "sft", "no answer: the fields are question, answers; wanted"),
    ({"version": 1, "data": [{"text": "诗"}]}, "text", "(are the records in data? Write them out: jq -c '.data[]' FILE"),
    ({"ask": "问"}, "prompts", "the fields are ask; wanted messages, or one of instruction, prompt"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "sft",
     "messages holds image_url"),
    ({"history": "甲", "question": "问", "answer": "答"}, "sft", None),
    ({"messages": [{"content": "问"}]}, "sft", "the fields are content; wanted one of user, human"),
    ({"text": {"a": 1}}, "text", "wanted text, got {'a': 1}"),
    ({"title": "题", "sections": ["甲"]}, "text", "sections holds '甲', wanted objects with title and content"),
    (7, "text", "wanted an object with named fields, got 7"),
    (None, "sft", "wanted an object with named fields, got None"),
    ("诗", "sft", "the record is a text; wanted messages"),
    ([1, 2], "pairs", "the record is a list"),
])
def test_what_cannot_be_used_says_what_is_there_and_what_is_wanted(record, kind, said):
    if said is None:
        assert convert(record, kind)[0]
        return
    with pytest.raises(Skip) as e:
        convert(record, kind)
    assert said in str(e.value)
    for python in ("object has no", "unpack", "subscriptable", "NoneType", "expected"):
        assert python not in str(e.value)


def test_thumbs_down_is_dropped_and_counted(tok_file, capsys):
    os.mkdir("in")
    labels = [0, True, 1, "True"]
    write("in/a.jsonl", [{"prompt": f"问{i}", "completion": f"答{i}", "label": labels[i % 4]} for i in range(40)])
    folder = run(tok_file, kind="sft")
    assert folder.meta["dropped"] == {"thumbs down": 10} and folder.meta["kept"] == 30
    assert not {f"答{i}<|im_end|>" for i in range(0, 40, 4)} & set(folder.learned() + folder.learned("val"))


# ---------------------------------------------------------------- what is told of the fields

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


def test_report_names_the_fields_of_every_source(tok_file, capsys):
    os.mkdir("in")
    write("in/a.jsonl", [{"text": p, "url": "x"} for p in POEMS])
    write("in/b.jsonl", [{"text": p + "二", "url": "x"} for p in POEMS])
    write("in/c.jsonl", [{"title": "诗", "content": p + "三"} for p in POEMS])
    folder = run(tok_file)
    assert folder.meta["fields"]["in/a.jsonl"] == {"used": {"text": 4}, "ignored": {"url": 4}}
    report.report(folder.path)
    out = capsys.readouterr().out
    assert "fields used of in/a.jsonl and 1 more: text 8" in out
    assert "fields ignored of in/a.jsonl and 1 more: url 8" in out
    assert "fields used of in/c.jsonl: content 4, title 4" in out
    assert "read 12 records of 3 files = 12 kept + 0 dropped + 0 skipped" in out


def test_records_with_a_name_for_every_word_do_not_fill_the_memory(tok_file):
    os.mkdir("in")
    write("in/a.jsonl", [{"text": POEMS[0] * 9 + str(i), f"word{i}": 1} for i in range(300)])
    fields = run(tok_file).meta["fields"]["in/a.jsonl"]
    assert len(fields["ignored"]) == 101 and fields["ignored"]["(other fields)"] == 200


def test_an_ignored_field_with_most_of_the_text_stops_the_run(tok_file):
    os.mkdir("in")
    write("in/a.jsonl", [{"text": p, "article": p * 20} for p in POEMS])
    with pytest.raises(SystemExit, match="in/a.jsonl: article would be ignored, with more text than what is learned .text."
                                         ".*--fields=text:text,text:article learns .*--fields=text:text leaves them out"):
        run(tok_file)
    assert run(tok_file, fields="text:article").all_texts() == sorted(p * 20 for p in POEMS)
    assert run(tok_file, fields="text:text").all_texts() == sorted(POEMS)
    # so it is with chats, whose prompts alone may be wanted
    write("in/a.jsonl", [{"question": f"{i}？", "passage": f"很长很长的一段话{i}", "answer": "答"} for i in range(40)])
    with pytest.raises(SystemExit, match="passage would be ignored.*--fields=question:question,answer:answer,question:passage"):
        run(tok_file, kind="sft")
    folder = run(tok_file, kind="sft", fields="question:passage,question:question,answer:answer", val_fraction=0.0)
    assert all("一段话\n" in text for text in folder.texts())
    assert run(tok_file, kind="prompts").meta["kept"] == 40
    # a long field that is known for what it is does not
    write("in/a.jsonl", [{"prompt": p, "messages": messages("u:问", "a:" + p)} for p in POEMS])
    assert run(tok_file, kind="sft").meta["kept"] == 4


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


@pytest.mark.parametrize("record,answers", [
    ({"prompt": "问", "output": ["中", "坏", "好"], "ranks": [2, 3, 1]}, ["好", "中", "坏"]),
    ({"prompt": "问", "response": ["中", "坏", "好"], "order": [2, 0, 1]}, ["好", "中", "坏"]),
    ({"prompt": "问", "responses": ["坏", "好"], "scores": [0.1, 0.9]}, ["好", "坏"]),
    ({"prompt": "问", "chosen": ["好"], "rejected": ["坏"]}, ["好", "坏"]),
    ({"prompt": "Human: 问\nAssistant:", "chosen": "Human: 问\nAssistant: 好", "rejected": "Human: 问\nAssistant: 坏"},
     ["好", "坏"]),
])
def test_ranked_answers_in_other_shapes(record, answers):
    assert convert(record, "pairs")[0] == {"prompt": messages("u:问"), "answers": answers}


@pytest.mark.parametrize("record,kind,reason", [
    # numbers beside answers: is their order the order of the list?
    ({"prompt": "问", "output": ["坏", "好"], "stars": [1, 5]}, "pairs", "no ranking"),
    ({"prompt": "问", "output": [{"text": "坏", "score": 1}, {"text": "好", "score": 5}]}, "pairs", "no ranking"),
    ({"prompt": "问", "responses": ["坏", "好"], "ranks": [True, False]}, "pairs", "no ranking"),
    # a question that ends with an answer, and another one
    ({"prompt": messages("u:问", "a:一"), "completion": "二"}, "sft", "two answers"),
    # answers that are objects
    ({"question": "问", "answer": [{"text": "好", "score": 1}, {"text": "坏", "score": 0}]}, "sft", "several answers"),
    ({"question": "问", "answer": {"text": ["一", "二"], "answer_start": [0, 4]}}, "sft", "several answers"),
    ({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "parts": ["答"]}]}, "sft", "wrong type"),
    # what a model of text cannot see
    ({"image": "a.jpg", "conversations": messages("u:这是什么？", "a:猫")}, "sft", "not text alone"),
    ({"prompt": "问", "completion": "答", "label": 0.0}, "sft", "thumbs down"),
    ({"prompt": "问", "completion": "答", "label": -1}, "sft", "thumbs down"),
])
def test_what_is_unclear_is_not_learned(record, kind, reason):
    with pytest.raises(Skip) as e:
        convert(record, kind)
    assert e.value.reason == reason


@pytest.mark.parametrize("record,turns", [
    ({"context": ["段一", "段二"], "question": "问", "answer": "答"}, ["u:问\n段一\n段二", "a:答"]),
    ({"question": "问", "answer": {"text": ["答"], "answer_start": [2]}}, ["u:问", "a:答"]),
    ({"text": "System: 诗人\nQ: 问\nA: 答"}, ["s:诗人", "u:问", "a:答"]),
    ({"text": "### Instruction:\n问\n### Response:\n答"}, ["u:问", "a:答"]),
    ({"text": "问：一加一？\n答：二"}, ["u:一加一？", "a:二"]),
    ({"messages": messages("u:问", "a:查", "t:", "a:答")}, ["u:问", "a:查", "t:", "a:答"]),
    ({"messages": [*messages("u:问", "a:查"), {"role": "tool", "content": [{"city": "北京"}]}, *messages("a:答")]},
     ["u:问", "a:查", 't:[{"city": "北京"}]', "a:答"]),
    ({"messages": messages("u:问", "a:答"), "answer": "另一个"}, ["u:问", "a:答"]),
    # a question that quotes a dialogue
    ({"instruction": "Human: 问\nAssistant: 一", "output": "二"}, ["u:Human: 问\nAssistant: 一", "a:二"]),
    ({"instruction": "user: root\nbot: on", "output": "好"}, ["u:user: root\nbot: on", "a:好"]),
])
def test_conversations_in_other_shapes(record, turns):
    assert convert(record, "sft")[0] == messages(*turns)


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


def test_context_beside_a_conversation_is_not_lost_in_silence(tok_file):
    os.mkdir("in")
    write("in/a.jsonl", [{"context": "很长的一段话" * 20, "messages": messages("u:问", "a:答")}] * 3)
    with pytest.raises(SystemExit, match="context"):
        run(tok_file, kind="sft")
    folder = run(tok_file, kind="sft", fields="system:context,messages:messages", val_fraction=0.0)
    assert "很长的一段话" in folder.texts()[0]


def test_a_long_list_counts_as_ignored_text(tok_file):
    os.mkdir("in")
    write("in/a.jsonl", [{"text": f"短题目五字{i}", "body": ["很长的一段话" * 9, "还有一段"]} for i in range(9)])
    with pytest.raises(SystemExit, match="body"):
        run(tok_file)


def test_csv_with_an_open_quote_or_too_many_fields(tok_file, capsys):
    os.mkdir("in")
    rows = [f"春眠不觉晓第{i}号,{i}" for i in range(40)]
    with open("in/a.csv", "w") as f:
        f.write("\n".join(["text,id", *rows[:20], '"处处闻啼鸟,1', *rows[20:]]))
    folder = run(tok_file, max_skipped=1.0)
    assert folder.meta["kept"] == 20 and folder.meta["skipped"] == {"damaged file": 1}
    assert "the quote that opens in line" in capsys.readouterr().err
    with open("in/a.csv", "w") as f:
        f.write("\n".join(["text,id", *rows, "春眠,不觉晓,处处"]))
    assert run(tok_file).meta["skipped"] == {"broken CSV": 1}


@pytest.mark.parametrize("ending,separator", [("tsv", "\t"), ("csv", ";"), ("csv", "\t")])
def test_other_separators(tok_file, ending, separator):
    os.mkdir("in")
    with open(f"in/a.{ending}", "w") as f:
        f.write("".join(f"{name}{separator}{text}\n" for name, text in [("id", "text"), *enumerate(POEMS)]))
    assert run(tok_file).all_texts() == sorted(POEMS)


def test_tabs_without_quoting(tok_file):
    """In most files with tabs a quote is a character like others."""
    os.mkdir("in")
    with open("in/a.tsv", "w") as f:
        f.write('text\tid\n"Hello" he said\t1\n"床前明月光\t2\n疑是地上霜\t3\n')
    assert run(tok_file, val_fraction=0.0).all_texts() == sorted(['"Hello" he said', '"床前明月光', "疑是地上霜"])


def test_a_folder_named_after_a_split_counts_more_than_a_file(tok_file):
    for name, text in (("train/test_cases", "床前明月光"), ("test/train_tickets", "疑是地上霜")):
        os.makedirs(f"in/{name.split('/')[0]}")
        write(f"in/{name}.jsonl", [{"text": f"{text}{i}"} for i in range(9)])
    folder = run(tok_file, val_fraction=0.0)
    assert folder.texts("val") == [f"疑是地上霜{i}" for i in range(9)]


def test_answers_that_are_numbers_do_not_rank_themselves():
    record = {"question": "一加一？", "answer": ["2", "3"]}
    assert convert(record, "pairs")[0] == {"prompt": messages("u:一加一？"), "answers": ["2", "3"]}


def test_a_txt_that_marks_where_its_documents_end(tok_file):
    os.mkdir("in")
    with open("in/a.txt", "w") as f:
        f.write("床前明月光，\n\n疑是地上霜。\n<|endoftext|>\n白日依山尽，\n黄河入海流。\n<|endoftext|>\n")
    assert run(tok_file, val_fraction=0.0).all_texts() == ["床前明月光，\n\n疑是地上霜。", "白日依山尽，\n黄河入海流。"]


def test_files_that_are_not_read_are_named(tok_file, capsys):
    os.mkdir("in")
    write("in/a.jsonl", [{"text": poem} for poem in POEMS])
    write("in/b.jsonl.zip", [])
    write("in/c.md", [])
    run(tok_file)
    assert "2 of the 3 files under in are not read, with endings: .md .zip" in capsys.readouterr().err


def test_a_pointer_of_git_lfs_is_refused(tok_file):
    os.mkdir("in")
    with open("in/a.txt", "w") as f:
        f.write("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(SystemExit, match="git lfs pull"):
        run(tok_file)


def test_a_vocabulary_that_changes_the_text_says_so(tmp_path, capsys):
    import sentencepiece
    os.mkdir("in")
    write("in/a.jsonl", [{"text": poem} for poem in POEMS])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(POEMS * 9), model_prefix="m", vocab_size=320,
                                             byte_fallback=True, model_type="bpe", hard_vocab_limit=False,
                                             minloglevel=2)
    folder = run("m.model")
    assert "the vocabulary changes 4 of 4 texts: ， to ," in capsys.readouterr().out
    assert folder.meta["noticed"] == {"sampled texts that the vocabulary changes, ， to ,": 4}


@pytest.mark.parametrize("record,kind,turns", [
    ({"instruction": "Q: 哪个是水果？\nA: 苹果\nB: 石头", "output": "A"}, "sft", ["u:Q: 哪个是水果？\nA: 苹果\nB: 石头", "a:A"]),
    ({"question": "问：哪个是水果？\nA：苹果\nB：石头\n答：", "answer": "A"}, "sft", ["u:哪个是水果？\nA：苹果\nB：石头", "a:A"]),
    ({"prompt": "Q: 哪个？\nA: 甲\nB: 乙"}, "prompts", ["u:Q: 哪个？\nA: 甲\nB: 乙"]),
    ({"input": "问：一加一？\n答：三\n对吗？", "output": "错"}, "sft", ["u:问：一加一？\n答：三\n对吗？", "a:错"]),
    ({"instruction": "Human:看\nResponse: 200\nA: 甲\nAssistant:", "output": "好"}, "sft", ["u:看\nResponse: 200\nA: 甲", "a:好"]),
    ({"text": "### Human: 你好### Assistant: 好\nQ: 甲\nA: 乙"}, "sft", ["u:你好", "a:好\nQ: 甲\nA: 乙"]),
    ({"prompt": "问", "response": [{"type": "text", "text": "一"}, {"type": "text", "text": "二"}]}, "sft", ["u:问", "a:一二"]),
    ({"images": [None], "image": {"bytes": None}, "messages": messages("u:问", "a:答")}, "sft", ["u:问", "a:答"]),
])
def test_what_only_looks_like_turns_stays_as_it_is(record, kind, turns):
    assert convert(record, kind)[0] == messages(*turns)


@pytest.mark.parametrize("prompt,chosen,rejected", [
    ("你好", "你好！有什么事？", "走开"),
    ("写常见问题", "问：能退货吗？\n答：能。", "问：能退货吗？\n答：不能。"),
    ("写常见问题", "Q: 能退货吗？\nA: 能。", "不会"),
])
def test_answers_are_not_cut(prompt, chosen, rejected):
    got = convert({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "pairs")[0]
    assert got == {"prompt": messages(f"u:{prompt}"), "answers": [chosen, rejected]}
    chosen, rejected = [f"\n\nHuman: {prompt}\n\nAssistant: {answer}" for answer in (chosen, rejected)]
    assert convert({"chosen": chosen, "rejected": rejected}, "pairs")[0] == got


@pytest.mark.parametrize("record", [
    {"prompt": "问", "output": ["坏", "好"], "is_best": [False, True]},
    {"prompt": "问", "output": ["坏", "好"], "score": ["1", "5"]},
    {"prompt": "问", "output": [{"text": "坏", "reward": 0.1}, {"text": "好", "reward": 0.9}]},
    {"prompt": "问", "output": ["坏", "好"], "chosen": 1, "rejected": 0},
])
def test_ranks_of_other_types_are_not_ignored(record):
    with pytest.raises(Skip, match="no ranking"):
        convert(record, "pairs")


def test_what_stands_beside_a_list_of_records(tok_file):
    os.mkdir("in")
    for split in ("train", "test"):
        data = [{"question": f"{split}{i}", "answer": "答"} for i in range(9)]
        write(f"in/{split}s.jsonl", [{"split": split, "passage": "短文", "data": data}])
    folder = run(tok_file, kind="sft")
    assert len(folder.texts("val")) == 9 and folder.meta["fields"]["in/trains.jsonl"]["ignored"] == {"passage": 1}


@pytest.mark.parametrize("data,want", [
    ('id;"text, a"\n1;x\n', [("text, a", "x")]), ("question, part\tb\nx, y\tz\n", [("question, part", "x, y")]),
    ("text,id\nx,1,\n", [("text", "x")]), ("id;text\r1;a,b,c\r", [("text", "a,b,c")]),
])
def test_headers_of_csv(data, want):
    import io
    from readers.tables import read_csv
    rows = [row for _, row in read_csv(io.BytesIO(data.encode()), None)]
    assert [(name, row[name]) for (name, _), row in zip(want, rows)] == want and len(rows) == len(want)


def test_a_quote_that_swallows_half_of_a_csv_stops_the_run(tok_file):
    rows = [f"春眠不觉晓第{i}号,{i}" for i in range(400)]
    rows[100] = '"处处闻啼鸟,1'
    rows[300] = '"花,落",7'
    os.mkdir("in")
    with open("in/a.csv", "w") as f:
        f.write("\n".join(["text,id", *rows]))
    with pytest.raises(SystemExit, match="bytes could not be read"):
        run(tok_file)
