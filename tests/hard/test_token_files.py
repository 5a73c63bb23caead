"""Files of token ids; and the one reader for every script that is given a file."""
import csv
import json
import os

import numpy as np
import pytest

from prepared import POEMS, run
from tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")


# ---------------------------------------------------------------- token files

LINES = [f"{poem}{i}\n" for i, poem in enumerate(POEMS * 50)]


@pytest.fixture
def foreign():
    """A vocabulary as Llama 2 and ChatGLM2 have it, <s> 1 and </s> 2, that puts a space before a text."""
    import sentencepiece
    with open("foreign.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(POEMS * 50), model_writer=f, vocab_size=400, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity", user_defined_symbols=["\n"])
    return load_tokenizer("foreign.model")


@pytest.mark.parametrize("dtype,header,opened,ended", [
    ("<u2", False, False, True), ("<u4", False, False, True), ("<u2", True, False, True), ("<u2", False, True, True),
    ("<u2", False, True, False)])
def test_token_files(foreign, dtype, header, opened, ended):
    """nanoGPT and baby-llama2-chinese end each text, llm.c has a header, llama2.c opens each text."""
    ids = []
    for line in LINES:
        ids += [1] * opened + foreign.encode(line) + [2] * ended
    for name, part in (("a", ids[:len(ids) // 2]), ("b", ids[len(ids) // 2:])):
        with open(f"in/{name}.bin", "wb") as f:
            if header:
                f.write(np.array([20240520, 1, len(part)] + [0] * 253, "<i4").tobytes())
            f.write(np.array(part, dtype).tobytes())
    folder = run("foreign.model", input="in/*.bin", val_fraction=0.2)
    train, val = folder.meta["train"], folder.meta["val"]
    texts = [foreign.decode(row[:-1]) for row in folder.rows() + folder.rows("val")]
    assert texts == LINES and folder.meta["dtype"] == "uint16"
    assert train["documents"] + val["documents"] == folder.meta["read"] == folder.meta["kept"] == len(LINES)
    assert train["bytes"] + val["bytes"] == sum(len(line.encode()) for line in LINES)
    assert train["characters"] + val["characters"] == sum(map(len, LINES))
    assert 0.1 < val["tokens"] / (train["tokens"] + val["tokens"]) < 0.3


@pytest.mark.parametrize("ids,settings,said", [
    ([5, 6, 2, 60_000], {}, "token 3 is 60,000, but the vocabulary has"),
    ([5, 6, 7], {}, "nothing in in/a.bin ends a text"),
    ([5, 2], {"kind": "sft"}, "--kind=text"),
    ([5, 2], {"tok_file": ""}, "--tokenizer= must name"),
])
def test_token_files_that_cannot_be_used(foreign, ids, settings, said):
    np.array(ids, "<u2").tofile("in/a.bin")
    with pytest.raises(SystemExit, match=said):
        run(**{"tok_file": "foreign.model", "input": "in/a.bin", **settings})
    with open("in/a.bin", "ab") as f:
        f.write(b"x")
    with pytest.raises(SystemExit, match=r"--kind|--tokenizer|no whole number of uint16 ids: is it cut off\?"):
        run(**{"tok_file": "foreign.model", "input": "in/a.bin", **settings})


# ---------------------------------------------------------------- one reader for every script


@pytest.mark.parametrize("name,data", [
    ("q.json", json.dumps([{"prompt": poem} for poem in POEMS], ensure_ascii=False, indent=1).encode()),
    ("q.jsonl", b"\xef\xbb\xbf" + "".join(json.dumps({"prompt": poem}) + "\n" for poem in POEMS).encode()),
    ("q.csv", ("prompt\n" + "\n".join(POEMS) + "\n").encode()),
    ("q.txt", "\n".join(POEMS).encode("gb18030")), ("q.txt", "\ufeff".encode() + "\r\n".join(POEMS).encode()),
])
def test_prompts_of_sample_come_from_any_file(name, data):
    from sample import Config, read_prompts
    with open(name, "wb") as f:
        f.write(data)
    assert read_prompts(Config(prompts=name)) == POEMS


def test_exams_and_pairs_come_from_any_file():
    from recipes.exams import read_pairs, read_rows
    with open("exam.csv", "w", encoding="gb18030", newline="") as f:
        csv.writer(f).writerows([["", "Question", "A", "B", "C", "D", "Answer"], [0, "月亮？", "一", "二", "三", "四", "B"]])
    assert [row["question"] + row["answer"] for row in read_rows("exam.csv")] == ["月亮？B"]
    with open("pairs.json", "w") as f:
        json.dump([{"sentence_good": "好", "sentence_bad": "坏"}], f)
    assert read_pairs("pairs.json") == (["好"], ["坏"])
    with open("broken.jsonl", "w") as f:
        f.write('{"sentence_good": "好"')
    with pytest.raises(SystemExit, match="broken.jsonl"):
        read_pairs("broken.jsonl")
