"""readers/: file formats and encodings."""
import bz2
import gzip
import json
import lzma
import os

import pytest
from hypothesis import given, settings, strategies

from prepared import POEMS, run, small_tokenizer, write
from common import rows
from common.documents import clean


@pytest.fixture(scope="module")
def tok_file(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


@pytest.mark.parametrize("data,want", [
    ('id;"text, a"\n1;x\n', [("text, a", "x")]), ("question, part\tb\nx, y\tz\n", [("question, part", "x, y")]),
    ("text,id\nx,1,\n", [("text", "x")]), ("id;text\r1;a,b,c\r", [("text", "a,b,c")]),
])
def test_headers_of_csv(data, want):
    import io
    from readers.tables import read_csv
    rows = [row for _, row in read_csv(io.BytesIO(data.encode()), None)]
    assert [(name, row[name]) for (name, _), row in zip(want, rows)] == want and len(rows) == len(want)
