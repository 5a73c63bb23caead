"""
The documents of a data set between the two passes of prepare.py: cleaned, all in one file, and put in order.

    table = write_documents(documents, folder, seed)     # one row a document: 26 bytes
    numbers = divide(table, 0.005)                       # {"train": …, "val": …}: which documents, in which order
    Documents(folder)[7]                                 # the text of document 7
"""
import hashlib
import os
import re
import unicodedata

import numpy as np

# What is kept of a document in memory.
ROW = np.dtype([
    ("hash", "u8"),      # BLAKE2 of its bytes, with the seed as the key
    ("question", "u8"),  # that of the question it answers; of a text, hash again
    ("end", "i8"),       # where it ends in the file of all documents
    ("split", "u1"),     # the one it asks for
    ("times", "u1"),     # how often to train on it
])
SPLITS = {None: 0, "train": 1, "val": 2}
ODD = 0x9E3779B97F4A7C15  # hashes times an odd number are hashes again

LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\ufeff\ufffe\uffff\ud800-\udfff]")
BLANK_LINES = re.compile("\n{3,}")


def clean(text):
    """NFC, line ends as \\n, no control characters, no spaces at line ends, at most one blank line in a row.
    Punctuation stays as it is: full-width forms are how Chinese is written."""
    text = LINE_ENDS.sub("\n", text)
    text = CONTROLS.sub("", text)
    text = unicodedata.normalize("NFC", text)
    lines = [line.rstrip() for line in text.split("\n")]
    text = BLANK_LINES.sub("\n\n", "\n".join(lines))
    return text.strip("\n")


def write_documents(documents, folder, seed):
    """Append all documents (bytes, question, split, how often) to one file in `folder`. Return an array of ROW, one for
    each."""
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


def divide(table, val_fraction):
    """Return {"train": numbers, "val": numbers}: which document comes when. One that is repeated stands there again as
    number + n, number + 2 n, … of n documents."""
    # In the order of their hashes documents are shuffled, and equal ones stand side by side: the first is kept. Where
    # they ask for different things, the split that is held out wins, and the highest repetition.
    order = np.argsort(table["hash"])
    table = table[order]
    is_new = np.diff(table["hash"], prepend=~table["hash"][0]) != 0
    first = np.flatnonzero(is_new)
    asked = np.maximum.reduceat(table["split"], first)
    times = np.maximum.reduceat(table["times"], first)
    hashes = table["hash"][first]
    order = order[first]

    # Held out is what asks for it, with all that answers the same question, and those questions whose hashes are the
    # largest (of a text that is its own hash, so the end of the order). A question that half of all documents ask would
    # hold out too much.
    is_free = asked == SPLITS[None]
    held_out = asked == SPLITS["val"]
    questions, group, sizes = np.unique(table["question"][first], return_inverse=True, return_counts=True)
    held_out |= is_free & np.isin(group, group[held_out])
    border = int((1 - val_fraction) * 2**64)
    is_small = sizes <= max(1, val_fraction * len(group))
    held_out |= is_free & ((questions >= border) & is_small)[group]
    if val_fraction and is_free.any() and not held_out.any():
        # of a small set at least one question, or one document where there is but one question
        held_out = is_free & (group == group[is_free].max())
        if held_out.sum() * 2 > len(held_out):
            held_out[:] = False
            held_out[np.flatnonzero(is_free)[-1]] = True

    # The copies of a training document get hashes of their own, so they lie anywhere in the order.
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
    """Cut all documents, which are a single text such as a novel, by position, and with it one document in two. Return
    {"train": numbers, "val": numbers}."""
    path = os.path.join(folder, "documents")
    size = os.path.getsize(path)
    # of a short one more than val_fraction: a few hundred characters are the least to measure a loss on
    wanted = int(max(val_fraction * size, min(size / 10, 3000), 4))
    with open(path, "rb") as f:
        f.seek(max(size - wanted, 0))
        text = f.read().lstrip(bytes(range(0x80, 0xC0)))  # not from within a character
    middle = size - len(text)
    ends = np.fromfile(path + ".ends", "i8")
    i = np.searchsorted(ends, middle, side="right")
    ends = np.insert(ends, i, middle)
    with open(path + ".ends", "wb") as f:
        f.write(ends.tobytes())
    numbers = np.arange(len(ends))
    numbers[i + 1] += len(ends)  # counts as a copy: it is no record of its own
    return {"train": numbers[:i + 1], "val": numbers[i + 1:]}
