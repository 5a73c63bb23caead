"""
Read data: a folder made by prepare.py, mapped into memory, and the order in which a run reads its rows.

    train, val, meta = open_data("data/poems", "text")
    train.tokens[1000:1512]                  plain text is one long array of tokens
    train.document(7)                        (ids, mask): a conversation, an answer, a prompt
    shuffled(n, first, count, seed)          entries first ... of an endless shuffle of 0 ... n - 1
    shift(*pad(documents, pad_id, device))   documents as a batch: inputs, targets, mask
"""
import functools
import json
import os
from dataclasses import dataclass

import numpy as np
import torch

from configurator import check

# The files of a data folder, {train,val}.NAME, by the kind of data:
# bin    token ids, uint16 (uint32 when the vocabulary exceeds 65,536)
# mask   uint8 a token: 1 where it counts in the loss
# idx    int64 offsets, documents + 1: document i is tokens idx[i] ... idx[i + 1] - 1
# group  int32 a document: completions of one prompt share it, best first
FILES = {
    "text": ("bin",),
    "sft": ("bin", "mask", "idx"),
    "pairs": ("bin", "mask", "idx", "group"),
    "prompts": ("bin", "idx")}


@dataclass(eq=False)
class Split:
    """One split of a data folder. An array whose file this kind of data does not have is None."""
    tokens: np.ndarray  # memory-mapped .bin
    mask: np.ndarray    # .mask
    idx: np.ndarray     # .idx
    group: np.ndarray   # .group
    meta: dict          # the split's entry in meta.json: its numbers of tokens, documents, bytes, …

    def __len__(self):
        return len(self.idx) - 1

    def document(self, i):
        """Return (ids, mask) of document i, int64 and uint8; mask is None for prompts and pieces of a text."""
        part = slice(self.idx[i], self.idx[i + 1])
        mask = None if self.mask is None else self.mask[part]
        return self.tokens[part].astype(np.int64), mask

    @functools.cache
    def prompt_bounds(self):
        """Return offsets (prompts + 1): prompt p owns documents bounds[p] … bounds[p + 1] - 1, the best one first."""
        # a prompt's documents stand together: the next one begins where the number of the group changes
        change = np.diff(self.group, prepend=-1)
        first_of_prompt = np.flatnonzero(change)
        return np.append(first_of_prompt, len(self))


def open_data(folder, kind=None, fingerprint=None):
    """Return (train, val, meta). Exits when the folder is missing, of another kind, cut short, or made with another
    tokenizer than `fingerprint`."""
    path = os.path.join(folder, "meta.json")
    name = os.path.basename(os.path.normpath(folder))
    check(os.path.isfile(path), f"no data in '{folder}'. Make some: python prepare.py {name} --input=FILE_OR_FOLDER "
          f"--kind={kind or 'text'}; or that of the poems: python prepare.py poems (-sft, -pairs, -prompts)")
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        own_kind = meta["kind"]
        own_fingerprint = meta["fingerprint"]
        dtype = np.dtype(meta["dtype"])
        splits = [map_split(folder, split, own_kind, dtype, meta[split]) for split in ("train", "val")]
    except (ValueError, KeyError, TypeError) as error:
        check(False, f"{path} is damaged ({type(error).__name__}: {error}). Prepare the folder again")
    check(kind in (None, own_kind), f"'{folder}' holds data of kind {own_kind}, this stage reads {kind}")
    check(fingerprint in (None, own_fingerprint),
          f"'{folder}' was made with tokenizer {own_fingerprint[:12]}, the model was trained with another one, "
          f"{str(fingerprint)[:12]}. Prepare the data again with --tokenizer=<the model's folder>/tokenizer.model")
    return splits[0], splits[1], meta


def map_split(folder, split, kind, id_type, meta):
    """Return the Split whose files lie in folder; exits where one is missing or of another size than meta says."""
    # {file: (dtype, number of entries)}
    layout = {
        "bin": (id_type, meta["tokens"]),
        "mask": (np.dtype(np.uint8), meta["tokens"]),
        "idx": (np.dtype(np.int64), meta["documents"] + 1),
        "group": (np.dtype(np.int32), meta["documents"])}
    arrays = dict.fromkeys(layout)
    for name in FILES[kind]:
        dtype, length = layout[name]
        path = os.path.join(folder, f"{split}.{name}")
        check(os.path.exists(path), f"{path} is missing. Prepare the folder again")
        size = os.path.getsize(path)
        expected = length * dtype.itemsize
        check(size == expected, f"{path} has {size:,} bytes, meta.json says {expected:,}. Prepare the folder again")
        arrays[name] = np.zeros(0, dtype)  # an empty file cannot be mapped
        if length:
            arrays[name] = np.memmap(path, dtype.newbyteorder("<"), mode="r")
    return Split(arrays["bin"], arrays["mask"], arrays["idx"], arrays["group"], meta)


# ---------------------------------------------------------------------------- order


@functools.lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def shuffled(n, first, count, seed):
    """Return `count` entries, from `first` on, of an endless sequence: 0 to n - 1, in a new order each epoch.

    It depends on nothing that ran before, so a run can go on from any step, and any process can ask for any part.
    """
    entries = np.empty(count, dtype=np.int64)
    for i in range(count):
        epoch, place = divmod(first + i, n)
        entries[i] = permutation(n, seed, epoch)[place]
    return entries


# ---------------------------------------------------------------------------- batches


def pad(documents, pad_id, device="cpu"):
    """Right-pad documents [(ids, mask), …] to the longest; return ids and mask, (B, T) each. ■ is pad_id:

    In causal attention a token sees only earlier ones, so never the padding at a row's end: no mask is needed for that.

        ids   床 前 明 月 光 ■ ■          mask   0 0 1 1 1 0 0
              举 头 望 明 月 思 乡               0 0 0 1 1 1 1
    """
    T = max(len(ids) for ids, _ in documents)
    shape = (len(documents), T)
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.float32)
    for row, (document, learned) in enumerate(documents):
        ids[row, :len(document)] = document
        mask[row, :len(document)] = learned
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def shift(ids, mask):
    """Return inputs, targets and the targets' mask, (B, T - 1) each: what follows a token is its target.

        ids       床 前 明 月 光
        inputs    床 前 明 月            the last token predicts nothing,
        targets      前 明 月 光         and nothing predicts the first
    """
    return ids[:, :-1], ids[:, 1:], mask[:, 1:]


def get_prompts(split, prompts, pad_id, device):
    """All answers to some prompts: (ids, mask) of pad(), each (R, T), and the number of answers to each prompt."""
    bounds = split.prompt_bounds()
    documents = []
    sizes = []
    for p in prompts:
        documents += [split.document(i) for i in range(bounds[p], bounds[p + 1])]
        sizes.append(int(bounds[p + 1] - bounds[p]))
    return pad(documents, pad_id, device), sizes


def open_pairs(folder, fingerprint, max_seq_len):
    """Open a folder of ranked answers; return (train, val, meta). Exits when the model cannot use all of it."""
    train, val, meta = open_data(folder, "pairs", fingerprint)
    for split in (train, val):
        fewest = np.diff(split.prompt_bounds()).min(initial=2)
        longest = np.diff(split.idx).max(initial=0)
        check(fewest >= 2 and longest <= max_seq_len,
              f"{folder} has a prompt with {fewest} answers (wanted: 2 or more) or a document of {longest} tokens (the "
              f"model sees {max_seq_len}). Prepare it again with --max_length={max_seq_len}")
    check(len(train), f"{folder} has no prompts to train on")
    return train, val, meta
