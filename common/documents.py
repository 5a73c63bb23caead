"""
The documents of a data set between the two passes of prepare.py: clean them, write them into one file, order them.

    table = write_documents(documents, folder, seed)     # one row of 26 bytes for each document
    numbers = divide(table, 0.005)                       # {"train": …, "val": …}: which documents, in which order
    Documents(folder)[7]                                 # the text of document 7
"""
import hashlib
import os
import re
import unicodedata

import numpy as np

# What memory keeps of a document.
ROW = np.dtype([
    ("hash", "u8"),      # BLAKE2 of its bytes: a number that looks random; another seed gives other numbers
    ("question", "u8"),  # the hash of the question that it answers; for a text the same as "hash"
    ("end", "i8"),       # where it ends in the file of all documents
    ("split", "u1"),     # the split that its record or file names, as a number of SPLITS
    ("times", "u1"),     # how often to train on it
])
SPLITS = {None: 0, "train": 1, "val": 2}
ODD = 0x9E3779B97F4A7C15  # an odd number: modulo 2**64, hashes times it are all different again, and look as random

LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\ufeff\ufffe\uffff\ud800-\udfff]")
BLANK_LINES = re.compile("\n{3,}")


def clean(text):
    """Return a text in NFC (accents composed), its lines ended by \\n, without control characters or spaces before \\n,
    and with at most one blank line in a row. Full-width punctuation stays: it is how Chinese is written."""
    text = LINE_ENDS.sub("\n", text)
    text = CONTROLS.sub("", text)
    text = unicodedata.normalize("NFC", text)
    lines = [line.rstrip() for line in text.split("\n")]
    text = BLANK_LINES.sub("\n\n", "\n".join(lines))
    return text.strip("\n")


def write_documents(documents, folder, seed):
    """Write all documents (bytes, question, split, how often), one after the other, to one file in `folder`. Return an
    array of ROW, one for each."""
    key = str(seed).encode()

    def hashed(data):
        digest = hashlib.blake2b(data, digest_size=8, key=key).digest()
        return int.from_bytes(digest, "big")

    def rows():
        for document, question, split, times in documents:
            f.write(document)
            yield hashed(document), hashed(question), f.tell(), SPLITS[split], times

    with open(os.path.join(folder, "documents"), "wb") as f:
        table = np.fromiter(rows(), ROW)
    with open(os.path.join(folder, "documents.ends"), "wb") as f:
        f.write(table["end"].tobytes())  # tofile() does not say that the disk is full
    return table


class Documents:
    """Read what write_documents() wrote: documents[i] is the text of document i. Of n documents, i + n, i + 2 n, … are
    copies of document i (see divide), and give the same text."""

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


def divide(table, val_fraction):
    """Return {"train": numbers, "val": numbers}: the numbers of the documents, in the order in which they are written.
    Of n documents, number i to be repeated is there again as i + n, i + 2 n, …"""
    # Sort by hash: this shuffles documents, and equal ones become neighbours. Keep the first of equal ones. If these
    # name different splits, val wins (2 is the largest number of SPLITS); of different repetitions the largest.
    order = np.argsort(table["hash"])
    table = table[order]
    is_new = np.diff(table["hash"], prepend=~table["hash"][0]) != 0
    first = np.flatnonzero(is_new)
    asked = np.maximum.reduceat(table["split"], first)
    times = np.maximum.reduceat(table["times"], first)
    hashes = table["hash"][first]
    order = order[first]

    # Hold out, with all other answers to its question: what names val, and the questions with the largest hashes (for
    # texts that is the end of the order). But not a question that very many documents ask: that would be too much.
    is_free = asked == SPLITS[None]  # names no split
    held_out = asked == SPLITS["val"]
    questions, group, sizes = np.unique(table["question"][first], return_inverse=True, return_counts=True)
    held_out |= is_free & np.isin(group, group[held_out])
    border = int((1 - val_fraction) * 2**64)
    is_small = sizes <= max(1, val_fraction * len(group))  # (questions)
    held_out |= is_free & ((questions >= border) & is_small)[group]
    if val_fraction and is_free.any() and not held_out.any():
        # a small set: hold out at least one question, or one document if that question had more than half of all
        held_out = is_free & (group == group[is_free].max())
        if held_out.sum() * 2 > len(held_out):
            held_out[:] = False
            held_out[np.flatnonzero(is_free)[-1]] = True

    # A copy of a training document gets another hash, and so another place in the order.
    train = [order[~held_out]]
    keys = [hashes[~held_out]]
    for copy in range(1, times.max()):
        again = ~held_out & (times > copy)
        factor = np.uint64(ODD**copy % 2**64)
        train.append(order[again] + copy * len(table))
        keys.append(hashes[again] * factor)
    by_key = np.argsort(np.concatenate(keys))
    numbers = np.concatenate(train)
    return {"train": numbers[by_key], "val": order[held_out]}


def cut_in_two(folder, val_fraction):
    """Split a single text (a novel, perhaps in several parts): train on its beginning, hold out its end. The part
    in which the border lies becomes two. Return {"train": numbers, "val": numbers}."""
    path = os.path.join(folder, "documents")
    size = os.path.getsize(path)
    # bytes to hold out; more than val_fraction of a short text: a loss needs at least a few hundred characters
    wanted = int(max(val_fraction * size, min(size / 10, 3000), 4))
    with open(path, "rb") as f:
        f.seek(max(size - wanted, 0))
        text = f.read().lstrip(bytes(range(0x80, 0xC0)))  # begin at a whole character: in UTF-8 these go on with one
    middle = size - len(text)
    ends = np.fromfile(path + ".ends", "i8")
    i = np.searchsorted(ends, middle, side="right")
    ends = np.insert(ends, i, middle)
    with open(path + ".ends", "wb") as f:
        f.write(ends.tobytes())
    numbers = np.arange(len(ends))
    numbers[i + 1] += len(ends)  # the second half: written as a copy is, so that it is not counted as another record
    return {"train": numbers[:i + 1], "val": numbers[i + 1:]}
