"""
Files of token ids, *.bin: uint16 or uint32, one text after another, as nanoGPT, llm.c, llama2.c and baby-llama2-chinese
write them. They become train.bin and val.bin without being held in memory.

What ends (or opens) a text there is told by the vocabulary: </s>, <|endoftext|> and the like become our <|endoftext|>.
There are no texts to shuffle or to compare, so the end of the last file is held out, and copies stay.
"""
import collections
import os

import numpy as np
from tqdm import tqdm

from common.rows import id_type
from configurator import check, fail

CHUNK = 1 << 23  # tokens at a time
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
STARTS = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]")
MAGIC = {20240520: "<u2", 20240801: "<u4"}  # how files of llm.c begin: 256 int32, this number first


def write_token_files(paths, cfg, tok, counts, folder):
    """Write train.bin and val.bin. Return {split: counts}."""
    check(cfg.kind == "text", f"--input={cfg.input} holds token ids, which are --kind=text")
    check(tok, f"--input={cfg.input} holds token ids: --tokenizer= must name the vocabulary that made them")
    arrays = [open_tokens(path, tok) for path in paths]
    ends = ids_of(tok, (*ENDS, tok.special_names[tok.eot_id]))
    starts = ids_of(tok, STARTS)
    sample = arrays[0][:CHUNK]
    has_ends = np.isin(ends, sample).any()
    has_starts = np.isin(starts, sample).any()
    check(has_ends or has_starts, f"nothing in {paths[0]} ends a text: wanted one of {', '.join(ENDS)} (ids "
          f"{ends.tolist()})")
    if not has_ends:
        # llama2.c opens each text and ends none: where one begins, the one before ends
        ends = starts
        starts = starts[:0]
    # ids that are chat tokens here belong to nothing in the vocabulary itself: what stands there is another's, as
    # ChatGLM2's [gMASK] and sop
    others = np.setdiff1d([tok.im_start_id, tok.im_end_id, tok.pad_id], [*ends, *starts])
    border = border_of(arrays, ends, cfg.val_fraction)
    sizes = sizes_of(tok)
    totals = {"train": collections.Counter(), "val": collections.Counter()}
    position = 0
    last = tok.eot_id
    with open(os.path.join(folder, "train.bin"), "wb") as train, open(os.path.join(folder, "val.bin"), "wb") as val:
        files = {"train": train, "val": val}

        def write(split, ids):
            n_others = int(np.isin(ids, others).sum())
            totals[split]["noticed", "control tokens of another vocabulary, left out"] += n_others
            ids = ids[~np.isin(ids, [*starts, *others])]
            ids[np.isin(ids, ends)] = tok.eot_id
            if len(ids) and ids[0] == last == tok.eot_id:
                ids = ids[1:]  # no empty text
            files[split].write(ids.tobytes())
            count(ids, tok, sizes, totals[split])
            return int(ids[-1]) if len(ids) else last

        for path, array in zip(paths, arrays):
            for first in tqdm(range(0, len(array), CHUNK), os.path.basename(path), unit="chunk", disable=None):
                chunk = array[first:first + CHUNK]
                check_ids(chunk, tok, path, first)
                chunk = chunk.astype(id_type(tok))
                cut = min(max(border - position, 0), len(chunk))
                last = write("train", chunk[:cut])
                last = write("val", chunk[cut:])
                position += len(chunk)
        if last != tok.eot_id:
            write("val" if border < position else "train", np.array([tok.eot_id], id_type(tok)))
    counts["read"] = totals["train"]["documents"] + totals["val"]["documents"]
    return totals


def open_tokens(path, tok):
    """A memmap of the ids of a file; whether they have two or four bytes is told by what they would be."""
    size = os.path.getsize(path)
    head = np.fromfile(path, "<i4", 2)
    kind = MAGIC.get(int(head[0])) if len(head) == 2 else None
    offset = 1024 if kind else 0
    if kind is None:
        ids = np.fromfile(path, "<u4", 100_000)
        kind = "<u4" if size % 4 == 0 and len(ids) and (ids < tok.vocab_size).all() else "<u2"
    n, rest = divmod(size - offset, np.dtype(kind).itemsize)
    check(n and not rest, f"{path} has {size:,} bytes, which are no whole number of {np.dtype(kind).name} ids: is it cut "
          "off?")
    return np.memmap(path, kind, "r", offset)


def ids_of(tok, names):
    return np.array([i for i, name in tok.special_names.items() if name in names], dtype=np.int64)


def border_of(arrays, ends, val_fraction):
    """How many ids are for training: up to the first end of a text in the share that is held out."""
    total = sum(map(len, arrays))
    if not val_fraction:
        return total
    wanted = max(val_fraction * total, min(total / 10, 1000))
    position = total - int(wanted)
    before = 0
    for array in arrays:
        first = position - before
        if first < len(array):
            is_end = np.isin(array[first:first + CHUNK], ends)
            places = np.flatnonzero(is_end)
            return position + int(places[0]) + 1 if len(places) else position
        before += len(array)
    return total


def check_ids(chunk, tok, path, first):
    wrong = np.flatnonzero(chunk >= tok.vocab_size)
    if len(wrong):
        i = wrong[0]
        fail(f"{path}: token {first + i:,} is {chunk[i]:,}, but the vocabulary has {tok.vocab_size:,}: were the ids made "
             "with another one?")


def sizes_of(tok):
    """(bytes, characters) that each id stands for; control tokens stand for none."""
    n_bytes = np.zeros(tok.vocab_size, np.int64)
    n_characters = np.zeros(tok.vocab_size, np.int64)
    for i, piece in tok.pieces.items():
        if i in tok.special_names:
            continue
        n_bytes[i] = len(piece)
        # bytes that begin a character
        n_characters[i] = sum(byte & 0xC0 != 0x80 for byte in piece)
    return n_bytes, n_characters


def count(ids, tok, sizes, total):
    """Add ids to the counts of a split."""
    n_documents = int((ids == tok.eot_id).sum())
    # a vocabulary that puts a space before each text has not read it there
    spaces = n_documents * tok.dummy_prefix
    total["tokens"] += len(ids)
    total["documents"] += n_documents
    total["groups"] += n_documents
    total["kept"] += n_documents
    total["bytes"] += int(sizes[0][ids].sum()) - spaces
    total["characters"] += int(sizes[1][ids].sum()) - spaces
    total["noticed", "unknown tokens"] += int((ids == tok.unk_id).sum()) if tok.unk_id is not None else 0
