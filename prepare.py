"""
Raw files, or a named recipe, to a folder of tokens that the stages open with memmap.

    python prepare.py poems                                            # a recipe of recipes/poems.py
    python prepare.py my_data --input=corpus/                          # pretraining text, trains a tokenizer
    python prepare.py my_sft --input=chat.jsonl --kind=sft --tokenizer=data/my_data
    python prepare.py my_sft --show=5                                  # look at a folder: learned tokens are green
    python prepare.py stories --input=data00.json --fields=text:story  # say which field is which

in:  .txt .jsonl .json .csv .parquet, plain or compressed (recipes/records.py); every record's schema is told by the
     names of its fields (recipes/schemas.py)
out: data/<name>/{train,val}.{bin,mask,idx,group}  meta.json  tokenizer.model

Two passes. The first reads and cleans all documents into one temporary file (recipes/documents.py), and keeps 18 bytes
of each in memory: its hash (BLAKE2 with the seed as its key), where it ends, what it asks for. In the order of the
hashes documents are shuffled, copies stand side by side, and the end is the validation split. The second pass tokenizes
them in that order on all cores. So memory does not grow with the text, and neither the order of the files nor the
number of workers changes the result.
"""
import array
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from typing import Literal

from configurator import Count, Share, Whole, changed, check, run

import numpy as np
from tqdm import tqdm

from recipes.documents import Account, Documents, cut_in_two, divide, read_documents, write_documents
from recipes.records import find_files
from recipes.report import peak_memory, report, show
from tokenizer import is_learned, load_tokenizer, render_chat, train_tokenizer


@dataclasses.dataclass
class Config:
    name: str = ""  # the folder data/<name> to write; without --input, the recipe of that name
    # input
    input: str = ""  # a file, or a folder that is searched for files
    kind: Literal["text", "sft", "pairs", "prompts"] = "text"  # sft: conversations; pairs: ranked answers; prompts: PPO
    fields: str = ""  # our names for fields of the records: "text:story" or "question:ask,answer:reply"
    txt_document: Literal["blank", "line", "file"] = "blank"  # where a document of a .txt ends: blank line, line, file
    repeat: str = ""  # "dialogues:4,recitals:2": train on the documents of these files (without ending) that often
    poetry: str = ""  # recipes: the chinese-poetry tgz or checkout, where npm is missing
    # cleaning
    min_length: Whole = 5  # characters, texts only; shorter ones are dropped
    max_length: Count = 1024  # tokens, all but texts; longer conversations are cut after an answer
    near_duplicates: Share = 0.0  # drop what shares so much with an earlier one; 0: off (recipes/near_duplicates.py)
    max_skipped: Share = 0.05  # share of unusable records, unread bytes or unknown tokens above which the run stops
    # split
    val_fraction: Share = 0.005  # of the documents; a record's own "split": "train" or "val" comes first
    seed: int = 1337
    # tokenizer
    tokenizer: str = ""  # a vocabulary file or data folder; empty: train one on this text
    vocab_size: Count = 16384  # of a trained one
    max_piece_length: Count = 16  # characters in a token, at most; 1: every character is a token
    # running
    workers: Whole = 0  # processes, 0: one a core
    show: Whole = 0  # examples to print at the end (0: three); alone, those of an existing folder


DATA = "data"
CHUNK_BYTES = 4_000_000  # of text that a worker tokenizes at a time
FILES = {
    "text": ("bin",),
    "sft": ("bin", "mask", "idx"),
    "pairs": ("bin", "mask", "idx", "group"),
    "prompts": ("bin", "idx"),
}
COUNTS = ("documents", "tokens", "learned", "bytes", "characters", "groups")  # of a split, in meta.json


# ---------------------------------------------------------------------------- documents to tokens


def render(tok, kind, document, max_length, counts):
    """Rows (ids, mask, the text that counts as content) of one document; none where it does not fit."""
    if kind == "text":
        # however long it is: pretraining goes on with it in its next rows
        ids = tok.encode(document)
        ids.append(tok.eot_id)
        return [(ids, [], document)]
    rows = []
    content = json.loads(document)
    if kind == "prompts":
        ids, mask = render_chat(tok, content, add_generation_prompt=True)
        words = "".join(m["content"] for m in content)
        rows.append((ids, mask, words))
    elif kind == "sft":
        ids, mask = render_chat(tok, content)
        if len(ids) > max_length:
            # cut it behind the last learned answer that fits, and the line break after <|im_end|>
            is_end = np.array(ids) == tok.im_end_id
            is_end &= np.array(mask, bool)
            ends = np.flatnonzero(is_end) + 1 + len(tok.encode("\n"))
            end = max(ends[ends <= max_length], default=0)
            ids = ids[:end]
            mask = mask[:end]
            content = content[:ids.count(tok.im_start_id)]
            counts["cut", "after an answer"] += bool(ids)
        words = "".join(m["content"] for m in content if is_learned(m))
        rows.append((ids, mask, words))
    else:
        # every answer is a row of its own; earlier answers in the prompt are not judged
        prompt = content["prompt"]
        head = len(render_chat(tok, prompt, add_generation_prompt=True)[0])
        for answer in content["answers"]:
            message = {"role": "assistant", "content": answer}
            ids, mask = render_chat(tok, [*prompt, message])
            mask[:head] = [0] * head
            rows.append((ids, mask, answer))

    fitting = [row for row in rows if 0 < len(row[0]) <= max_length]
    if kind == "pairs":
        counts["cut", "answers too long"] += len(rows) - len(fitting)
        if len(fitting) < 2:
            counts["dropped", "fewer than two ranked answers"] += 1
            return []
    elif not fitting:
        counts["dropped", "too long"] += 1
    return fitting


worker = {}  # what every process of the pool needs, set by start_worker()


def start_worker(cfg, folder):
    worker["cfg"] = cfg
    worker["tok"] = load_tokenizer(folder)
    worker["documents"] = Documents(folder)
    parent = multiprocessing.parent_process()
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
        # a killed parent cannot stop its workers, and they would wait for work for ever
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize(chunk):
    """Return (split, {file: array}, counts) of some documents; offsets and group numbers begin at 0."""
    split, numbers = chunk
    cfg = worker["cfg"]
    tok = worker["tok"]
    documents = worker["documents"]
    counts = collections.Counter()
    out = {
        "bin": array.array(id_type(tok)),
        "mask": array.array("B"),
        "idx": array.array("q"),
        "group": array.array("i"),
    }
    for number in numbers:
        found = collections.Counter()
        rows = render(tok, cfg.kind, documents[number], cfg.max_length, found)
        # a copy is no record of its own
        if number < len(documents):
            counts.update(found)
            counts["kept"] += bool(rows)
        # what the files will hold: one row after another, where each ends, and which rows belong together
        for ids, mask, text in rows:
            out["bin"].extend(ids)  # raises where an id does not fit
            out["mask"].extend(mask)
            out["idx"].append(len(out["bin"]))
            out["group"].append(counts["groups"])
            counts["bytes"] += len(text.encode())
            counts["characters"] += len(text)
            counts["noticed", "unknown tokens"] += ids.count(tok.unk_id)
        counts["groups"] += bool(rows)
    counts["documents"] = len(out["idx"])
    counts["tokens"] = len(out["bin"])
    counts["learned"] = sum(out["mask"])
    return split, out, counts


def id_type(tok):
    """Ids of a vocabulary as an array of 2 or 4 bytes each."""
    return "H" if tok.vocab_size <= 65_536 else "I"


def on_all_cores(chunks, workers, cfg, folder):
    """Yield tokenize(chunk) of all chunks, in order."""
    if workers == 1:
        start_worker(cfg, folder)
        yield from map(tokenize, chunks)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, start_worker, (cfg, folder)) as pool:
        # a few at a time, so that their tokens do not pile up in memory
        while batch := list(itertools.islice(chunks, 4 * workers)):
            yield from pool.map(tokenize, batch)


def chunks_of(numbers, documents):
    """Yield (split, numbers of documents) for about CHUNK_BYTES of text at a time."""
    ends = documents.ends
    for split in numbers:
        for block in np.array_split(numbers[split], 1 + len(numbers[split]) // 100_000):
            i = block % len(ends)
            sizes = ends[i] - np.where(i > 0, ends[i - 1], 0)
            borders = np.flatnonzero(np.diff(sizes.cumsum() // CHUNK_BYTES)) + 1
            for part in np.split(block, borders):
                yield split, part


def write_tokens(numbers, cfg, folder):
    """Tokenize both splits and write their files. Return {split: counts}."""
    for split in numbers:
        for name in FILES[cfg.kind]:
            with open(os.path.join(folder, f"{split}.{name}"), "wb") as f:
                f.write(bytes(8 * (name == "idx")))  # offsets begin with a 0
    documents = Documents(folder)
    n_chunks = 1 + int(documents.ends[-1]) // CHUNK_BYTES  # about
    workers = min(cfg.workers or os.cpu_count(), n_chunks)
    results = on_all_cores(chunks_of(numbers, documents), workers, cfg, folder)
    totals = {split: collections.Counter() for split in numbers}
    for split, out, counts in tqdm(results, "tokenize", n_chunks, unit="chunk", disable=None):
        # a chunk counts its tokens and groups from 0: go on where the one before ended
        total = totals[split]
        out["idx"] = np.asarray(out["idx"]) + total["tokens"]
        out["group"] = np.asarray(out["group"]) + np.int32(total["groups"])
        for name in FILES[cfg.kind]:
            with open(os.path.join(folder, f"{split}.{name}"), "ab") as f:
                f.write(out[name].tobytes())
        total.update(counts)
        unknown = total["noticed", "unknown tokens"]
        check(unknown <= cfg.max_skipped * total["tokens"], f"{unknown:,} of {total['tokens']:,} tokens stand for "
              f"characters that --tokenizer={cfg.tokenizer} does not know, and it has no bytes to spell them in. Use "
              "another one, or none: then one is trained. --max_skipped=1 goes on")
    return totals


# ---------------------------------------------------------------------------- the whole run


def prepare(cfg):
    """Write data/<name>: built beside it as data/<name>.tmp, renamed when whole. Returns the folder."""
    check(re.fullmatch(r"[\w.-]*\w", cfg.name), f"the name {cfg.name!r} cannot be that of a folder in {DATA}/: use "
          "letters, digits, - and _")
    check(cfg.kind == "text" or cfg.tokenizer, f"--kind={cfg.kind} needs the tokenizer of the model it is for: "
          f"--tokenizer={DATA}/<its data>")
    folder = os.path.join(DATA, cfg.name)
    clear_leftovers(folder)
    try:
        os.makedirs(folder + ".tmp")
        build(cfg, folder + ".tmp")
        if os.path.exists(folder):
            os.rename(folder, folder + ".old")
        os.rename(folder + ".tmp", folder)
    finally:
        clear_leftovers(folder)
    return folder


def clear_leftovers(folder):
    """Whatever moment a run was killed at, afterwards there is the old folder, or the new one, or none."""
    if os.path.exists(folder + ".old") and not os.path.exists(folder):
        os.rename(folder + ".old", folder)
    for leftover in (folder + ".old", folder + ".tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    check(not os.path.exists(folder) or os.path.exists(os.path.join(folder, "meta.json")),
          f"{folder} exists and was not made by prepare.py, so it is not replaced: choose another name")


def read_all(cfg, account, folder):
    """First pass: write all documents into one file; return their numbers in order, {"train": …, "val": …}."""
    table = write_documents(read_documents(cfg, account), folder, cfg.seed)
    account.verify(cfg, len(table))
    # one text, such as a novel, is not to be learned or held out as a whole
    is_single = len(table) <= account.counts["parts"] + 1 and not table["split"].any()
    if is_single and cfg.kind == "text" and cfg.val_fraction:
        return cut_in_two(folder, cfg.val_fraction)
    numbers = divide(table, cfg.val_fraction)
    account.add_order(numbers, len(table))
    return numbers


def build(cfg, folder):
    """Write all files of a data set into `folder`."""
    began = time.time()
    account = Account(find_files(cfg.input))
    path = os.path.join(folder, "tokenizer.model")
    if cfg.tokenizer:
        tok = load_tokenizer(cfg.tokenizer)
        tok.save(path)
        sample = "a\n\n  b"
        if tok.decode(tok.encode(sample)) != sample:
            print(f"note: --tokenizer={cfg.tokenizer} changes line breaks or spaces, {sample!r} to "
                  f"{tok.decode(tok.encode(sample))!r}")

    # first pass: all documents in one file, in which order, and the vocabulary
    numbers = read_all(cfg, account, folder)
    if not cfg.tokenizer:
        print("training the tokenizer", flush=True)
        documents = Documents(folder)
        texts = (documents[number] for number in numbers["train"])
        train_tokenizer(texts, path, cfg.vocab_size, max_piece_length=cfg.max_piece_length)

    # second pass: tokens
    totals = write_tokens(numbers, cfg, folder)
    account.add_splits(totals)
    os.remove(os.path.join(folder, "documents"))
    os.remove(os.path.join(folder, "documents.ends"))

    # what there is to know about it
    tok = load_tokenizer(folder)
    meta = {
        "name": cfg.name,
        "kind": cfg.kind,
        "dtype": np.dtype(id_type(tok)).name,
        "vocab_size": tok.vocab_size,
        "fingerprint": tok.fingerprint,
        "tokenizer": "tokenizer.model",
    }
    for split in totals:
        meta[split] = {name: totals[split][name] for name in COUNTS}
    meta.update(account.summary())
    meta["config"] = dataclasses.asdict(cfg)
    meta["seconds"] = round(time.time() - began, 1)
    meta["memory"] = peak_memory()
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as f:
        json.dump(meta, f, ensure_ascii=False, indent=1)


def main(cfg):
    check(cfg.name, "which data set? python prepare.py NAME --input=FILE_OR_FOLDER, or a recipe's name (--help)")
    folder = os.path.join(DATA, cfg.name)
    if cfg.show and not cfg.input and os.path.exists(os.path.join(folder, "meta.json")):
        show(folder, cfg.show)
        return
    if not cfg.input:
        from recipes.poems import RECIPES  # only here, as it needs more packages
        check(cfg.name in RECIPES, f"no --input given, and no recipe is named {cfg.name!r} (but {', '.join(RECIPES)}). "
              f"Your own data: python prepare.py {cfg.name} --input=FILE_OR_FOLDER")
        recipe = RECIPES[cfg.name]
        unset = {name: value for name, value in recipe.defaults.items() if name not in changed(cfg)}
        written = recipe.write(os.path.join(DATA, "raw"), {"poetry": cfg.poetry})
        cfg = dataclasses.replace(cfg, kind=recipe.kind, input=written, **unset)
    report(prepare(cfg))
    show(folder, cfg.show or 3)


if __name__ == "__main__":
    run(main, Config, positional="name")
