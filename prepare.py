"""
Raw files, or a named recipe, to a folder of tokens that the stages open with memmap.

    python prepare.py poems                                            # a recipe: recipes/poems.py writes plain files
    python prepare.py my_data --input=corpus/                          # pretraining text, trains a tokenizer
    python prepare.py my_sft --input=chat.jsonl --kind=sft --tokenizer=data/my_data
    python prepare.py my_sft --show=5                                  # look at a folder: learned tokens are green

in:  plain UTF-8, read here: .txt with a blank line between documents, or .jsonl with one of these on each line
         --kind=text      {"text": "床前明月光，…"}
         --kind=sft       {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
         --kind=pairs     {"prompt": "…", "answers": ["the best", …, "the worst"]}
         --kind=prompts   {"prompt": "…"}
     everything else that people have: readers/ (other formats, encodings and fields, damaged files)
out: data/<name>/{train,val}.{bin,mask,idx,group}  meta.json  tokenizer.model

Two passes. The first reads and cleans all documents into one temporary file, and keeps 26 bytes of each in memory: its
hash, its question's, where it ends, what it asks for. In the order of the hashes documents are shuffled, copies stand
side by side, and the end is held out for validation (common/documents.py). The second pass tokenizes them in that order
on all cores. So memory does not grow with the text, and neither the order of the files nor the number of workers
changes the result.
"""
import collections
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import time
from typing import Literal

import numpy as np
from tqdm import tqdm

from common.documents import CONTROLS, SPLITS, Documents, clean, cut_in_two, divide, write_documents
from common.rows import tokenize_all
from configurator import Count, Share, Whole, changed, check, run
from readers.report import reasons, report, show, write_meta
from tokenizer import train_tokenizer


@dataclasses.dataclass
class Config:
    name: str = ""  # the folder data/<name> to write; without --input, the recipe of that name
    # input
    input: str = ""  # files, folders (searched for files) and patterns, commas between them; *.bin: token ids
    kind: Literal["text", "sft", "pairs", "prompts"] = "text"  # sft: conversations; pairs: ranked answers; prompts: PPO
    fields: str = ""  # our names for fields of the records: "text:story" or "question:ask,answer:reply"
    txt_document: Literal["blank", "line", "file"] = "blank"  # where a document of a .txt ends: blank line, line, file
    repeat: str = ""  # "dialogues:4,recitals:2": train on the documents of these files (without ending) that often
    poetry: str = ""  # recipes: the chinese-poetry tgz or checkout, where npm is missing
    talk: str = ""  # recipe poems-sft: a file of lines 问/问 = 答/答, which make it somebody else than 明月
    # cleaning
    markers: Literal["keep", "cut"] = "keep"  # control tokens of other models in a text: letters, or ends of it
    min_length: Whole = 5  # characters, texts only; shorter ones are dropped
    max_length: Count = 1024  # tokens, all but texts; longer conversations are cut after an answer
    near_duplicates: Share = 0.0  # drop what shares so much with an earlier one; 0: off (readers/near_duplicates.py)
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


# settings that change nothing unless this holds
NEEDS = {
    "poetry": "not input",
    "talk": "name == 'poems-sft' and not input",
    "min_length": "kind == 'text'",
    "max_length": "kind != 'text' or not input",
    "vocab_size": "not tokenizer",
    "max_piece_length": "not tokenizer"}


DATA = "data"
LONG = 1_000_000  # characters: a longer text is not read at once
PLAIN = {"text": {"text"}, "sft": {"messages"}, "pairs": {"prompt", "answers"}, "prompts": {"prompt"}}
# What no plain text has: control characters, control tokens of models, transcripts, JSON, pointers of Git LFS.
ODD = re.compile(CONTROLS.pattern + "|<|\\[[/egsA-Z|]|]~b|{{|^\\s*[\\[{]|^version https|--> |\ufffd|"
                 "&(?:#|nbsp|[lg]t|amp|quot)|\\\\u[0-9a-f]{4}|"
                 "(?:^|\n|#)[ \t]*<?(?:human|user|system|instruction|q|用户|问)>?[ \t]*[:：]", re.IGNORECASE)


# ---------------------------------------------------------------------------- first pass: files to documents


def read_plain(path):
    """Yield the records of a plain file. ValueError where it is none: readers/ goes on from there."""
    with open(path, encoding="utf-8") as f:
        if path.endswith(".jsonl"):
            for line in f:
                if line.strip():
                    yield json.loads(line, object_pairs_hook=plain_object)
            return
        head = f.read(LONG)
        if "\n\n" not in head or "<|endoftext|>" in head:
            raise ValueError("no blank lines are the ends of its documents")
        f.seek(0)
        lines = iter(lambda: f.readline(LONG), "")
        for is_blank, block in itertools.groupby(lines, str.isspace):
            text = ""
            for line in block:
                text += line
                if len(text) >= LONG:
                    raise ValueError("a text this long is cut in parts")
            if not is_blank:
                yield {"text": text.strip()}


def plain_object(pairs):
    """A JSON object's dict. ValueError where a key stands twice, of which a dict would keep the last, unsaid."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def plain_text(text):
    """A text without anything odd, cleaned. ValueError: readers/ must look at it."""
    if not isinstance(text, str) or not text.strip() or ODD.search(text):
        raise ValueError("not plain")
    return clean(text)


def plain_content(record, kind):
    """What is learned of a record with exactly the fields of its kind: a text, messages, or a prompt and its answers,
    the best first. ValueError, LookupError or TypeError: it has another form."""
    if not isinstance(record, dict) or set(record) - {"split"} != PLAIN[kind]:
        raise ValueError("other fields")
    if record.get("split") not in SPLITS:
        raise ValueError("another split")
    if kind == "text":
        return plain_text(record["text"])
    if kind == "sft":
        turns = record["messages"]
        messages = [{"role": turn["role"], "content": plain_text(turn["content"]).strip()} for turn in turns]
        roles = [turn["role"] for turn in turns if len(turn) == 2]
        asked = roles[roles[0] == "system":]
        if len(roles) < len(turns) or not asked or asked != ["user", "assistant"] * (len(asked) // 2):
            raise ValueError("another order of turns")
        return messages
    messages = [{"role": "user", "content": plain_text(record["prompt"]).strip()}]
    if kind == "prompts":
        return messages
    answers = [plain_text(answer).strip() for answer in record["answers"]]
    if len(set(answers)) < max(2, len(answers)):
        raise ValueError("equal answers cannot be ranked")
    return {"prompt": messages, "answers": answers}


def read_file(path, cfg, counts):
    """Yield (content, split it asks for) of each record that can be used."""
    n_plain = 0
    is_plain = path.endswith(".jsonl") or path.endswith(".txt") and (cfg.kind, cfg.txt_document) == ("text", "blank")
    if is_plain and not cfg.fields:
        try:
            for record in read_plain(path):
                content = plain_content(record, cfg.kind)
                n_plain += 1
                counts["read"] += 1
                counts.update(("used", path, field) for field in record)
                yield content, record.get("split")
            return
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
    # from the first record on that is not plain
    from readers.documents import read_odd
    yield from read_odd(path, cfg, counts, n_plain)


def read_documents(files, cfg, counts):
    """Yield (document as bytes, its question, split it asks for, how often to train on it). What is no text is written
    as JSON."""
    seen = None
    if cfg.near_duplicates:
        from readers.near_duplicates import Seen
        seen = Seen(cfg.near_duplicates)
    for path, split, times in files:
        for content, own_split in read_file(path, cfg, counts):
            if cfg.kind == "text" and len(content) < cfg.min_length:
                counts["dropped", "too short"] += 1
            elif seen and seen.before(content):
                counts["dropped", "near duplicate"] += 1
            elif cfg.kind == "text":
                yield content.encode(), content.encode(), own_split or split, times
            else:
                # what answers one question is not to be divided among training and validation
                turns = content["prompt"] if cfg.kind == "pairs" else content
                question = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
                document = json.dumps(content, ensure_ascii=False)
                yield document.encode(), question.encode(), own_split or split, times


def read_all(files, cfg, counts, folder):
    """Write all documents into one file; return their numbers in order, {"train": …, "val": …}."""
    documents = tqdm(read_documents(files, cfg, counts), "read", unit=" documents", disable=None)
    table = write_documents(documents, folder, cfg.seed)

    # too much may be lost: records, or parts of files
    read = counts["read"]
    check(read, f"--input={cfg.input} holds no records: its files are empty")
    skipped = sum(reasons(counts, "skipped").values())
    check(skipped <= cfg.max_skipped * read, f"{skipped:,} of {read:,} records cannot be used ({skipped / read:.1%}, "
          f"more than max_skipped={cfg.max_skipped}): {reasons(counts, 'skipped')}. The first are listed above. Is "
          f"--kind={cfg.kind} right? --max_skipped=1 goes on without them")
    lost = counts["noticed", "bytes not read"]
    size = sum(os.path.getsize(path) for path, _, _ in files)
    check(lost <= cfg.max_skipped * size, f"{lost:,} of {size:,} bytes could not be read (more than "
          f"max_skipped={cfg.max_skipped}): the damaged files are listed above. --max_skipped=1 goes on without them")
    check(len(table), f"nothing is left of {read:,} records. Dropped: {reasons(counts, 'dropped')}")

    # one text, such as a novel, is not to be learned or held out as a whole
    is_single = len(table) <= counts["parts"] + 1 and not table["split"].any()
    if is_single and cfg.kind == "text" and cfg.val_fraction:
        return cut_in_two(folder, cfg.val_fraction)
    numbers = divide(table, cfg.val_fraction)
    n_unique = len(numbers["val"]) + int((numbers["train"] < len(table)).sum())  # above are those of --repeat
    counts["dropped", "duplicate"] = len(table) - n_unique
    counts["noticed", "repeated documents"] = len(numbers["val"]) + len(numbers["train"]) - n_unique
    asked = table["question"]
    trained_on = np.isin(asked[numbers["val"]], asked[numbers["train"] % len(table)])
    counts["noticed", "held out, but with a question that is trained on"] = int(trained_on.sum())
    return numbers


# ---------------------------------------------------------------------------- second pass: documents to tokens


def write_tokens(numbers, cfg, folder):
    """Tokenize both splits and write their files. Return {split: counts}."""
    from common.data import FILES  # only here, as it needs torch, which the workers do not
    for split in numbers:
        for name in FILES[cfg.kind]:
            with open(os.path.join(folder, f"{split}.{name}"), "wb") as f:
                f.write(bytes(8 * (name == "idx")))  # offsets begin with a 0
    totals = {split: collections.Counter() for split in numbers}
    for split, out, counts in tokenize_all(numbers, cfg, folder):
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
    """Write data/<name>, whole or not at all. Returns the folder."""
    from readers.folder import new_folder
    check(re.fullmatch(r"[\w.-]*\w", cfg.name), f"the name {cfg.name!r} cannot be that of a folder in {DATA}/: use "
          "letters, digits, - and _")
    check(cfg.kind == "text" or cfg.tokenizer, f"--kind={cfg.kind} needs the tokenizer of the model it is for: "
          f"--tokenizer={DATA}/<its data>")
    folder = os.path.join(DATA, cfg.name)
    with new_folder(folder) as unfinished:
        build(cfg, unfinished)
    return folder


def build(cfg, folder):
    """Write all files of a data set into `folder`."""
    began = time.time()
    files = [(cfg.input, None, 1)]
    if not os.path.isfile(cfg.input) or cfg.repeat:
        from readers.files import find_files
        files = find_files(cfg.input, cfg.repeat)
    counts = collections.Counter()  # what became of all records: "read", "kept", ("dropped", reason), …
    path = os.path.join(folder, "tokenizer.model")
    tok = None
    if cfg.tokenizer:
        from readers.vocabularies import open_vocabulary
        tok = open_vocabulary(cfg.tokenizer)
        tok.save(path)
    if files[0][0].endswith(".bin"):
        # token ids already
        from readers.token_files import write_token_files
        totals = write_token_files([path for path, _, _ in files], cfg, tok, counts, folder)
    else:
        # first pass: all documents in one file, in which order, and the vocabulary
        numbers = read_all(files, cfg, counts, folder)
        documents = Documents(folder)
        if tok:
            from readers.round_trip import changes
            counts.update(changes(tok, documents))
        else:
            print("training the tokenizer", flush=True)
            texts = (documents[number] for number in numbers["train"])
            train_tokenizer(texts, path, cfg.vocab_size, max_piece_length=cfg.max_piece_length)
        # second pass: tokens
        totals = write_tokens(numbers, cfg, folder)
        for leftover in ("documents", "documents.ends"):
            os.remove(os.path.join(folder, leftover))
    for split in totals:
        counts.update(totals[split])
    check(totals["train"]["documents"], f"nothing to train on: of {counts['read']} records "
          f"{totals['val']['documents']} are held out, no other is left (--val_fraction=0 holds none out, but those "
          f"that a file's name or a field split says). Dropped: {reasons(counts, 'dropped') or 'none'}")

    # what there is to know about it
    write_meta(folder, cfg, [path for path, _, _ in files], totals, counts, time.time() - began)


def main(cfg):
    check(cfg.name, "which data set? python prepare.py NAME --input=FILE_OR_FOLDER, or a recipe's name (--help)")
    folder = os.path.join(DATA, cfg.name)
    if cfg.show and not cfg.input and os.path.exists(os.path.join(folder, "meta.json")):
        show(folder, cfg.show)
        return
    if not cfg.input:
        # recipes/poems.py writes the files of "poems" and of "poems-sft", and says how to prepare them
        module = f"recipes.{cfg.name.split('-')[0]}"
        is_there = re.fullmatch(r"recipes\.\w+", module) and importlib.util.find_spec(module)
        recipes = getattr(importlib.import_module(module), "RECIPES", {}) if is_there else {}
        check(cfg.name in recipes, f"no --input given, and no recipe is named {cfg.name!r} (in {module}: "
              f"{', '.join(recipes) or 'none'}). Your own data: python prepare.py {cfg.name} --input=FILE_OR_FOLDER")
        recipe = recipes[cfg.name]
        settings = {name: value for name, value in recipe.defaults.items() if name not in changed(cfg)}
        settings["input"] = recipe.write(os.path.join(DATA, "raw"), {"poetry": cfg.poetry, "talk": cfg.talk})
        cfg = dataclasses.replace(cfg, kind=recipe.kind, **settings)
    report(prepare(cfg))
    show(folder, cfg.show or 3)


if __name__ == "__main__":
    run(main, Config, positional="name")
