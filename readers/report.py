"""
The account of a finished folder: meta.json, what prepare.py prints of it, and its first documents with what is learned.
"""
import collections
import dataclasses
import json
import os
import sys

import numpy as np

from common.rows import id_type
from readers.markers import MARKERS
from tokenizer import load_tokenizer

COUNTS = ("documents", "tokens", "learned", "bytes", "characters", "groups")  # of a split, in meta.json


def listed(counts):
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def fields_of(paths, counts):
    """{path: {"used": {field: in how many records}, "ignored": …}} of what was counted as (what, path, field)."""
    fields = {path: {"used": {}, "ignored": {}} for path in paths}
    for what, path, *name in sorted(key for key in counts if key[0] in ("used", "ignored")):
        fields[path][what][name[0]] = counts[what, path, name[0]]
    return fields


def reasons(counts, what):
    """{reason: how often} of "dropped", "skipped", "cut" or "noticed"."""
    return {key[1]: n for key, n in counts.most_common() if key[0] == what and n}


def write_meta(folder, cfg, sources, totals, counts, seconds):
    """Write meta.json, which says what there is to know about a data set. totals: {split: counts}."""
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
    meta["read"] = counts["read"]
    meta["kept"] = counts["kept"]
    for what in ("dropped", "skipped", "cut", "noticed"):
        meta[what] = reasons(counts, what)
    meta["sources"] = sources
    meta["fields"] = fields_of(sources, counts)
    meta["config"] = dataclasses.asdict(cfg)
    meta["seconds"] = round(seconds, 1)
    meta["memory"] = peak_memory()
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8", errors="backslashreplace") as f:
        json.dump(meta, f, ensure_ascii=False, indent=1)


def report(folder):
    """Print what meta.json says."""
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
        meta = json.load(f)
    print(f"{folder}: {meta['kind']}, vocabulary {meta['vocab_size']:,}, {meta['dtype']}")
    dropped = sum(meta["dropped"].values())
    skipped = sum(meta["skipped"].values())
    print(f"  read {meta['read']:,} records of {len(meta['sources']):,} files = {meta['kept']:,} kept + {dropped:,} "
          f"dropped + {skipped:,} skipped")
    for what in ("dropped", "skipped", "cut", "noticed"):
        if meta[what]:
            print(f"  {what}: {listed(meta[what])}")
    if meta["config"].get("markers") == "keep" and any(reason.endswith(" in a text") for reason in meta["noticed"]):
        print("  control tokens of other models stand in the texts, letter by letter; --markers=cut ends a text there")
    # files whose records have the same fields make one line
    alike = collections.defaultdict(list)
    for path, fields in meta["fields"].items():
        alike[tuple(fields["used"]), tuple(fields["ignored"])].append(path)
    for paths in alike.values():
        files = paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        for what in ("used", "ignored"):
            counts = collections.Counter()
            for path in paths:
                counts.update(meta["fields"][path][what])
            if counts:
                print(f"  fields {what} of {files}: {listed(counts)}")
    for split in ("train", "val"):
        counts = dict(meta[split])
        if meta["kind"] != "pairs":
            del counts["groups"]  # every document is one
        print(f"  {split}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items() if n or name == "documents"))
    if not meta["val"]["documents"]:
        print("  val is EMPTY: training on this folder cannot measure a validation loss")
    both = (meta["train"], meta["val"])
    characters = sum(split["characters"] for split in both)
    tokens = sum(split["learned"] or split["tokens"] for split in both)  # those that characters counts
    megabytes = sum(split["bytes"] for split in both) / 1e6
    print(f"  {characters / max(tokens, 1):.2f} characters a token, {megabytes:.1f} MB in {meta['seconds']} s, "
          f"{megabytes / max(meta['seconds'], 0.1):.1f} MB/s, peak memory {meta['memory'] / 1e6:.0f} MB (main process)")


def peak_memory():
    """The most bytes of memory that this process has held; 0 on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show(folder, count):
    """Print the first documents of the training split: learned tokens green, others dim; plain text is all learned. Of
    ranked answers it says which is the best. Letters that spell a control token of some model are red."""
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
        meta = json.load(f)
    tok = load_tokenizer(folder)

    def memmap(name, dtype):
        path = os.path.join(folder, f"train.{name}")
        return np.memmap(path, dtype, mode="r") if os.path.exists(path) else None

    tokens = memmap("bin", meta["dtype"])
    masks = memmap("mask", np.uint8)
    groups = memmap("group", np.int32)
    offsets = memmap("idx", np.int64)
    if offsets is None:  # texts follow each other, each ends with <|endoftext|>
        ends = np.flatnonzero(tokens[:1_000_000] == tok.eot_id) + 1
        offsets = np.append(0, ends if len(ends) else len(tokens))
    for i in range(min(count, len(offsets) - 1)):
        part = slice(offsets[i], min(offsets[i + 1], offsets[i] + 1000))
        mask = np.zeros(part.stop - part.start, bool) if masks is None else masks[part] > 0
        print(f"--- {i + 1}{rank_of(i, groups)}\n{coloured(tok, tokens[part], mask)}")


def rank_of(i, groups):
    """Which of the answers to its prompt document i is."""
    if groups is None:
        return ""
    same = np.flatnonzero(groups[:i + 1000] == groups[i])
    place = i - same[0] + 1
    return f": prompt {groups[i] + 1}, answer {place} of {len(same)}" + (", the best" if place == 1 else "")


def coloured(tok, ids, mask):
    """The text of ids, in the colours of a terminal."""
    text = ""
    # one piece after another: of tokens that are all learned or all not, or one control token
    is_special = np.isin(ids, list(tok.special_names))
    borders = np.flatnonzero((np.diff(mask) != 0) | np.diff(is_special)) + 1
    for piece, learned, special in zip(*(np.split(array, borders) for array in (ids, mask, is_special))):
        colour = "\033[32m" if learned.any() else "\033[2m"
        words = tok.decode(piece)
        if not special.any():
            words = MARKERS.sub(lambda marker: f"\033[0;31m{marker[0]}\033[0m{colour}", words)
        text += f"{colour}{words}\033[0m"
    return text
