"""
Turn text files, or those of a named recipe, into a folder of token ids, which the stages map into memory (memmap).

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

Two passes. The first reads and cleans all documents, writes them into one temporary file, and keeps 26 bytes of each in
memory, among them its hash: a number that looks random, but is the same for the same text. Sorted by hash, documents
are shuffled, equal ones are neighbours, and the last ones are held out for validation (common/documents.py). The second
pass tokenizes them in that order, on all cores. So memory hardly grows with the text, and the result depends neither on
the order of the files nor on the number of workers.
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
from readers.json_files import make_object
from readers.report import reasons, report, show, write_meta
from tokenizer import train_tokenizer


@dataclasses.dataclass
class Config:
    name: str = ""  # the folder data/<name> to write; without --input, the recipe of that name
    # input
    input: str = ""  # files, folders and patterns like corpus/*.txt, commas between them; *.bin: token ids
    kind: Literal["text", "sft", "pairs", "prompts"] = "text"  # sft: conversations; pairs: ranked answers; prompts: PPO
    fields: str = ""  # our name:yours, for records with other fields: "text:story" or "question:ask,answer:reply"
    txt_document: Literal["blank", "line", "file"] = "blank"  # what ends a document of a .txt: blank line, line, file
    repeat: str = ""  # "dialogues:4,recitals:2": train on the documents of these files (without ending) that often
    poetry: str = ""  # recipes, without npm: the file chinese-poetry-2.0.1.tgz, or a folder with a copy of that project
    talk: str = ""  # recipe poems-sft: a file of lines 问/问 = 答/答, which say who the model is
    # cleaning
    markers: Literal["keep", "cut"] = "keep"  # of "<|im_end|>" and the like in a text: keep the letters; cut the text
    min_length: Whole = 5  # characters; shorter texts are dropped (kind text only)
    max_length: Count = 1024  # tokens; longer conversations are cut after an answer (all kinds but text)
    near_duplicates: Share = 0.0  # drop what shares this much with an earlier one; 0: off (readers/near_duplicates.py)
    max_skipped: Share = 0.05  # share of unusable records, unread bytes or unknown tokens above which the run stops
    # split
    val_fraction: Share = 0.005  # of the documents without a "split" of their own, "train" or "val", are held out
    seed: int = 1337
    # tokenizer
    tokenizer: str = ""  # a vocabulary file or data folder; empty: train one on this text
    vocab_size: Count = 16384  # of the tokenizer that is trained
    max_piece_length: Count = 16  # characters in a token, at most; 1: every character is a token
    # running
    workers: Whole = 0  # processes, 0: one a core
    show: Whole = 0  # examples to print at the end (0: three); without --input: only show those of an existing folder


# what must hold for a setting to change anything: configurator.py refuses it otherwise
NEEDS = {
    "poetry": "not input",
    "talk": "name == 'poems-sft' and not input",
    "min_length": "kind == 'text'",
    "max_length": "kind != 'text' or not input",
    "vocab_size": "not tokenizer",
    "max_piece_length": "not tokenizer"}


DATA = "data"
LONG = 1_000_000  # characters; readers/ reads a longer text in parts
PLAIN = {"text": {"text"}, "sft": {"messages"}, "pairs": {"prompt", "answers"}, "prompts": {"prompt"}}  # kind: fields
# A text with one of these may not be plain: control characters, "<|im_end|>" and the like, "用户：" in front, JSON
ODD = re.compile(CONTROLS.pattern + "|<|\\[[/egsA-Z|]|]~b|{{|^\\s*[\\[{]|^version https|"
                 "(?:^|\n|#)[ \t]*<?(?:human|user|system|instruction|q|用户|问)>?[ \t]*[:：]", re.IGNORECASE)


# ---------------------------------------------------------------------------- first pass: files to documents


def read_plain(path):
    """Yield the records of a plain file. ValueError where it turns out not to be plain: see read_file()."""
    with open(path, encoding="utf-8") as f:
        if path.endswith(".jsonl"):
            for line in f:
                if line.strip():
                    yield json.loads(line, object_pairs_hook=make_object)
            return
        head = f.read(LONG)
        if "\n\n" not in head or "<|endoftext|>" in head:
            raise ValueError("its documents do not end at blank lines")
        f.seek(0)
        lines = iter(lambda: f.readline(LONG), "")
        for is_blank, block in itertools.groupby(lines, str.isspace):
            text = ""
            for line in block:
                text += line
                if len(text) >= LONG:
                    raise ValueError("too long for one document")
            if not is_blank:
                yield {"text": text.strip()}


def plain_text(text):
    """Return a text, cleaned. ValueError where something in it is ODD."""
    if not isinstance(text, str) or not text.strip() or ODD.search(text):
        raise ValueError("not plain")
    return clean(text)


def plain_content(record, kind):
    """Return what is learned from a record: a text, messages, or a prompt and its answers, the best first. ValueError,
    LookupError or TypeError where it does not have exactly the form that this script's docstring gives for its kind."""
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
        asked = roles[roles[0] == "system":]  # without the system message: a comparison is 0 or 1
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
    """Yield (content, its field "split" or None) of each record that can be used."""
    n_plain = 0  # plain records so far
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
    # something was not plain: readers/, which know many forms of files, go on after those n_plain records
    from readers.documents import read_odd
    yield from read_odd(path, cfg, counts, n_plain)


def read_documents(files, cfg, counts):
    """Yield (document, question, split or None, how often to train on it), document and question as bytes. Documents of
    kind sft, pairs and prompts are written as JSON. The question of a text is the text itself."""
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
                # all documents with one question will go to one split: else validation would ask what was trained on
                turns = content["prompt"] if cfg.kind == "pairs" else content
                question = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
                document = json.dumps(content, ensure_ascii=False)
                yield document.encode(), question.encode(), own_split or split, times


def read_all(files, cfg, counts, folder):
    """First pass: write all documents into one file; return their numbers, in order: {"train": …, "val": …}."""
    documents = tqdm(read_documents(files, cfg, counts), "read", unit=" documents", disable=None)
    table = write_documents(documents, folder, cfg.seed)

    # stop where too much is lost: records, or parts of files
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

    # a single text, such as a novel: train on its beginning, hold out its end
    is_single = len(table) <= counts["parts"] + 1 and not table["split"].any()
    if is_single and cfg.kind == "text" and cfg.val_fraction:
        return cut_in_two(folder, cfg.val_fraction)
    numbers = divide(table, cfg.val_fraction)
    n_unique = len(numbers["val"]) + int((numbers["train"] < len(table)).sum())  # higher numbers: copies (--repeat)
    counts["dropped", "duplicate"] = len(table) - n_unique
    counts["noticed", "repeated documents"] = len(numbers["val"]) + len(numbers["train"]) - n_unique
    asked = table["question"]
    trained_on = np.isin(asked[numbers["val"]], asked[numbers["train"] % len(table)])
    counts["noticed", "held out, but with a question that is trained on"] = int(trained_on.sum())
    return numbers


# ---------------------------------------------------------------------------- second pass: documents to tokens


def write_tokens(numbers, cfg, folder):
    """Second pass: tokenize both splits and write their files. Return {split: counts}."""
    from common.data import FILES  # only here, as it needs torch, which the workers do not
    for split in numbers:
        for name in FILES[cfg.kind]:
            with open(os.path.join(folder, f"{split}.{name}"), "wb") as f:
                f.write(bytes(8 * (name == "idx")))  # a new file: empty, but the offsets begin with a 0, of 8 bytes
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
    check(cfg.kind == "text" or cfg.tokenizer, f"--kind={cfg.kind} needs the tokenizer of the model that will learn "
          f"from it. Name the data that model was pretrained on: --tokenizer={DATA}/NAME")
    folder = os.path.join(DATA, cfg.name)
    with new_folder(folder) as unfinished:
        build(cfg, unfinished)
    return folder


def build(cfg, folder):
    """Write all files of a data set into `folder`."""
    began = time.time()
    files = [(cfg.input, None, 1)]  # (path, split that it names or None, how often to train on it)
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
        # these are token ids already
        from readers.token_files import write_token_files
        totals = write_token_files([path for path, _, _ in files], cfg, tok, counts, folder)
    else:
        # first pass: write all documents into one file, decide on their order, train the tokenizer
        numbers = read_all(files, cfg, counts, folder)
        documents = Documents(folder)
        if tok:
            from readers.round_trip import changes
            counts.update(changes(tok, documents))
        else:
            print("training the tokenizer", flush=True)
            texts = (documents[number] for number in numbers["train"])
            train_tokenizer(texts, path, cfg.vocab_size, max_piece_length=cfg.max_piece_length)
        # second pass: read them in that order, write tokens
        totals = write_tokens(numbers, cfg, folder)
        for leftover in ("documents", "documents.ends"):
            os.remove(os.path.join(folder, leftover))
    for split in totals:
        counts.update(totals[split])
    check(totals["train"]["documents"], f"nothing to train on: of {counts['read']} records "
          f"{totals['val']['documents']} are held out, none is left (--val_fraction=0 holds none out, except those "
          f"that ask for it by their file's name or field split). Dropped: {reasons(counts, 'dropped') or 'none'}")

    # meta.json: sizes, sources, what was dropped and why
    write_meta(folder, cfg, [path for path, _, _ in files], totals, counts, time.time() - began)


def main(cfg):
    check(cfg.name, "which data set? python prepare.py NAME --input=FILE_OR_FOLDER, or a recipe's name (--help)")
    folder = os.path.join(DATA, cfg.name)
    if cfg.show and not cfg.input and os.path.exists(os.path.join(folder, "meta.json")):
        show(folder, cfg.show)
        return
    if not cfg.input:
        # recipes/poems.py has "poems", "poems-sft", …: each with a function that writes its files, and our settings
        module = f"recipes.{cfg.name.split('-')[0]}"
        if not re.fullmatch(r"recipes\.\w+", module) or not importlib.util.find_spec(module):
            module = "recipes.poems"  # to say what recipes there are
        recipes = getattr(importlib.import_module(module), "RECIPES", {})
        check(cfg.name in recipes, f"no --input given, and no recipe is named {cfg.name!r} (recipes in {module}: "
              f"{', '.join(recipes) or 'none'}). Your own data: python prepare.py {cfg.name} --input=FILE_OR_FOLDER")
        recipe = recipes[cfg.name]
        settings = {name: value for name, value in recipe.defaults.items() if name not in changed(cfg)}
        settings["input"] = recipe.write(os.path.join(DATA, "raw"), {"poetry": cfg.poetry, "talk": cfg.talk})
        cfg = dataclasses.replace(cfg, kind=recipe.kind, **settings)
    report(prepare(cfg))
    show(folder, cfg.show or 3)


if __name__ == "__main__":
    run(main, Config, positional="name")
