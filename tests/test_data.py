"""data.py: the order of rows, data folders, documents side by side."""
import itertools
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.distributed import Env
from common.data import Split, collate, get_prompts, mixed_rows, open_data, open_pairs, shuffled


def env_of(rank=0, world=1):
    return Env(rank, world, torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------------------- order of rows


@settings(max_examples=100, deadline=None, derandomize=True)
@given(n=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_every_epoch_visits_every_row_once(n, seed):
    order = shuffled(n, 0, 3 * n, seed)
    for epoch in range(3):
        assert sorted(order[epoch * n:(epoch + 1) * n]) == list(range(n))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(n=st.integers(1, 100), first=st.integers(0, 1000), count=st.integers(1, 50), seed=st.integers(0, 1000))
def test_the_order_depends_on_the_place_alone(n, first, count, seed):
    """Any stretch, taken in one piece or several, from anywhere, is the same piece of one endless sequence."""
    assert shuffled(n, first, count, seed).tolist() == shuffled(n, 0, first + count, seed)[first:].tolist()


def test_the_order_changes_with_epoch_and_seed():
    epochs = shuffled(1000, 0, 3000, 1).reshape(3, 1000)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], shuffled(1000, 0, 1000, 2))
    starts = Counter(int(shuffled(10, 0, 1, seed)[0]) for seed in range(2000))
    assert all(130 < starts[i] < 270 for i in range(10)), starts  # 200 each, standard deviation 13
    assert shuffled(10**6, 5, 3, 0).dtype == np.int64


def test_every_order_of_an_epoch_is_as_likely():
    """A real permutation: each of the 24 orders of four rows comes up, about as often as any other."""
    counts = Counter(tuple(shuffled(4, 0, 4, seed).tolist()) for seed in range(2400))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert all(55 < n < 150 for n in counts.values()), counts  # 100 each, standard deviation 10
    later = Counter(tuple(shuffled(4, 4 * epoch, 4, 1).tolist()) for epoch in range(2400))
    assert set(later) == set(itertools.permutations(range(4)))


def test_neighbours_are_not_a_fixed_step_apart():
    """Rows a fixed step apart would come from the same places of the corpus again and again."""
    order = shuffled(1009, 0, 1009, 5)
    steps = Counter(((order[1:] - order[:-1]) % 1009).tolist())
    assert steps.most_common(1)[0][1] < 10


# ---------------------------------------------------------------------------- data folders


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


def leaves(*args):
    with pytest.raises(SystemExit) as left:
        open_data(*args)
    assert str(left.value).startswith("error: ")
    return str(left.value)


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


# ---------------------------------------------------------------------------- documents


def test_collate_by_hand():
    documents = [(np.array([7, 8, 9, 4]), np.array([0, 0, 1, 1])), (np.array([5, 6]), np.array([0, 1]))]
    ids, targets, mask = collate(documents, pad_id=3)
    assert ids.tolist() == [[7, 8, 9], [5, 6, 3]]
    assert targets.tolist() == [[8, 9, 4], [6, 3, 3]]
    assert mask.tolist() == [[0, 1, 1], [1, 0, 0]]  # 1 where the target is to be learned
    assert ids.dtype == targets.dtype == torch.int64 and mask.dtype == torch.float32


@pytest.fixture
def ranked():
    """Five answers to two prompts, three to the first; ids and masks tell which is which."""
    documents = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11], [12, 13, 14]]
    masks = [[0, 1, 1], [0, 1], [0, 0, 1, 1], [0, 1], [0, 0, 1]]
    idx = np.cumsum([0] + [len(ids) for ids in documents])
    return Split(np.concatenate(documents).astype(np.uint16), np.concatenate(masks).astype(np.uint8), idx,
                 np.array([0, 0, 0, 1, 1], np.int32), {})


def test_prompt_bounds(ranked):
    assert ranked.prompt_bounds().tolist() == [0, 3, 5]
    numbered_otherwise = Split(ranked.tokens, ranked.mask, ranked.idx, np.array([7, 7, 9, 9, 9], np.int32), {})
    assert numbered_otherwise.prompt_bounds().tolist() == [0, 2, 5]
    assert ranked.prompt_bounds().tolist() == [0, 3, 5]  # remembered for each split by itself


def test_get_prompts_by_hand(ranked):
    (ids, targets, mask), sizes = get_prompts(ranked, [1, 0], 0, "cpu")
    assert sizes == [2, 3]
    assert ids.tolist() == [[10, 11, 0], [12, 13, 14], [1, 2, 3], [4, 5, 0], [6, 7, 8]]
    assert targets.tolist() == [[11, 0, 0], [13, 14, 0], [2, 3, 0], [5, 0, 0], [7, 8, 9]]
    assert mask.tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0], [0, 1, 1]]


def write_ranked(path, splits):
    path.mkdir()
    meta = {"kind": "pairs", "dtype": "uint16", "fingerprint": "f" * 64, "vocab_size": 300}
    for name, split in splits.items():
        for ending in ("mask", "group", "idx"):
            getattr(split, ending).tofile(path / f"{name}.{ending}")
        split.tokens.tofile(path / f"{name}.bin")
        meta[name] = {"tokens": len(split.tokens), "documents": len(split)}
    (path / "meta.json").write_text(json.dumps(meta))
    return str(path)


def test_open_pairs(ranked, tmp_path):
    empty = Split(*(np.zeros(0, dtype) for dtype in (np.uint16, np.uint8)), np.zeros(1, np.int64),
                  np.zeros(0, np.int32), {})
    path = write_ranked(tmp_path / "a", {"train": ranked, "val": empty})
    train, val, meta = open_pairs(path, "f" * 64, 4)
    assert train.prompt_bounds().tolist() == [0, 3, 5] and len(val) == 0 and meta["kind"] == "pairs"
    with pytest.raises(SystemExit, match=r"a document of 4 tokens \(the model sees 3\).*--max_length=3"):
        open_pairs(path, "f" * 64, 3)
    lonely = Split(ranked.tokens, ranked.mask, ranked.idx, np.array([0, 0, 1, 2, 2], np.int32), {})
    for name, splits in (("b", {"train": lonely, "val": empty}), ("c", {"train": ranked, "val": lonely})):
        with pytest.raises(SystemExit, match="a prompt with 1 answers"):
            open_pairs(write_ranked(tmp_path / name, splits), "f" * 64, 4)
    with pytest.raises(SystemExit, match="has no prompts to train on"):
        open_pairs(write_ranked(tmp_path / "d", {"train": empty, "val": ranked}), "f" * 64, 4)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_mixed_conversations_are_shared_among_processes(ranked, world):
    """Together the processes hold the rows that one would, and their weights are one mean over the learned tokens."""
    seen = []
    for rank in range(world):
        ids, targets, weights = mixed_rows([ranked], 3, 4, 9, 0, env_of(rank, world))
        assert len(ids) == 4 // world
        for row in range(len(ids)):
            learned = weights[row] > 0
            seen.append((ids[row, 0].item(), targets[row][learned].tolist(), weights[row].sum().item()))
    wanted = [ranked.document(i) for i in shuffled(5, 12, 4, 9)]
    n_learned = sum(mask.sum() for _, mask in wanted)
    assert sorted(s[:2] for s in seen) == sorted((ids[0], ids[mask > 0].tolist()) for ids, mask in wanted)
    assert sum(s[2] for s in seen) == pytest.approx(1)
    for first, targets, weight in seen:
        assert weight == pytest.approx(len(targets) / n_learned)


def test_mixed_folders_take_turns(ranked):
    """Each goes on where it was when it last had its turn."""
    text = Split(np.arange(128 * 9 + 1, dtype=np.uint16), None, None, None, {})
    for number in range(6):
        mixed = mixed_rows([ranked, text], number, 2, 1, 0, env_of())
        alone = mixed_rows([[ranked], [text]][number % 2], number // 2, 2, 1, 0, env_of())
        assert all(torch.equal(a, b) for a, b in zip(mixed, alone))


def test_mixed_text_is_cut_into_pieces():
    text = Split(np.arange(128 * 5 + 1, dtype=np.uint16), None, None, None, {})
    starts = []
    for number in range(5):
        ids, targets, weights = mixed_rows([text], number, 2, 1, 0, env_of())
        assert ids.shape == (2, 128) and torch.equal(targets, ids + 1)
        assert torch.allclose(weights, torch.tensor(1 / 256))
        starts += ids[:, 0].tolist()
    assert sorted(starts) == sorted([0, 128, 256, 384, 512] * 2)  # two epochs
