"""
Files to documents: every record is read, converted, cleaned and accounted for, and all documents go into one file.

    account = Account(find_files("corpus/"))
    table = write_documents(read_documents(cfg, account), folder, seed)     # one row a document: 18 bytes
    account.verify(cfg, len(table))                                         # stops where much would be lost
    numbers = divide(table, 0.005)                                          # {"train": …, "val": …}: which, in order
    Documents(folder)[7]                                                    # the text of document 7

A record is kept, or dropped by a rule (too short, a duplicate), or skipped because it cannot be used: these three add
up to the records read. Of every file the account tells which fields were used, and which were ignored.
"""
import collections
import hashlib
import json
import os
import sys

import numpy as np
from tqdm import tqdm

from configurator import check
from recipes.near_duplicates import Seen
from recipes.records import READERS, UNPACKERS, Part, Skip, read_file, stem
from recipes.schemas import CHAT, QUESTION, TEXT, TRAIN_WORDS, VAL_WORDS
from recipes.schemas import Drop, Tally, convert, split_of, unfold, words

ROW = np.dtype([("hash", "u8"), ("end", "i8"), ("split", "u1"), ("times", "u1")])  # of a document, kept in memory
ANY = 0  # the split it asks for
VAL = 2
SPLITS = {None: ANY, "train": 1, "val": VAL}


# ---------------------------------------------------------------------------- reading, and what becomes of every record


class Account:
    """What became of all records. counts: "read", "kept", "parts" (records that go on in the next one) and the reasons
    ("skipped" | "dropped" | "cut" | "noticed", reason); fields: path → Tally."""

    def __init__(self, files):
        self.files = files
        self.counts = collections.Counter()
        self.fields = collections.defaultdict(Tally)

    def reasons(self, what):
        return {key[1]: n for key, n in self.counts.most_common() if key[0] == what and n}

    def verify(self, cfg, n_documents):
        """Stop where too many records, too much of the files, or a field that holds most of the text would be lost."""
        read = self.counts["read"]
        check(read, f"--input={cfg.input} holds no records: its files are empty")
        skipped = self.reasons("skipped")
        n = sum(skipped.values())
        check(n <= cfg.max_skipped * read, f"{n:,} of {read:,} records cannot be used ({n / read:.1%}, more than "
              f"max_skipped={cfg.max_skipped}): {listed(skipped)}. The first are listed above. Is --kind={cfg.kind} "
              "right? --max_skipped=1 goes on without them")
        lost = self.counts["noticed", "bytes not read"]
        size = sum(map(os.path.getsize, self.files)) or 1
        check(lost <= cfg.max_skipped * size, f"{lost:,} of {size:,} bytes could not be read ({lost / size:.1%}, more "
              f"than max_skipped={cfg.max_skipped}): the damaged files are listed above. --max_skipped=1 goes on "
              "without them")
        check(n_documents, f"nothing is left of {read:,} records. Dropped: {listed(self.reasons('dropped'))}")
        known = () if cfg.kind == "text" else CHAT - {*QUESTION, "history"}
        for path, tally in self.fields.items():
            used = ", ".join(sorted(tally.used))
            for name, characters in tally.ignored_characters.items():
                hint = f"--fields=text:{name} learns it, --fields=text:{used.split(', ')[0]} leaves it out"
                if cfg.kind != "text":
                    names = ",".join(f"{field}:{field}" for field in sorted(tally.used))
                    hint = f"--fields=question:…,answer:… says which fields to learn, --fields={names} leaves it out"
                is_fine = cfg.fields or name in known or characters <= tally.characters or cfg.kind == "prompts"
                check(is_fine, f"{path}: the field {name}, which would be ignored, holds more text than all that is "
                      f"used ({used}). {hint}")

    def add_order(self, numbers, n_documents):
        """Count the documents that divide() left out, or put in again."""
        everything = np.concatenate([numbers["train"], numbers["val"]])
        unique = int((everything < n_documents).sum())
        self.counts["dropped", "duplicate"] = n_documents - unique
        self.counts["noticed", "repeated documents"] = len(everything) - unique

    def add_splits(self, totals):
        """Add the counts of the tokenized splits."""
        for counts in totals.values():
            self.counts.update(counts)
        check(totals["train"]["documents"], f"nothing to train on: of {self.counts['read']} records "
              f"{totals['val']['documents']} are held out, no other is left (--val_fraction=0 holds none out, but "
              "those that a file's name or a field split says). "
              f"Dropped: {listed(self.reasons('dropped')) or 'none'}")

    def summary(self):
        """For meta.json."""
        fields = {}
        for path, tally in self.fields.items():
            fields[path] = {"used": dict(sorted(tally.used.items())), "ignored": dict(sorted(tally.ignored.items()))}
        reasons = {what: self.reasons(what) for what in ("dropped", "skipped", "cut", "noticed")}
        return {"read": self.counts["read"], "kept": self.counts["kept"], **reasons, "sources": self.files,
                "fields": fields}


def listed(counts):
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def read_documents(cfg, account):
    """Yield (document as bytes, split it asks for, how often to train on it)."""
    files = account.files
    counts = account.counts
    fields = read_names(cfg, "fields", CHAT | TEXT | {"split"})
    repeat = dict(read_names(cfg, "repeat", {stem(path) for path in files}))
    splits = {path: split_of_path(path, cfg.input) for path in files}
    is_divided = "train" in splits.values()  # into train-00.jsonl and test-00.jsonl, or folders train/ and test/
    seen = Seen(cfg.near_duplicates) if cfg.near_duplicates else None
    size = sum(map(os.path.getsize, files))
    with tqdm(total=size, unit="B", unit_scale=True, desc="read", disable=None) as bar:
        for path in files:
            times = repeat.get(stem(path), 1)
            split = splits[path] if is_divided else None
            for where, record in read_records(path, cfg, bar):
                counts["read"] += 1
                counts["parts"] += isinstance(record, Part)
                try:
                    content, notes = convert(record, cfg.kind, fields)
                except Skip as skip:
                    note_skip(skip, where, counts)
                    continue
                text = content if cfg.kind == "text" else json.dumps(content, ensure_ascii=False)
                account.fields[path].add(notes, len(words(content)))
                for reason, n in notes.cut.items():
                    counts["cut", reason] += n
                if cfg.kind == "text" and len(text) < cfg.min_length:
                    counts["dropped", "too short"] += 1
                    continue
                if seen and seen.before(words(content)):
                    counts["dropped", "near duplicate"] += 1
                    continue
                yield text.encode(), SPLITS[notes.split or split], times


def split_of_path(path, root):
    """The split that a folder below `root` is named after, test/; or else a file's name says, my.train.jsonl."""
    inside = os.path.basename(path) if path == root else os.path.relpath(path, root)
    *folders, file = inside.lower().split(os.sep)
    for ending in (*UNPACKERS, *READERS):
        file = file.removesuffix(ending)
    named = [folder for folder in folders if folder in TRAIN_WORDS + VAL_WORDS]
    for name in [*reversed(named), file, *reversed(folders)]:
        split = split_of(name)
        if split:
            return split
    return None


def read_records(path, cfg, bar):
    """Yield (where, record) of a file, and move the progress bar by the bytes that were read of it."""
    before = bar.n
    with open(path, "rb") as raw:
        for where, record in read_file(path, raw, cfg.txt_document):
            bar.update(max(0, before + raw.tell() - bar.n))
            for item in unfold(record, cfg.kind):
                yield where, item
    bar.update(before + os.path.getsize(path) - bar.n)


def note_skip(skip, where, counts):
    """Count the reason, and show where to look for the first three of each."""
    if isinstance(skip, Drop):
        counts["dropped", skip.reason] += 1
        return
    counts["skipped", skip.reason] += 1
    counts["noticed", "bytes not read"] += skip.lost
    if counts["skipped", skip.reason] <= 3:
        tqdm.write(f"skipped {where}: {skip}"[:600], file=sys.stderr)


def read_names(cfg, setting, known):
    """[("a", "b"), …] of a setting like "a:b,c:d"; the first names must be known ones."""
    value = getattr(cfg, setting)
    pairs = []
    for item in filter(None, value.split(",")):
        name, _, meaning = item.strip().partition(":")
        check(name in known and meaning, f"--{setting}={value}: wanted NAME:VALUE,NAME:VALUE, where NAME is one of "
              f"{', '.join(sorted(known))}")
        if setting == "repeat":
            check(meaning.isdecimal() and 0 < int(meaning) < 256, f"--repeat={value}: wanted {name}:1 to {name}:255")
            meaning = int(meaning)
        pairs.append((name, meaning))
    return pairs


# ---------------------------------------------------------------------------- all documents in one file


def write_documents(documents, folder, seed):
    """Append all documents to one file in `folder`. Return an array of ROW, one for each."""
    def rows():
        for document, split, times in documents:
            f.write(document)
            digest = hashlib.blake2b(document, digest_size=8, key=str(seed).encode()).digest()
            yield int.from_bytes(digest, "big"), f.tell(), split, times

    with open(os.path.join(folder, "documents"), "wb") as f:
        table = np.fromiter(rows(), ROW)
    with open(os.path.join(folder, "documents.ends"), "wb") as f:
        f.write(table["end"].tobytes())  # tofile() does not say that the disk is full
    return table


class Documents:
    """What write_documents() wrote: documents[i] is the text of document i, from len(documents) on of copies."""

    def __init__(self, folder):
        self.file = open(os.path.join(folder, "documents"), "rb")
        self.ends = np.memmap(os.path.join(folder, "documents.ends"), "i8", mode="r")

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, number):
        i = number % len(self)
        begin = self.ends[i - 1] if i else 0
        self.file.seek(begin)
        return self.file.read(self.ends[i] - begin).decode()


# ---------------------------------------------------------------------------- order and splits

ODD = 0x9E3779B97F4A7C15  # hashes times an odd number are hashes again


def divide(table, val_fraction):
    """Return {"train": numbers, "val": numbers}: which document comes when. One that is repeated stands there again as
    number + n, number + 2 n, … of n documents."""
    # In the order of their hashes documents are shuffled, and equal ones stand side by side: the first is kept. Where
    # they ask for different things, the split that is held out wins, and the highest repetition.
    order = np.argsort(table["hash"])
    hashes = table["hash"][order]
    first = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
    asked = np.maximum.reduceat(table["split"][order], first)
    times = np.maximum.reduceat(table["times"][order], first)
    hashes = hashes[first]
    order = order[first]

    # The end of this order is held out; of a small set at least one document.
    free = asked == ANY
    held_out = free & (hashes >= int((1 - val_fraction) * 2**64))
    held_out |= asked == VAL
    if val_fraction and free.any() and not held_out.any():
        held_out[np.flatnonzero(free)[-1]] = True

    # The copies of a training document get hashes of their own, so they lie anywhere in the order.
    train = [order[~held_out]]
    keys = [hashes[~held_out]]
    for copy in range(1, times.max()):
        again = ~held_out & (times > copy)
        train.append(order[again] + copy * len(table))
        keys.append(hashes[again] * np.uint64(ODD**copy % 2**64))
    by_key = np.argsort(np.concatenate(keys))
    return {"train": np.concatenate(train)[by_key], "val": order[held_out]}


def cut_in_two(folder, val_fraction):
    """Cut all documents, which are a single text such as a novel, by position, and with it one document in two. Return
    {"train": numbers, "val": numbers}."""
    path = os.path.join(folder, "documents")
    size = os.path.getsize(path)
    # of a short one more than val_fraction: a few hundred characters are the least to measure a loss on
    wanted = int(max(val_fraction * size, min(size / 10, 3000), 4))
    with open(path, "rb") as f:
        f.seek(max(size - wanted, 0))
        text = f.read().lstrip(bytes(range(0x80, 0xC0)))  # not from within a character
    ends = np.fromfile(path + ".ends", "i8")
    i = np.searchsorted(ends, size - len(text), side="right")
    ends = np.insert(ends, i, size - len(text))
    with open(path + ".ends", "wb") as f:
        f.write(ends.tobytes())
    numbers = np.arange(len(ends))
    numbers[i + 1] += len(ends)  # counts as a copy: it is no record of its own
    return {"train": numbers[:i + 1], "val": numbers[i + 1:]}
