"""
Raw files, or a named recipe, to a folder of tokens that the stages open with memmap.

    python prepare.py poems                                            # a recipe of recipes/poems.py
    python prepare.py my_data --input=corpus/                          # pretraining text, trains a tokenizer
    python prepare.py my_sft --input=chat.jsonl --kind=sft --tokenizer=data/my_data
    python prepare.py my_sft --show=5                                  # look at a folder: learned tokens are green

in:  .txt .jsonl .json .csv .parquet, plain, .gz or .zst; every record's schema is told by its fields (records.py)
out: data/<name>/{train,val}.{bin,mask,idx,group}  meta.json  tokenizer.model

Two passes. The first reads, cleans and hashes every document (8 bytes of BLAKE2 with the seed as its key) and drops it
into a bucket file by the top bits of the hash. The second tokenizes the buckets on all cores, each sorted by hash. That
one number is the shuffle (order by hash), the de-duplication (equal neighbours) and the split (the last val_fraction of
the order). So memory is that of a few buckets, and neither the order of the files nor the workers change the result.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import threading
import time

import numpy as np
from tqdm import tqdm

from configurator import changed, load_config
from records import CONVERTERS, Skip, find_files, read_file, until_answer
from tokenizer import load_tokenizer, render_chat, train_tokenizer


@dataclasses.dataclass
class Config:
    name: str = ""  # the folder data/<name> to write; without --input, the recipe of that name
    # input
    input: str = ""  # a file, or a folder that is searched for files
    kind: str = "text"  # text, sft (conversations), pairs (ranked answers), prompts (for PPO)
    txt_document: str = "blank"  # a document of a .txt ends at a "blank" line, at each "line", or with the "file"
    poetry: str = ""  # recipes: the chinese-poetry tgz or checkout, where npm is missing
    # cleaning
    min_length: int = 5  # characters, texts only; shorter ones are dropped
    max_length: int = 1024  # tokens, all but texts; longer conversations are cut after an answer
    max_skipped: float = 0.05  # share of unusable records above which the run stops
    # split
    val_fraction: float = 0.005  # of the documents; a record's own "split": "train" or "val" comes first
    seed: int = 1337
    # tokenizer
    tokenizer: str = ""  # a vocabulary file or data folder; empty: train one on this text
    vocab_size: int = 16384  # of a trained one
    max_piece_length: int = 16  # characters in a token, at most; 1: every character is a token
    character_coverage: float = 0.9995  # share of the text's characters that get a token, the rest is spelled in bytes
    tokenizer_characters: int = 4_000_000  # of the text, to train it on: takes about 70 bytes of memory each
    # running
    workers: int = 0  # processes, 0: one a core
    show: int = 0  # examples to print at the end (0: three); alone, those of an existing folder


DATA = "data"
BUCKET_BYTES = 4_000_000  # of text: small enough for many workers, large enough to be worth a file
HELD_BYTES = 64_000_000  # of documents on their way into the buckets
AUTO, TRAIN, VAL = 0, 1, 2  # which split a record asks for
HEADER = struct.Struct("<QBI")  # of a document in a bucket: hash, split, length


# ---------------------------------------------------------------- first pass: documents into buckets, by hash

def read_records(files, cfg):
    """Yield (where, record) of all files, under a progress bar that counts bytes of the files."""
    with tqdm(total=sum(map(os.path.getsize, files)), unit="B", unit_scale=True, desc="read", disable=None) as bar:
        done = 0
        for path in files:
            with open(path, "rb") as raw:
                for i, (where, record) in enumerate(read_file(path, raw, cfg.txt_document)):
                    if i % 64 == 63:
                        bar.update(done + raw.tell() - bar.n)
                    if cfg.kind == "text" and isinstance(record, list):  # WuDao: a list of documents; else: of messages
                        yield from ((where, item) for item in record)
                    else:
                        yield where, record
            done += os.path.getsize(path)
            bar.update(done - bar.n)


def read_documents(files, cfg, counts):
    """Yield (split, document as bytes). Counts what is read, skipped and dropped; prints the first skipped records."""
    for where, record in read_records(files, cfg):
        counts["read"] += 1
        try:
            document = to_document(record, cfg)
        except Skip as e:
            reason = e.args[0]
            counts["skipped", reason] += 1
            if counts["skipped", reason] <= 3:
                tqdm.write(f"skipped {where}: {': '.join(e.args)}"[:300], file=sys.stderr)
            continue
        if cfg.kind == "text" and len(document.decode()) < cfg.min_length:
            counts["dropped", "too short"] += 1
            continue
        asked = record.get("split") if isinstance(record, dict) else None
        yield {"train": TRAIN, "val": VAL}.get(asked, AUTO), document


def to_document(record, cfg):
    """The bytes of a cleaned record: of the text itself, or of the messages or ranked answers as JSON."""
    if isinstance(record, Skip):
        raise record
    try:
        content = CONVERTERS[cfg.kind](record)
        text = content if cfg.kind == "text" else json.dumps(content, ensure_ascii=False)
        document = text.encode()
    except UnicodeEncodeError as e:
        raise Skip("wrong encoding", f"neither UTF-8 nor GB18030: {str(record)[:60]!a}") from e
    except (AttributeError, TypeError, ValueError, KeyError) as e:  # a field holds something unheard of
        raise Skip("wrong type", f"{e} in {str(record)[:60]!r}") from e
    if not text.strip():
        raise Skip("empty", repr(record)[:60])
    return document


def fill_buckets(documents, folder, buckets, seed):
    """Append every document to the bucket file of its hash.
    Returns (number of documents, largest hash among those that ask for no split, whether any asks for val)."""
    held, size, count, largest, any_val = collections.defaultdict(bytearray), 0, 0, -1, False

    def flush():
        for bucket, data in held.items():
            with open(os.path.join(folder, f"{bucket}.documents"), "ab") as f:
                f.write(data)
        held.clear()

    for split, document in documents:
        digest = hashlib.blake2b(document, digest_size=8, key=str(seed).encode()).digest()
        key = int.from_bytes(digest, "big")
        held[key * buckets >> 64] += HEADER.pack(key, split, len(document)) + document
        size += HEADER.size + len(document)
        if size > HELD_BYTES:
            flush()
            size = 0
        count += 1
        largest = max(largest, key) if split == AUTO else largest
        any_val |= split == VAL
    flush()
    return count, largest, any_val


def read_bucket(folder, bucket):
    """({hash: (split, document)} in the order of the hash, number of duplicates) of a bucket."""
    path = os.path.join(folder, f"{bucket}.documents")
    if not os.path.exists(path):
        return {}, 0
    with open(path, "rb") as f:
        data = f.read()
    documents, position, count = {}, 0, 0
    while position < len(data):
        key, split, length = HEADER.unpack_from(data, position)
        position += HEADER.size + length
        # of two copies that ask for different splits, the one to be held out wins
        documents[key] = (max(split, documents.get(key, (AUTO,))[0]), data[position - length:position])
        count += 1
    return dict(sorted(documents.items())), count - len(documents)


def training_texts(folder, buckets, held_out_from):
    """Texts of the training split in shuffled order, for the tokenizer."""
    for bucket in range(buckets):
        for key, (split, document) in read_bucket(folder, bucket)[0].items():
            if split == TRAIN or split == AUTO and key < held_out_from:
                yield document.decode()


# ---------------------------------------------------------------- second pass: buckets into tokens

def render(tok, kind, document, max_length, counts):
    """Rows (ids, mask or None, the text that counts as content) of one document; none where it does not fit."""
    if kind == "text":
        text = document.decode()
        return [(tok.encode(text) + [tok.eot_id], None, text)]
    content = json.loads(document)
    if kind == "prompts":
        ids, _ = render_chat(tok, content, add_generation_prompt=True)
        rows = [(ids, None, "".join(m["content"] for m in content))]
    elif kind == "sft":
        messages = content
        ids, mask = render_chat(tok, messages)
        while len(ids) > max_length and (messages := until_answer(messages[:-1])):
            ids, mask = render_chat(tok, messages)
        counts["cut", "after an answer"] += 0 < len(messages) < len(content)
        rows = [(ids, mask, "".join(m["content"] for m in messages if m["role"] == "assistant"))]
    else:
        head = len(render_chat(tok, content["prompt"], add_generation_prompt=True)[0])
        rows = []
        for answer in content["answers"]:
            ids, mask = render_chat(tok, content["prompt"] + [{"role": "assistant", "content": answer}])
            rows.append((ids, [0] * head + mask[head:], answer))  # earlier answers in the prompt are not judged
        counts["cut", "tied or equal answers"] += content["tied"]
    fitting = [row for row in rows if len(row[0]) <= max_length]
    if kind == "pairs":
        counts["cut", "answers too long"] += len(rows) - len(fitting)
        if len(fitting) < 2:
            counts["dropped", "fewer than two ranked answers"] += 1
            return []
    elif not fitting:
        counts["dropped", "too long"] += 1
    return fitting


FILES = {"text": ("bin",), "sft": ("bin", "mask", "idx"), "pairs": ("bin", "mask", "idx", "group"),
         "prompts": ("bin", "idx")}
worker = {}  # what every process of the pool needs, set by start_worker()


def start_worker(cfg, folder, held_out_from, dtype):
    worker.update(cfg=cfg, folder=folder, held_out_from=held_out_from, dtype=dtype,
                  tok=load_tokenizer(os.path.join(folder, "tokenizer.model")))
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
        threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent():
    """A killed parent cannot stop its workers, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def tokenize_bucket(bucket):
    """Write the tokens of a bucket as <bucket>.<split>.<file> and return its counts."""
    cfg, tok, folder = worker["cfg"], worker["tok"], worker["folder"]
    counts = collections.Counter()
    parts = collections.defaultdict(bytearray)
    documents, counts["dropped", "duplicate"] = read_bucket(folder, bucket)
    for key, (split, document) in documents.items():
        split = "val" if split == VAL or split == AUTO and key >= worker["held_out_from"] else "train"
        rows = render(tok, cfg.kind, document, cfg.max_length, counts)
        for ids, mask, text in rows:
            parts[split, "bin"] += np.array(ids, worker["dtype"]).tobytes()  # raises where an id does not fit
            parts[split, "mask"] += bytes(mask or ())
            parts[split, "idx"] += np.int64(len(ids)).tobytes()
            parts[split, "group"] += np.int32(counts[split, "groups"]).tobytes()
            counts[split, "documents"] += 1
            counts[split, "tokens"] += len(ids)
            counts[split, "learned"] += sum(mask or ())
            counts[split, "bytes"] += len(text.encode())
            counts[split, "characters"] += len(text)
        counts[split, "groups"] += bool(rows)
    for (split, file), data in parts.items():
        if file in FILES[cfg.kind]:
            with open(os.path.join(folder, f"{bucket}.{split}.{file}"), "wb") as f:
                f.write(data)
    if documents:
        os.remove(os.path.join(folder, f"{bucket}.documents"))
    return counts


def tokenize(cfg, folder, buckets, held_out_from, dtype, counts):
    """Tokenize all buckets and join their parts in order; adds to counts."""
    start = (cfg, folder, held_out_from, dtype)
    workers = min(cfg.workers or os.cpu_count(), buckets)
    with contextlib.ExitStack() as stack:
        if workers == 1:
            start_worker(*start)
            results = map(tokenize_bucket, range(buckets))
        else:
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), start_worker, start))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(tokenize_bucket, range(buckets))
        out = {(split, file): stack.enter_context(open(os.path.join(folder, f"{split}.{file}"), "wb"))
               for split in ("train", "val") for file in FILES[cfg.kind]}
        for (split, file), f in out.items():
            if file == "idx":
                f.write(np.int64(0).tobytes())
        for bucket, found in enumerate(tqdm(results, total=buckets, desc="tokenize", unit="bucket", disable=None)):
            for (split, file), f in out.items():
                part = os.path.join(folder, f"{bucket}.{split}.{file}")
                if os.path.exists(part):
                    append(part, f, file, counts[split, "tokens"], counts[split, "groups"])
                    os.remove(part)
            counts.update(found)


def append(part, f, file, tokens, groups):
    """Add a part to its file; offsets and group numbers go on where the parts before ended."""
    if file == "idx":
        f.write((np.fromfile(part, np.int64).cumsum() + tokens).tobytes())
    elif file == "group":
        f.write((np.fromfile(part, np.int32) + np.int32(groups)).tobytes())
    else:
        with open(part, "rb") as source:
            shutil.copyfileobj(source, f, 1 << 20)


# ---------------------------------------------------------------- the whole run

def prepare(cfg):
    """Write data/<name>: built beside it as data/<name>.tmp, renamed when whole. Returns the folder."""
    if cfg.kind not in CONVERTERS:
        raise ValueError(f"--kind={cfg.kind}: wanted one of {', '.join(CONVERTERS)}")
    if cfg.txt_document not in ("blank", "line", "file"):
        raise ValueError(f"--txt_document={cfg.txt_document}: wanted blank, line or file")
    if not re.fullmatch(r"[\w.-]*\w", cfg.name):
        raise ValueError(f"the name {cfg.name!r} cannot be that of a folder in {DATA}/: use letters, digits, - and _")
    if cfg.kind != "text" and not cfg.tokenizer:
        raise ValueError(f"--kind={cfg.kind} needs the tokenizer of the model it is for: --tokenizer={DATA}/<its data>")
    files = find_files(cfg.input)
    tok = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    folder = os.path.join(DATA, cfg.name)
    clear_leftovers(folder)
    try:
        os.makedirs(folder + ".tmp")
        build(cfg, files, tok, folder + ".tmp")
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
    if os.path.exists(folder) and not os.path.exists(os.path.join(folder, "meta.json")):
        raise ValueError(f"{folder} exists and was not made by prepare.py, so it is not replaced: choose another name")


def build(cfg, files, tok, folder):
    start = time.time()
    counts = collections.Counter()
    plain = (".txt", ".jsonl", ".json", ".csv")
    size = sum(os.path.getsize(file) * (1 if file.lower().endswith(plain) else 5) for file in files)
    buckets = min(1 + size // BUCKET_BYTES, 16_384)
    count, largest, any_val = fill_buckets(read_documents(files, cfg, counts), folder, buckets, cfg.seed)
    check_skipped(counts, cfg)

    held_out_from = int((1 - cfg.val_fraction) * 2**64)
    if cfg.val_fraction and not any_val and largest >= 0:
        held_out_from = min(held_out_from, largest)  # of a small set, at least one document
    path = os.path.join(folder, "tokenizer.model")
    if tok:
        tok.save(path)
    else:
        print("training the tokenizer", flush=True)
        tok = train_tokenizer(training_texts(folder, buckets, held_out_from), path, cfg.vocab_size,
                              cfg.character_coverage, cfg.max_piece_length, cfg.tokenizer_characters)
    dtype = "uint16" if tok.vocab_size <= 65_536 else "uint32"
    tokenize(cfg, folder, buckets, held_out_from, np.dtype(dtype).newbyteorder("<"), counts)
    if not counts["train", "documents"]:
        raise ValueError(f"nothing to train on: of {counts['read']} records {counts['val', 'documents']} are held out, "
                         f"no other is left (one document alone cannot be split: --txt_document=line cuts a .txt up, "
                         f"--val_fraction=0 holds none out). Dropped: {by_reason(counts, 'dropped') or 'none'}")

    fields = ["documents", "tokens", "bytes", "characters"]
    fields += ["learned"] * ("mask" in FILES[cfg.kind]) + ["groups"] * (cfg.kind == "pairs")
    meta = {"name": cfg.name, "kind": cfg.kind, "dtype": dtype, "vocab_size": tok.vocab_size,
            "fingerprint": tok.fingerprint, "tokenizer": "tokenizer.model",
            **{split: {field: counts[split, field] for field in fields} for split in ("train", "val")},
            "read": counts["read"], "dropped": by_reason(counts, "skipped") | by_reason(counts, "dropped"),
            "cut": by_reason(counts, "cut"), "sources": files, "config": dataclasses.asdict(cfg),
            "seconds": round(time.time() - start, 1)}
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as f:
        json.dump(meta, f, ensure_ascii=False, indent=1)


def by_reason(counts, what):
    return {key[1]: n for key, n in counts.most_common() if key[0] == what and n}


def check_skipped(counts, cfg):
    skipped = by_reason(counts, "skipped")
    total, read = sum(skipped.values()), counts["read"]
    if not read:
        raise ValueError(f"--input={cfg.input} holds no records: its files are empty")
    if total > cfg.max_skipped * read:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in skipped.items())
        raise ValueError(f"{total:,} of {read:,} records cannot be used ({total / read:.1%}, more than "
                         f"max_skipped={cfg.max_skipped}): {reasons}. The first are listed above. Is --kind={cfg.kind} "
                         "right? --max_skipped=1 goes on without them")


def report(folder):
    """Print what meta.json says."""
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
        meta = json.load(f)
    train, val = meta["train"], meta["val"]
    print(f"{folder}: {meta['kind']}, vocabulary {meta['vocab_size']:,}, {meta['dtype']}")
    print(f"  read {meta['read']:,} records of {len(meta['sources'])} files")
    for title in ("dropped", "cut"):
        if meta[title]:
            print(f"  {title}: " + ", ".join(f"{reason} {n:,}" for reason, n in meta[title].items()))
    for name, split in (("train", train), ("val", val)):
        print(f"  {name}: " + ", ".join(f"{n:,} {field}" for field, n in split.items()))
    if not val["documents"]:
        print("  val is EMPTY: training on this folder cannot measure a validation loss")
    tokens = sum(split.get("learned", split["tokens"]) for split in (train, val))  # those that characters counts
    megabytes = (train["bytes"] + val["bytes"]) / 1e6
    print(f"  {(train['characters'] + val['characters']) / tokens:.2f} characters a token, {megabytes:.1f} MB in "
          f"{meta['seconds']} s, {megabytes / max(meta['seconds'], 0.1):.1f} MB/s")


def show(folder, count):
    """Print the first documents of the training split: learned tokens green, others dim; plain text is all learned."""
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
        meta = json.load(f)
    tok = load_tokenizer(folder)

    def open_file(ending, dtype):
        return np.memmap(os.path.join(folder, f"train.{ending}"), dtype, mode="r")

    tokens = open_file("bin", meta["dtype"])
    if meta["kind"] == "text":
        offsets = [0, *(np.flatnonzero(tokens[:1_000_000] == tok.eot_id) + 1)]
    else:
        offsets = open_file("idx", np.int64)
    mask = open_file("mask", np.uint8) if "mask" in FILES[meta["kind"]] else None
    for i in range(min(count, len(offsets) - 1)):
        ids = tokens[offsets[i]:offsets[i + 1]][:1000]
        learned = mask[offsets[i]:offsets[i + 1]] if mask is not None else np.zeros(len(ids), np.uint8)
        borders = [0, *(np.flatnonzero(np.diff(learned)) + 1), len(ids)]
        colours = ["\033[32m" if learned[a] else "\033[2m" for a in borders[:-1]]
        print(f"--- {i + 1}\n" + "".join(f"{colour}{tok.decode(ids[a:b])}\033[0m"
                                         for colour, a, b in zip(colours, borders, borders[1:])))


def main(cfg):
    folder = os.path.join(DATA, cfg.name)
    if not cfg.name:
        raise ValueError("which data set? python prepare.py NAME --input=FILE_OR_FOLDER, or a recipe's name (--help)")
    if cfg.show and not cfg.input and os.path.exists(os.path.join(folder, "meta.json")):
        show(folder, cfg.show)
        return
    also = ()
    if not cfg.input:
        from recipes.poems import RECIPES  # only here, as it needs more packages
        if cfg.name not in RECIPES:
            raise ValueError(f"no --input given, and no recipe is named {cfg.name!r} (but {', '.join(RECIPES)}). "
                             f"Your own data: python prepare.py {cfg.name} --input=FILE_OR_FOLDER")
        recipe = RECIPES[cfg.name]
        also = recipe.also
        unset = {k: v for k, v in recipe.defaults.items() if k not in changed(cfg)}
        cfg = dataclasses.replace(cfg, kind=recipe.kind, **unset,
                                  input=recipe.write(os.path.join(DATA, "raw"), {"poetry": cfg.poetry}))
    report(prepare(cfg))
    show(folder, cfg.show or 3)
    for name in also:
        main(Config(name, poetry=cfg.poetry, tokenizer=folder, workers=cfg.workers))


if __name__ == "__main__":
    try:
        main(load_config(Config, positional="name"))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
