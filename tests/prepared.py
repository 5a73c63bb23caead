"""What the tests of prepare.py share: a few poems, a small tokenizer, what a prepared folder holds. Not a test file."""
import json
import os

import numpy as np

import prepare
from tokenizer import load_tokenizer, train_tokenizer

POEMS = ["床前明月光，疑是地上霜。", "白日依山尽，黄河入海流。", "春眠不觉晓，处处闻啼鸟。", "千山鸟飞绝，万径人踪灭。"]


def small_tokenizer(path):
    train_tokenizer(POEMS * 20 + ["user assistant system 你好 hello 一二三四五六七八九十"] * 20, path, 420, 1.0)
    return str(path)


def write(path, records):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def run(tok_file, name="x", **settings):
    """Prepare ./in (or input=…) and return what the folder holds."""
    cfg = prepare.Config(**{"name": name, "input": "in", "tokenizer": tok_file, "workers": 1, **settings})
    folder = Folder(prepare.prepare(cfg))
    meta = folder.meta
    assert meta["read"] == meta["kept"] + sum(meta["dropped"].values()) + sum(meta["skipped"].values())
    return folder


def messages(*turns):
    """'u:…' 'a:…' 's:…' 't:…' → messages"""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def corpus(count=300):
    os.makedirs("in", exist_ok=True)
    texts = [f"{poem}{i}" for i, poem in enumerate(POEMS * (count // 4))]
    write("in/a.jsonl", [{"text": t} for t in texts[::2]])
    write("in/b.jsonl", [{"text": t} for t in texts[1::2]])
    return texts


def read_all(folder):
    out = {}
    for name in os.listdir(folder.path):
        if name != "meta.json":
            with open(os.path.join(folder.path, name), "rb") as f:
                out[name] = f.read()
    return out


class Folder:
    def __init__(self, path):
        self.path = path
        with open(os.path.join(path, "meta.json"), encoding="utf-8") as f:
            self.meta = json.load(f)
        self.tok = load_tokenizer(path)

    def array(self, file, dtype=None):
        return np.fromfile(os.path.join(self.path, file), dtype or self.meta["dtype"])

    def rows(self, split="train", file="bin", dtype=None):
        """The documents of a split, as lists of ids (or mask values)."""
        data = self.array(f"{split}.{file}", dtype)
        if self.meta["kind"] == "text":
            ends = np.flatnonzero(data == self.tok.eot_id) + 1
        else:
            ends = self.array(f"{split}.idx", np.int64)[1:]
        return [part.tolist() for part in np.split(data, ends)[:-1]]

    def texts(self, split="train"):
        return sorted(self.tok.decode(ids).removesuffix("<|endoftext|>") for ids in self.rows(split))

    def all_texts(self):
        return sorted(self.texts("train") + self.texts("val"))

    def learned(self, split="train"):
        return [self.tok.decode(np.array(ids)[np.array(mask) == 1])
                for ids, mask in zip(self.rows(split), self.rows(split, "mask", np.uint8))]
