"""prepare.py: near duplicates, a single text, repetitions, splits by names, vocabularies."""
import collections
import os
import sys

import numpy as np
import pytest

import prepare
from common import rows
from prepared import POEMS, corpus, messages, read_all, run, small_tokenizer, write
from readers import records, report
from tokenizer import load_tokenizer, render_chat

SCRIPT = os.path.abspath(prepare.__file__)


@pytest.fixture(scope="module")
def tok_file(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- near duplicates

def random_text(rng, n):
    return "".join(chr(rng.integers(0x4E00, 0x6E00)) for _ in range(n))


def test_near_duplicates_are_dropped_and_counted(tok_file):
    pytest.importorskip("datasketch", reason="pip install datasketch")
    rng = np.random.default_rng(0)
    texts = [random_text(rng, 400) for _ in range(40)]
    os.mkdir("in")
    write("in/a.jsonl", [{"text": text} for text in texts])
    # 10 with a notice behind them (95 % the same), 10 of which the half is new (a third), 5 copies
    notices = [{"text": text + "转载请注明出处，谢谢。"} for text in texts[:10]]
    halves = [{"text": text[:200] + random_text(rng, 200)} for text in texts[10:20]]
    write("in/b.jsonl", notices + halves + [{"text": text} for text in texts[20:25]])
    folder = run(tok_file, near_duplicates=0.8, val_fraction=0.0)
    assert folder.meta["dropped"] == {"near duplicate": 15} and folder.meta["kept"] == 50
    assert run(tok_file, val_fraction=0.0).meta["dropped"] == {"duplicate": 5}
    # of conversations the words count, not what they are wrapped in
    write("in/a.jsonl", [{"prompt": f"{number}？", "response": text} for number, text in enumerate(texts)])
    write("in/b.jsonl", [{"prompt": "问：0？", "response": texts[0]}, {"prompt": "0？", "response": "不知道。"}])
    folder = run(tok_file, kind="sft", near_duplicates=0.8, val_fraction=0.0, max_length=2000)
    assert folder.meta["dropped"] == {"near duplicate": 1} and folder.meta["kept"] == 41


@pytest.mark.parametrize("shared", [0.5, 0.7, 0.9, 0.95])
def test_near_duplicates_are_told_by_what_they_share(shared):
    """Of 100 pairs that share this much: hardly any found below the threshold of 0.8, nearly all above it."""
    pytest.importorskip("datasketch", reason="pip install datasketch")
    from readers.near_duplicates import Seen
    rng = np.random.default_rng(1)
    found = 0
    seen = Seen(0.8)
    for _ in range(100):
        # of two texts of n pieces with m in common, the share is m / (2 n - m)
        same = round(2 * 500 * shared / (1 + shared))
        begin = random_text(rng, same)
        assert not seen.before(begin + random_text(rng, 500 - same))
        found += seen.before(begin + random_text(rng, 500 - same))
    print(shared, found)
    assert found < 15 if shared < 0.8 else found > 85


def test_without_datasketch_it_says_what_to_install(tok_file, monkeypatch):
    corpus(40)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(SystemExit, match="pip install datasketch"):
        run(tok_file, near_duplicates=0.8)
    assert os.listdir("data") == []


# ---------------------------------------------------------------- one text, repetitions, splits, vocabularies

def test_a_single_text_is_divided_by_position(tok_file, monkeypatch):
    os.mkdir("in")
    text = "\n".join(f"{poem}第{i}首" for i, poem in enumerate(POEMS * 75))
    with open("in/novel.txt", "w") as f:
        f.write(text)
    for fraction, characters in ((0.005, len(text) / 10), (0.3, len(text) * 0.3)):
        folder = run(tok_file, val_fraction=fraction)
        (train,), (val,) = folder.texts("train"), folder.texts("val")
        assert train + val == text and abs(len(val) - characters) < characters * 0.1
        assert folder.meta["read"] == folder.meta["kept"] == 1
    # so is a novel that is cut in pieces while it is read: the end of the last ones is held out
    with monkeypatch.context() as smaller:
        smaller.setattr(records, "MAX_CHARACTERS", 1500)
        smaller.setattr(prepare, "LONG", 1500)
        folder = run(tok_file, val_fraction=0.3)
    tokens = [folder.tok.decode(ids).removesuffix("<|endoftext|>") for ids in folder.rows() + folder.rows("val")]
    assert "\n".join(tokens).replace("\n", "") == text.replace("\n", "") and len(tokens) > 4
    assert abs(sum(map(len, folder.texts("val"))) - len(text) * 0.3) < 100
    assert run(tok_file, val_fraction=0.0).texts() == [text]
    write("in/more.jsonl", [{"text": POEMS[0]}])  # a second document: the first is not cut any more
    assert len(run(tok_file).all_texts()) == 2


@pytest.mark.parametrize("text", ["月", "明月", "a", "ab\n", "明" * 3000])
def test_a_single_text_however_short(tok_file, text):
    os.mkdir("in")
    with open("in/a.txt", "w") as f:
        f.write(text)
    folder = run(tok_file, min_length=1)
    assert "".join(folder.texts("train") + folder.texts("val")) == text.strip()


def test_repeated_documents(tok_file):
    corpus(40)
    write("in/talk.jsonl", [{"text": f"{poem}谈{i}"} for i, poem in enumerate(POEMS * 5)] * 2)
    plain = run(tok_file, val_fraction=0.2)
    folder = run(tok_file, val_fraction=0.2, repeat="talk:4, b:2")
    assert folder.texts("val") == plain.texts("val")            # what is held out stays, and stays once
    times = collections.Counter(folder.texts())
    assert set(times) == set(plain.texts())
    for text, n in times.items():
        number = int("".join(filter(str.isdigit, text)))
        assert n == (4 if "谈" in text else 2 if number % 2 else 1), text
    again = sum(times.values()) - len(times)
    assert folder.meta["noticed"] == {"repeated documents": again}
    assert folder.meta["kept"] == plain.meta["kept"]
    assert folder.meta["dropped"] == plain.meta["dropped"] == {"duplicate": 20}
    # the copies are spread: few stand side by side, and the order of the others is the same
    order = [folder.tok.decode(ids) for ids in folder.rows()]
    assert sum(a == b for a, b in zip(order, order[1:])) < again / 3
    assert read_all(run(tok_file, val_fraction=0.2, repeat="talk:4,b:2", workers=2)) == read_all(folder)


def test_repeated_conversations_are_counted_once(tok_file):
    os.mkdir("in")
    write("in/a.jsonl", [{"prompt": f"问{i}", "response": "答" if i else "龘" * 400} for i in range(10)])
    folder = run(tok_file, kind="sft", repeat="a:3", max_length=200, val_fraction=0.0)
    assert folder.meta["dropped"] == {"longer than --max_length=200": 1} and folder.meta["kept"] == 9 and len(folder.rows()) == 27


def test_of_a_document_in_two_files_the_held_out_one_wins(tok_file):
    os.mkdir("in")
    write("in/a.jsonl", [{"text": p} for p in POEMS])
    write("in/b.jsonl", [{"text": POEMS[0], "split": "test"}])
    folder = run(tok_file, repeat="a:3", val_fraction=0.0)
    assert folder.texts("val") == POEMS[:1] and folder.texts() == sorted(POEMS[1:] * 3)


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "test", "eval", "test_sft"])
def test_split_names_are_held_out(tok_file, name):
    os.mkdir("in")
    write("in/a.jsonl", [{"text": f"{POEMS[0]}{i}", "split": name if i % 5 == 0 else "train"} for i in range(50)])
    assert run(tok_file).texts("val") == sorted(f"{POEMS[0]}{i}" for i in range(0, 50, 5))


def test_files_named_train_and_test(tok_file):
    os.mkdir("in")
    write("in/train-00000-of-00001.jsonl", [{"text": f"{POEMS[0]}{i}"} for i in range(9)])
    write("in/test-00000-of-00001.jsonl", [{"text": f"{POEMS[1]}{i}"} for i in range(3)])
    write("in/validation.jsonl", [{"text": f"{POEMS[2]}{i}", "split": "train" if i else None} for i in range(3)])
    folder = run(tok_file)
    assert folder.texts("val") == sorted([*(f"{POEMS[1]}{i}" for i in range(3)), f"{POEMS[2]}0"])
    os.remove("in/train-00000-of-00001.jsonl")
    assert len(run(tok_file).texts("val")) == 1  # without a train file, test… is a name like any other


def test_trained_tokenizer_is_repeatable(monkeypatch):
    corpus()
    one = read_all(run("", vocab_size=400))
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1000)
    assert read_all(run("", vocab_size=400, workers=2)) == one


def no_byte_fallback(path):
    import sentencepiece
    with open(path, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(POEMS * 20), model_writer=f, vocab_size=60, model_type="bpe", hard_vocab_limit=False,
            character_coverage=1.0, minloglevel=2)
    return path


def test_unknown_characters_stop_the_run_or_are_counted(capsys):
    tok_file = no_byte_fallback("plain.model")
    corpus(40)
    write("in/rare.jsonl", [{"text": f"我爱你，龘靐齉爩{p}"} for p in POEMS])
    with pytest.raises(SystemExit, match=r"tokens stand for characters that --tokenizer=plain.model does not know"):
        run(tok_file)
    folder = run(tok_file, max_skipped=1.0)
    unknown = sum(ids.count(folder.tok.unk_id) for split in ("train", "val") for ids in folder.rows(split))
    assert folder.meta["noticed"] == {"unknown tokens": unknown} and unknown > 8
    report.report(folder.path)
    assert f"noticed: unknown tokens {unknown}" in capsys.readouterr().out


def large_vocabulary(size):
    """A rank file of exactly `size` - 4 tokens, as the four chat tokens come after it."""
    import base64
    tokens = [bytes([i]) for i in range(256)] + [b"\xff" + str(i).encode() for i in range(size - 4 - 256 - 1)]
    tokens.append("月".encode())
    with open("ranks", "wb") as f:
        f.writelines(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    return "ranks"


@pytest.mark.parametrize("size,dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_dtype_at_the_border(size, dtype):
    corpus()
    folder = run(large_vocabulary(size))
    assert (folder.meta["dtype"], folder.meta["vocab_size"]) == (dtype, size)
    ids = folder.array("train.bin", "<u2" if dtype == "uint16" else "<u4")
    assert ids.max() == folder.tok.eot_id == size - 4                   # ids at the very top, not wrapped
    assert folder.all_texts() == sorted(corpus())


def test_long_conversations_end_with_an_answer_to_learn(tok_file):
    os.mkdir("in")
    tok = load_tokenizer(tok_file)
    turns = messages("u:明月", "a:床前明月光", "u:一二三", "a:疑是地上霜", "u:四五", "a:白日依山尽")
    turns[3]["weight"] = 0
    write("in/a.jsonl", [{"messages": turns}])
    limit = len(render_chat(tok, turns)[0]) - 1
    folder = run(tok_file, kind="sft", max_length=limit, val_fraction=0.0)
    assert folder.rows() == [render_chat(tok, turns[:2])[0]]
    assert folder.meta["cut"] == {f"after an answer, at --max_length={limit}": 1}
