"""prepare.py on arbitrary input: no traceback, the account adds up, and nothing that can be read is lost.

A few hundred inputs here; runs/fuzz.sh tries 100,000 (FUZZ=100000 python -m pytest tests/hard/test_fuzz_data.py).
"""
import bz2
import csv
import gzip
import io
import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from prepared import run, small_tokenizer
from readers.account import Skip
from readers.fields import CHAT, ROLES, TEXT, TURN, is_empty
from readers.schemas import CONVERTERS, convert, unfold

EXAMPLES = int(os.environ.get("FUZZ", 300))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
FUZZ = dict(max_examples=EXAMPLES, deadline=None, print_blob=True, suppress_health_check=SLOW)

# What is hard about texts (lone surrogates come as JSON escapes), and about values that are none.
HARD = ["", " ", "\0", "\ud83d", "\udc80", "😀", "明月光", "Human: 问\n\nAssistant: 答", "[1, 2]", "{", "[]", "null",
        "\u2028", "a" * 2000, "<|im_end|>", "<tool_call>", "train", "test", "text", "user", "assistant", "true", "False"]
PLAIN = [None, True, False, 0, 1, -1, 7, 10**30, 0.0, 1.0, 0.5, -1e300, float("inf"), float("nan"), *sorted(ROLES)]
NAMES = sorted(CHAT | TEXT | TURN | {"split", "type", "instances", "name", "function", "arguments", "url"})


# A plain random number generator makes a record in 0.05 ms; drawn by hypothesis, value by value, it took 5 ms.


def any_text(rng):
    if rng.random() < 0.5:
        return rng.choice(HARD)
    ends = rng.choices((128, 0xA000, 0x110000), k=rng.randrange(20))
    return "".join(chr(rng.randrange(end)) for end in ends)


def any_value(rng, depth=0):
    kind = rng.choice(("plain", "text", "text", "list", "object"))
    if kind == "plain":
        return rng.choice(PLAIN)
    if kind == "text" or depth == 4:
        return any_text(rng)
    if kind == "list":
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    names = [rng.choice(NAMES) if rng.random() < 0.8 else any_text(rng) for _ in range(rng.randrange(6))]
    return {name: any_value(rng, depth + 1) for name in names}


def any_turns(rng):
    turns = []
    for _ in range(rng.randrange(6)):
        turn = {"role": rng.choice([*ROLES, "alien"]), "content": rng.choice((any_text, any_value))(rng)}
        turn |= {name: any_value(rng) for name in ("weight", "tool_calls", "reasoning_content") if rng.random() < 0.3}
        turns.append({name: value for name, value in turn.items() if rng.random() < 0.9})
    return turns


def any_record(rng):
    make = rng.choice((any_value, any_turns, dict, dict, dict))
    if make is not dict:
        return make(rng)
    names = rng.choices(NAMES, k=rng.randrange(7))
    return {name: rng.choice((any_value, any_turns, any_text))(rng) for name in names}


RECORDS = st.randoms(use_true_random=True).map(any_record)
FIELDS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=2)


@settings(**FUZZ)
@given(record=RECORDS, kind=st.sampled_from(sorted(CONVERTERS)), fields=FIELDS)
def test_any_record_is_used_or_skipped_for_a_reason(record, kind, fields):
    for item in unfold(json.loads(json.dumps(record)), kind):
        try:
            content, notes = convert(item, kind, fields)
        except Skip as skip:
            # the message is made for people
            said = str(skip).split(": {")[0]
            for python in ("object has no", "unhashable", "not subscriptable", "'NoneType'", "indices"):
                assert python not in said
            continue
        text = content if kind == "text" else json.dumps(content, ensure_ascii=False)
        assert text.encode().strip()
        if kind != "text":
            turns = content
            if kind == "pairs":
                turns = [*content["prompt"], {"role": "assistant", "content": content["answers"][0]}]
            assert all(turn["role"] in ROLES.values() and isinstance(turn["content"], str) for turn in turns)
            assert turns[-1]["role"] == ("user" if kind == "prompts" else "assistant")
        # every field of a record is used or ignored, unless it is empty (NaN is, as pandas writes it)
        if isinstance(item, dict) and not fields:
            told = notes.used | {name.split(".")[0] for name in notes.ignored}
            full = {name for name, value in item.items() if not is_empty(value) and name.isidentifier()}
            assert len(told) >= len(full)


def good(kind, i):
    """A record of this kind that can be read, and what must be found of it."""
    text = f"床前明月光{i}号疑是地上霜"
    if kind == "text":
        return {"text": text}
    if kind == "sft":
        return {"prompt": text, "response": text}
    if kind == "pairs":
        return {"prompt": text, "chosen": text, "rejected": "不"}
    return {"prompt": text}


GARBAGE = st.one_of(
    st.binary(max_size=40),
    RECORDS.map(lambda record: json.dumps(record).encode()),
    RECORDS.map(lambda record: json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")),
    RECORDS.map(lambda record: json.dumps(record, ensure_ascii=False).encode("gb18030", "replace")),
    st.sampled_from([b"[" * 3000, b'{"text": ' * 2000, b"9" * 5000, b'{"text": "' + b"x" * 300_000, b"\xff\xfe",
                     b"\xef\xbb\xbf", b"\0" * 50, b"\x80", b'{"text": "\\ud83d"}',
                     '{"text": "月光'.encode("big5"), b"]", b"}", b","]))
FORMATS = ("jsonl", "json", "txt", "csv", "jsonl.gz", "jsonl.bz2", "parquet", "txt.gz")


def as_file(ending, parts):
    """The bytes of a file with these parts: garbage, or records that can be read."""
    lines = [part if isinstance(part, bytes) else json.dumps(part, ensure_ascii=False).encode() for part in parts]
    if ending == "json":
        return b"[" + b",\n".join(lines) + b"]"
    if ending.startswith("txt"):
        lines = [part if isinstance(part, bytes) else "".join(part.values()).encode() for part in parts]
        return b"\n\n".join(lines)
    if ending == "csv":
        out = io.StringIO()
        writer = csv.writer(out)
        names = next((list(part) for part in parts if isinstance(part, dict)), ["text"])
        writer.writerow(names)
        rows = [out.getvalue().encode()]
        for part in parts:
            row = io.StringIO()
            if isinstance(part, dict):
                csv.writer(row).writerow(part.values())
            rows.append(part + b"\n" if isinstance(part, bytes) else row.getvalue().encode())
        return b"".join(rows)
    return b"\n".join(lines) + b"\n"


@pytest.fixture(scope="module")
def tok_file(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tok") / "tokenizer.model")


@settings(**FUZZ)
@given(kind=st.sampled_from(sorted(CONVERTERS)), ending=st.sampled_from(FORMATS),
       parts=st.lists(st.one_of(st.integers(0, 9), GARBAGE), min_size=1, max_size=12),
       cut=st.one_of(st.just(0), st.just(0), st.integers(1, 60)),
       rot=st.one_of(st.none(), st.none(), st.integers(0, 400)),
       document=st.sampled_from(["blank", "line", "file"]), repeat=st.sampled_from(["", "a:3"]))
def test_any_file_is_prepared_or_refused_in_one_line(tok_file, tmp_path, monkeypatch, kind, ending, parts, cut, rot,
                                                     document, repeat):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("in", ignore_errors=True)
    os.mkdir("in")
    for i, part in enumerate(parts):
        parts[i] = good(kind, part) if isinstance(part, int) else part.replace(b"\n", b"").replace(b"\r", b"")
    data = as_file(ending, parts)
    packed = gzip.compress(data) if ending.endswith("gz") else bz2.compress(data) if ending.endswith("bz2") else data
    if cut:
        packed = packed[:-cut]
    if rot is not None and rot < len(packed):
        packed = packed[:rot] + bytes([packed[rot] ^ 255]) + packed[rot + 1:]
    with open(f"in/a.{ending}", "wb") as f:
        f.write(packed)
    try:
        # run() checks that read = kept + dropped + skipped
        folder = run(tok_file, kind=kind, max_skipped=1.0, min_length=1, txt_document=document, repeat=repeat,
                     val_fraction=0.3)
        found = "".join(folder.texts("train") + folder.texts("val"))  # a single text is in both
    except SystemExit as e:
        assert str(e).startswith("error: ") and len(str(e).splitlines()) == 1
        assert not os.path.exists("data/x.tmp")
        return
    finally:
        shutil.rmtree("data", ignore_errors=True)
    # a line that stands alone is found, whatever stands before and after it
    is_line = ending.startswith("jsonl")
    if ending.startswith("txt"):
        is_line = document != "file" and kind in ("text", "prompts")
    is_whole = not cut and rot is None and not data.startswith((b"\xff\xfe", b"\xfe\xff"))
    # a .txt that begins with lines of JSON is read as such, and other lines are broken ones
    is_json = ending.startswith("txt") and "broken JSON" in folder.meta["skipped"]
    if is_line and is_whole and not is_json and "binary file" not in folder.meta["skipped"]:
        for part in parts:
            if isinstance(part, dict):
                assert next(iter(part.values())) in found
