"""
Turn documents into rows of tokens and their masks, which is what the stages learn from; on all cores.

    render(tok, "sft", document, 1024, counts)           # [(ids, mask, the text that is learned)]
    for split, arrays, counts in tokenize_all(numbers, cfg, folder):
        …                                                # {"bin": ids, "mask": …, "idx": …, "group": …} of some rows

    text     床前明月光…<|endoftext|>                                             one row, no mask: all is learned
    sft      <|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>\n      one row of a conversation
             0             0   0 0         0 0             0        0 1 1         0       its mask
    pairs    such a row for each answer to a prompt, the best first; rows of one prompt have the same group number
    prompts  <|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n                     the model will write the answer
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
    """A row (ids, mask, the text that is learned). If it is too long, it is cut after the last answer that fits."""
    ids, mask = render_chat(tok, messages)
    if len(ids) > max_length:
        # where learned answers end: each with <|im_end|>, of mask 1, and a line break
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
        mask[:head] = [0] * head  # the prompt may contain earlier answers; only the last one counts
        rows.append((ids, mask, answer))
    return rows


def render(tok, kind, document, max_length, counts):
    """Rows (ids, mask, the text in them) of one document; none where it is too long. What is cut is added to counts."""
    if kind == "text":
        # of any length: pretraining cuts the stream of all texts into rows
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


worker = {}  # cfg, tok and documents, in each process of the pool; set by start_worker()


def start_worker(cfg, folder):
    worker["cfg"] = cfg
    worker["tok"] = load_tokenizer(folder)
    worker["documents"] = Documents(folder)
    parent = multiprocessing.parent_process()
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
        # if the parent is killed, it cannot stop its workers: each watches it, and ends when it has ended
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize(chunk):
    """Return (split, {file: array}, counts) of a chunk (split, numbers of documents); offsets and groups begin at 0."""
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
        # copies (numbers from len(documents) on) are not counted again
        if number < len(documents):
            counts.update(found)
            counts["kept"] += bool(rows)
        # rows one after another, where each ends, and the group it belongs to
        for ids, mask, text in rows:
            out["bin"].extend(ids)  # an id too large for id_type raises an OverflowError
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
    """The code of array.array for the ids of a vocabulary: 2 or 4 bytes each."""
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
        # hand out a few chunks at a time, so that finished ones do not fill the memory
        for first in range(0, len(chunks), 4 * n_workers):
            for result in pool.map(tokenize, chunks[first:first + 4 * n_workers]):
                yield result
                bar.update()
