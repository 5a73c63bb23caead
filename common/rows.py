"""
Documents to rows of tokens, on all cores: what the stages learn from, token by token.

    render(tok, "sft", document, 1024, counts)           # [(ids, mask, the words that are learned)]
    for split, arrays, counts in tokenize_all(numbers, cfg, folder):
        …                                                # {"bin": ids, "mask": …, "idx": …, "group": …} of some rows

    text     床前明月光…<|endoftext|>                                             one row, no mask: all is learned
    sft      <|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>\n      one row of a conversation
             0             0   0 0         0 0             0        0 1 1         0       its mask
    pairs    the same for each answer to one prompt, the best first; the rows share the number of a group
    prompts  <|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n                     the answer is yet to be written
"""
import array
import collections
import concurrent.futures
import json
import multiprocessing
import os
import signal
import threading

import numpy as np
from tqdm import tqdm

from common.documents import Documents
from tokenizer import is_learned, load_tokenizer, render_chat, render_document

CHUNK_BYTES = 4_000_000  # of text that a worker tokenizes at a time


def render_conversation(tok, messages, max_length, counts):
    """A row (ids, mask, the words that are learned); one that is too long ends behind the last answer that fits."""
    ids, mask = render_chat(tok, messages)
    if len(ids) > max_length:
        # where a learned answer ends: <|im_end|>, then a line break
        is_end = np.array(ids) == tok.im_end_id
        is_end &= np.array(mask, bool)
        ends = np.flatnonzero(is_end) + 1 + len(tok.encode("\n"))
        end = max(ends[ends <= max_length], default=0)
        ids = ids[:end]
        mask = mask[:end]
        messages = messages[:ids.count(tok.im_start_id)]
        counts["cut", f"after an answer, at --max_length={max_length}"] += bool(ids)
    return ids, mask, "".join(m["content"] for m in messages if is_learned(m))


def render_answers(tok, prompt, answers):
    """A row (ids, mask, the answer) for each answer to a prompt."""
    rows = []
    head = len(render_chat(tok, prompt, add_generation_prompt=True)[0])
    for answer in answers:
        ids, mask = render_chat(tok, [*prompt, {"role": "assistant", "content": answer}])
        mask[:head] = [0] * head  # earlier answers in the prompt are not judged
        rows.append((ids, mask, answer))
    return rows


def render(tok, kind, document, max_length, counts):
    """Rows (ids, mask, the text that counts as content) of one document; none where it does not fit."""
    if kind == "text":
        # however long it is: pretraining goes on with it in its next rows
        return [(render_document(tok, document), [], document)]
    content = json.loads(document)
    if kind == "sft":
        rows = [render_conversation(tok, content, max_length, counts)]
    elif kind == "pairs":
        rows = render_answers(tok, content["prompt"], content["answers"])
    else:
        ids, mask = render_chat(tok, content, add_generation_prompt=True)
        rows = [(ids, mask, "".join(m["content"] for m in content))]

    fitting = [row for row in rows if 0 < len(row[0]) <= max_length]
    if kind == "pairs":
        counts["cut", f"answers longer than --max_length={max_length}"] += len(rows) - len(fitting)
        if len(fitting) < 2:
            counts["dropped", f"fewer than two answers within --max_length={max_length}"] += 1
            return []
    elif not fitting:
        counts["dropped", f"longer than --max_length={max_length}"] += 1
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


def tokenize_all(numbers, cfg, folder):
    """Yield (split, {file: array}, counts) of all documents in `folder`, a chunk at a time, in the order of numbers."""
    documents = Documents(folder)
    mean_bytes = int(documents.ends[-1]) / len(documents)
    chunks = []
    for split, ordered in numbers.items():
        n_chunks = 1 + int(len(ordered) * mean_bytes / CHUNK_BYTES)
        chunks += [(split, chunk) for chunk in np.array_split(ordered, n_chunks)]
    n_workers = min(cfg.workers or os.cpu_count(), len(chunks))
    bar = tqdm(desc="tokenize", total=len(chunks), unit="chunk", disable=None)
    if n_workers == 1:
        start_worker(cfg, folder)
        for chunk in chunks:
            yield tokenize(chunk)
            bar.update()
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(n_workers, spawn, start_worker, (cfg, folder)) as pool:
        # a few at a time, so that their tokens do not pile up in memory
        for first in range(0, len(chunks), 4 * n_workers):
            for result in pool.map(tokenize, chunks[first:first + 4 * n_workers]):
                yield result
                bar.update()
