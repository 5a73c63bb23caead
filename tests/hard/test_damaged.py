"""readers/: damaged files, and the account of records and fields."""
import bz2
import gzip
import json
import lzma
import os

import pytest

from prepared import POEMS, messages, run, small_tokenizer, write
from common import rows
from readers import report


@pytest.fixture(scope="module")
def tok_file(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


def test_too_many_skipped_stop_the_run(tok_file):
    os.mkdir("in")
    write("in/a.jsonl", [{"instruction": "写诗", "output": "诗"}] * 6 + [{"text": f"{POEMS[0]}{i}"} for i in range(94)])
    with pytest.raises(SystemExit, match=r"6 of 100 records cannot be used \(6.0%, more than max_skipped=0.05\): "
                                         r".*no text field.: 6.*--kind=text"):
        run(tok_file)
    assert not os.path.exists("data/x") and not os.path.exists("data/x.tmp")
    assert run(tok_file, max_skipped=0.06).meta["skipped"] == {"no text field": 6}


def test_min_length_and_duplicates(tok_file):
    os.mkdir("in")
    write("in/a.jsonl", [{"text": t} for t in [*POEMS, POEMS[0], POEMS[0] + "  \r\n", "短", "短句子"]])
    folder = run(tok_file, min_length=3)
    assert folder.meta["dropped"] == {"duplicate": 2, "too short": 1}
    assert folder.all_texts() == sorted([*POEMS, "短句子"])


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


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_stands_twice_is_no_record(tok_file, capsys, name):
    """Python keeps the last of two equal keys: the other answer would be lost unsaid. Equal values lose nothing."""
    twice = ['{"prompt": "问", "answer": "甲", "answer": "乙"}', '{"prompt": "又问", "prompt": "又问", "answer": "丙"}']
    good = [json.dumps({"prompt": text, "answer": text}) for text in POEMS]
    os.mkdir("in")
    with open(f"in/{name}", "w") as f:
        f.write("\n".join([*good, *twice]))
    folder = run(tok_file, kind="sft", max_skipped=1.0)
    assert folder.meta["skipped"] == {"broken JSON": 1}
    assert folder.meta["read"] == len(POEMS) + 2 and folder.meta["kept"] == len(POEMS) + 1
    assert "the key 'answer' stands twice" in capsys.readouterr().err


def test_broken_json_between_many_blank_lines_is_fast(tok_file):
    os.mkdir("in")
    with open("in/a.json", "w") as f:
        f.write('[{"text": oops' + "\n" * 500_000 + json.dumps({"text": POEMS[0]}) + "]")
    assert run(tok_file, max_skipped=1.0, val_fraction=0.0).texts() == POEMS[:1]


CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"day": 1}'}}


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
    assert all("一段话" in text for text in folder.texts())
    assert run(tok_file, kind="prompts").meta["kept"] == 40
    # a long field that is known for what it is does not
    write("in/a.jsonl", [{"prompt": p, "messages": messages("u:问", "a:" + p)} for p in POEMS])
    assert run(tok_file, kind="sft").meta["kept"] == 4


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


def test_a_quote_that_swallows_half_of_a_csv_stops_the_run(tok_file):
    rows = [f"春眠不觉晓第{i}号,{i}" for i in range(400)]
    rows[100] = '"处处闻啼鸟,1'
    rows[300] = '"花,落",7'
    os.mkdir("in")
    with open("in/a.csv", "w") as f:
        f.write("\n".join(["text,id", *rows]))
    with pytest.raises(SystemExit, match="bytes could not be read"):
        run(tok_file)
