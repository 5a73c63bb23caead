"""
Raw files to records: every file format and encoding there is.

    with open(path, "rb") as raw:
        for where, record in read_file(path, raw):
            …                                          # a dict, a list, a text; or a Skip, where nothing can be read

.txt .jsonl .json .csv .parquet .arrow, plain or as .gz .bz2 .xz .zst. A damaged file gives all records before the
damage, and a broken record costs no other one. What the fields of a record mean is told by readers/schemas.py.
"""
import bz2
import gzip
import lzma
import os
import re

from configurator import check, fail
from readers.account import Part, Skip
from readers.encodings import open_text, repair
from readers.fields import COUNTERS, KNOWN
from readers.json_files import BROKEN, DECODER, read_json, read_jsonl, read_lines
from readers.tables import read_arrow, read_csv, read_parquet
from readers.zstd import ZstdFile


END_OF_TEXT = "<|endoftext|>"  # at the end of a line of a .txt: a document ends there (TinyStories)
MAX_CHARACTERS = 1_000_000  # longer documents of a .txt come in parts, so that a file of any size can be streamed


UNPACKERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": ZstdFile}


def read_file(path, raw, txt_document="blank"):
    """Yield (where, record) of the file open as `raw`; a Skip takes the place of a record that cannot be read.

    txt_document: a document of a .txt ends at a "blank" line, at each "line", or with the "file".
    """
    size = os.path.getsize(path)
    found = 0
    if raw.peek(40).startswith(b"version https://git-lfs"):
        fail(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` where it comes from")
    check(extension(path) in READERS, f"{path} ends in {extension(path) or 'nothing'}: give it the ending of what it "
          f"holds, one of {' '.join(READERS)}")
    try:
        unpack = UNPACKERS.get(os.path.splitext(path.lower())[1])
        source = unpack(raw) if unpack else raw
        for where, record in READERS[extension(path)](source, txt_document):
            found += 1
            yield f"{path}:{where}", record
    except ImportError as e:
        fail(f"reading {path} needs a package: pip install {e.name}")
    except Skip as e:
        e.lost = size
        yield path, e
    except Exception as e:
        # Whatever a damaged file makes its reader raise: what came before is kept, what comes after is lost. A file
        # that is cut off has been read to its end, and nobody knows how much is missing: that counts as half of it.
        position = raw.tell() if found else 0
        lost = size - position or size // 2
        where = f"{lost:,} of {size:,} bytes not read"
        if position == size:
            where = f"it breaks off at its end, counted as {lost:,} bytes not read"
        yield path, Skip("damaged file", f"{type(e).__name__}: {e}; {where}", lost)


def records_of(path):
    """Return the records of a file, each line of a .txt is one. Exits where one cannot be read."""
    records = []
    with open(path, "rb") as raw:
        for where, record in read_file(path, raw, "line"):
            check(not isinstance(record, Skip), f"{where}: {record}")
            records.append(record)
    check(records, f"{path} is empty")
    return records


def read_text(path):
    """Return the whole text of a file, in whatever encoding, packed or not. Exits where it is none."""
    unpack = UNPACKERS.get(os.path.splitext(path.lower())[1])
    try:
        with open(path, "rb") as raw:
            f = open_text(unpack(raw) if unpack else raw)
            text = "".join(repair(line, f.encoding) for line in f)
            return text.replace("\r\n", "\n").replace("\r", "\n")
    except Skip as skip:
        fail(f"{path}: {skip}")


def extension(path):
    """".jsonl" of a/B.JSONL.gz"""
    name, ending = os.path.splitext(path.lower())
    if ending in UNPACKERS:
        ending = os.path.splitext(name)[1]
    return ending


def stem(path):
    """"B" of a/B.jsonl.gz"""
    return os.path.basename(path).split(".")[0]


def are_json(head):
    """Whether the lines that a file begins with are JSON objects or lists; the last of them may be cut off."""
    lines = [line.strip() for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    whole = lines[:-1] or lines
    if not all(line[:1] in (b"{", b"[") for line in lines) or not all(line[-1:] in (b"}", b"]") for line in whole):
        return False
    try:
        return bool(lines and DECODER.decode(lines[0].decode(errors="replace")))
    except BROKEN:
        return False


def check_blank_lines(head):
    """Raise Skip where a .txt has long lines and no blank one among them: is a line a document, or the whole file?"""
    lines = head.split(b"\n")
    if len(lines) > 10 and all(map(bytes.strip, lines[:-1])) and len(head) / len(lines) > 500:
        raise Skip("unclear where documents end", "no blank line is in it, and its lines are long "
                   f"({len(head) // len(lines):,} bytes each): --txt_document=line takes each line as a document, "
                   "--txt_document=file the whole file")


def read_txt(raw, txt_document):
    f = open_text(raw)
    head = f.buffer.peek()
    if are_json(head):
        yield from read_lines(f)
        return
    if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{\s*\"", head):
        raise Skip("JSON in a .txt", "it begins like an array of records: call the file .json")
    if txt_document == "blank":
        names = re.split("[,;\t]", head.split(b"\n")[0].decode("utf-8-sig", "replace").strip().lower())
        are_names = len(names) > 1 and all(name in KNOWN or COUNTERS.search(name) for name in names)
        if are_names or re.match(rb"([^\s][^\t\n]*\t[^\t\n]*\S\r?\n){4}", head):
            raise Skip("a table in a .txt", f"its first line is {' | '.join(names)[:80]}: call the file .csv, with "
                       "names in the first line; --txt_document=line takes each line as it is")
        check_blank_lines(head)
    if txt_document == "blank" and re.search(rb"<\|endoftext\|>\s*?(\n|$)", head):
        txt_document = "marked"  # its documents say themselves where they end
    held = []
    size = 0
    start = 1
    number = 1
    while line := f.readline(MAX_CHARACTERS):  # a line of gigabytes comes in parts
        is_whole = line.endswith(("\n", "\r"))
        at_end = txt_document == "line" and is_whole or txt_document == "blank" and not line.strip()
        if line.rstrip().endswith(END_OF_TEXT):
            at_end = True
            line = line.rstrip().removesuffix(END_OF_TEXT) + "\n"
        try:
            held.append(repair(line, f.encoding))
        except Skip as e:
            yield number, e
        size += len(line)
        number += is_whole
        if at_end or size >= MAX_CHARACTERS:
            text = "".join(held).strip()
            if text:
                yield start, text if at_end else Part(text)
            held = []
            size = 0
            start = number
    text = "".join(held).strip()
    if text:
        yield start, text


READERS = {
    ".txt": read_txt, ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv,
    ".tsv": read_csv, ".parquet": read_parquet, ".arrow": read_arrow}
