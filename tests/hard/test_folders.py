"""Data folders that are cut short, damaged, of another kind, or of another tokenizer: one sentence each."""
import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest
from small_runs import CPU, make_run, refused, run, settings, write_folder, write_pairs
from small_runs import ranked_answers

from common.data import open_data
from common.mixed import open_mixed


@pytest.fixture
def folder(tmp_path):
    """A data folder of two documents for training and one for validation, with masks, offsets and groups."""
    path = tmp_path / "data" / "talk"
    path.mkdir(parents=True)
    meta = {"kind": "pairs", "dtype": "uint16", "fingerprint": "f" * 64, "vocab_size": 300}
    for split, ids, idx in (("train", [1, 2, 3, 65535, 5], [0, 3, 5]), ("val", [9, 8], [0, 2])):
        np.array(ids, "<u2").tofile(path / f"{split}.bin")
        np.array([i % 2 for i in range(len(ids))], np.uint8).tofile(path / f"{split}.mask")
        np.array(idx, np.int64).tofile(path / f"{split}.idx")
        np.arange(len(idx) - 1, dtype=np.int32).tofile(path / f"{split}.group")
        meta[split] = {"tokens": len(ids), "documents": len(idx) - 1, "bytes": 10}
    (path / "meta.json").write_text(json.dumps(meta))
    return path


def leaves(*args):
    with pytest.raises(SystemExit) as left:
        open_data(*args)
    assert str(left.value).startswith("error: ")
    return str(left.value)


def test_open_data(folder):
    train, val, meta = open_data(str(folder), "pairs", "f" * 64)
    assert train.tokens.tolist() == [1, 2, 3, 65535, 5] and val.tokens.tolist() == [9, 8]
    assert isinstance(train.tokens, np.memmap)  # never read whole
    assert len(train) == 2 and len(val) == 1
    ids, mask = train.document(1)
    assert ids.tolist() == [65535, 5] and ids.dtype == np.int64 and mask.tolist() == [1, 0]
    assert train.group.tolist() == [0, 1] and train.meta["bytes"] == 10 and meta["vocab_size"] == 300
    open_data(str(folder))  # kind and fingerprint are checked where they are given


@pytest.mark.parametrize("kind,files", [("text", []), ("prompts", ["idx"]), ("sft", ["mask", "idx"]),
                                        ("pairs", ["mask", "idx", "group"])])
def test_each_kind_has_its_files_and_needs_them(folder, kind, files):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "kind": kind}))
    train, _, _ = open_data(str(folder), kind)
    assert len(train.tokens) == 5
    for name in ("mask", "idx", "group"):
        assert (getattr(train, name) is not None) == (name in files)
    for name in files:
        os.rename(folder / f"val.{name}", folder / "away")
        assert f"{folder}/val.{name} is missing" in leaves(str(folder))
        os.rename(folder / "away", folder / f"val.{name}")


@pytest.mark.parametrize("meta", ["{}", "[]", "5", "", '{"kind": "text"', '{"train": {}, "val": {}}'])
def test_a_damaged_meta_json_is_named(folder, meta):
    (folder / "meta.json").write_text(meta)
    assert f"{folder}/meta.json is damaged" in leaves(str(folder))


def test_open_data_wide_and_empty(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["dtype"] = "uint32"
    np.array([1, 2, 3, 70000, 5], "<u4").tofile(folder / "train.bin")
    np.array([], "<u4").tofile(folder / "val.bin")
    np.array([0], np.int64).tofile(folder / "val.idx")
    for ending in ("mask", "group"):
        (folder / f"val.{ending}").write_bytes(b"")
    meta["val"].update(tokens=0, documents=0)
    (folder / "meta.json").write_text(json.dumps(meta))
    train, val, _ = open_data(str(folder))
    assert train.tokens.tolist() == [1, 2, 3, 70000, 5] and len(val) == 0 and len(val.tokens) == 0


@pytest.mark.parametrize("ending, size", [("train.bin", 10), ("val.bin", 4), ("train.mask", 5), ("train.idx", 24),
                                          ("train.group", 8)])
def test_open_data_cut_short_or_grown(folder, ending, size):
    """Each file one byte too short, and too long: the message names the file and both sizes."""
    path = folder / ending
    data = path.read_bytes()
    for changed in (data[:-1], data + b"\0", b""):
        path.write_bytes(changed)
        message = leaves(str(folder))
        assert str(path) in message and f"has {len(changed)} bytes, meta.json says {size}" in message


def test_open_data_missing_things(folder, tmp_path):
    os.remove(folder / "train.bin")
    assert f"{folder}/train.bin is missing" in leaves(str(folder))
    os.remove(folder / "meta.json")  # an interrupted prepare leaves no meta.json: the folder counts as not there
    message = leaves(str(folder), "sft")
    assert str(folder) in message and "python prepare.py talk --input=FILE_OR_FOLDER --kind=sft" in message
    message = leaves(str(tmp_path / "baby") + "/", "text")
    assert "python prepare.py baby --input=" in message and "python prepare.py poems" in message


def test_open_data_of_another_kind_or_tokenizer(folder):
    message = leaves(str(folder), "text")
    assert "kind pairs" in message and "reads text" in message
    message = leaves(str(folder), "pairs", "e" * 64)
    assert "f" * 12 in message and "e" * 12 in message and "tokenizer" in message


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_answers_that_cannot_be_ranked(place, tmp_path, stage):
    """A prompt with one answer is refused, and so is a document that the model cannot see; no validation is no
    error."""
    root, tok = place
    two = [ranked_answers(tok, i, 2) for i in range(3)]
    write_pairs(f"{tmp_path}/one", tok, {"train": [two[0][:1], two[1]], "val": two})
    write_pairs(f"{tmp_path}/none", tok, {"train": two, "val": []})
    write_pairs(f"{tmp_path}/empty", tok, {"train": [], "val": two})
    make_run(f"{tmp_path}/narrow", tok, max_seq_len=8)
    for changes, words in [(dict(data_dir=f"{tmp_path}/one"), "a prompt with 1 answers"),
                           (dict(data_dir=f"{tmp_path}/empty"), "has no prompts to train on"),
                           (dict(init_from=f"{tmp_path}/narrow"), "(the model sees 8). Prepare it again")]:
        assert words in refused(settings(root, stage, f"{tmp_path}/x", **changes))
    _, log = run(settings(root, stage, f"{tmp_path}/x", data_dir=f"{tmp_path}/none", max_steps=2))
    assert len(log) == 2 and "val_loss" not in log[-1]


@pytest.mark.parametrize("name, words", [
    ("pairs", "holds data of kind pairs"), ("prompts", "holds data of kind prompts"), ("short", "more tokens than 128"), ("nowhere", "no data in")])
def test_rows_of_another_kind_are_not_mixed_in(place, tmp_path, name, words):
    """Ranked answers are no conversations to imitate: the rejected ones would be learned, too. Prompts have no targets.
    A text shorter than a piece has none either."""
    root, tok = place
    write_folder(f"{tmp_path}/short", tok, "text", {"train": [5] * 100, "val": [5] * 100})
    folder = f"{tmp_path}/short" if name == "short" else f"{root}/{name}"
    with pytest.raises(SystemExit, match=f"error: .*{name}") as left:
        open_mixed(folder, 4, tok, 256, CPU)
    assert words in str(left.value)


def test_rows_longer_than_the_model_sees_are_not_mixed_in(place):
    root, tok = place
    for folder in ("text", "talks"):
        with pytest.raises(SystemExit, match="wanted are rows of at most the 64 that the model sees"):
            open_mixed(f"{root}/talks,{root}/{folder}", 4, tok, 64, CPU)
    assert len(open_mixed(f"{root}/talks,{root}/text", 4, tok, 256, CPU)) == 2
    with pytest.raises(SystemExit, match="ptx_rows=3 must be a multiple of the 2 processes"):
        open_mixed(f"{root}/talks", 3, tok, 256, type(CPU)(0, 2, CPU.device, CPU.dtype))


def test_without_held_out_text_it_trains_and_says_so_once(place, tmp_path, capsys):
    root, tok = place
    write_folder(f"{tmp_path}/data", tok, "text", {"train": [5, 6, 7] * 50, "val": []})
    cfg = settings(root, "pretrain", f"{tmp_path}/run", data_dir=f"{tmp_path}/data", max_steps=4, eval_every=2,
                   sample_start="春夜" * 100)  # longer than the model sees: costs nothing
    checkpoint, records = run(cfg)
    assert capsys.readouterr().out.count(f"no held-out text: {tmp_path}/data") == 1
    assert "best.pt" not in os.listdir(cfg.out_dir) and not any("val_loss" in r for r in records)
    checkpoint, _ = run(dataclasses.replace(cfg, max_steps=6))  # it goes on like any other run
    assert checkpoint["step"] == 6 and checkpoint["best_val"] == math.inf


def test_texts_that_cannot_be_trained_on(place, tmp_path):
    root, tok = place
    write_folder(f"{tmp_path}/tiny", tok, "text", {"train": [5] * 20, "val": []})
    shutil.copytree(f"{root}/text", f"{tmp_path}/mixed_up")
    with open(f"{root}/text/meta.json") as f:
        meta = json.load(f)
    with open(f"{tmp_path}/mixed_up/meta.json", "w") as f:
        json.dump({**meta, "fingerprint": "0" * 64}, f)
    for changes, words in [(dict(data_dir="data/baby"), "python prepare.py baby --input=FILE_OR_FOLDER"),
                           (dict(data_dir=f"{tmp_path}/tiny"), "fewer than one row of seq_len=32"),
                           (dict(data_dir=f"{tmp_path}/mixed_up"), "is not the vocabulary that the tokens beside it"),
                           (dict(seq_len=64), "seq_len=64 is more than the model can see, max_seq_len=32")]:
        assert words in refused(settings(root, "pretrain", f"{tmp_path}/run", **changes))


def test_conversations_that_cannot_be_trained_on(place, tmp_path):
    root, tok = place
    make_run(f"{tmp_path}/narrow", tok, max_seq_len=64)
    for changes, words in [(dict(seq_len=512), "seq_len=512 exceeds the 256 tokens that the model or its teacher can"),
                           (dict(teacher=f"{tmp_path}/narrow"), "seq_len=128 exceeds the 64 tokens"),
                           (dict(seq_len=4), "none of the 40 conversations"),
                           (dict(data_dir="text"), "holds data of kind text, this stage reads sft")]:
        assert words in refused(settings(root, "sft", f"{tmp_path}/run", **changes))
