"""
Raw files to records: every file format and encoding there is.

    with open(path, "rb") as raw:
        for where, record in read_file(path, raw):
            …                                          # a dict, a list, a text; or a Skip, where nothing can be read

.txt .jsonl .json .csv .parquet, plain or as .gz .bz2 .xz .zst; in UTF-8, UTF-16, GB18030, Big5, Shift-JIS or EUC-JP,
even if the encoding changes within a file. A damaged file gives all records before the damage, and a broken record
costs no other one. What the fields of a record mean is told by recipes/schemas.py.
"""
import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys

from configurator import check, fail

END_OF_TEXT = "<|endoftext|>"  # at the end of a line of a .txt: a document ends there (TinyStories)
MAX_CHARACTERS = 1_000_000  # longer documents of a .txt come in parts, so that a file of any size can be streamed


class Skip(Exception):
    """Why something cannot be used: the reason to count, the detail to print, and how many bytes were not read."""

    def __init__(self, reason, detail="", lost=0):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.lost = lost


class Part(str):
    """A text that ends because of its length alone; the next record goes on with it."""


# ---------------------------------------------------------------------------- files


def find_files(path):
    """Sorted paths of all readable files at `path`, a file or a folder."""
    check(os.path.exists(path), f"--input={path} does not exist (looked in {os.getcwd()}): give a file or a folder")
    found = [path]
    if os.path.isdir(path):
        found = []
        for folder, _, names in os.walk(path):
            found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in found if extension(file) in READERS)
    others = [file for file in found if extension(file) not in READERS]
    endings = " ".join(sorted({os.path.splitext(file)[1] or "none" for file in others}))
    check(files, f"--input={path} has no file to read: wanted {' '.join(READERS)}, plain or with {' '.join(UNPACKERS)};"
          f" found {len(found)} files with endings: {endings or '-'}")
    if others:
        print(f"note: {len(others)} of the {len(found)} files under {path} are not read, with endings: {endings}",
              file=sys.stderr)
    return files


def extension(path):
    """".jsonl" of a/B.JSONL.gz"""
    name, ending = os.path.splitext(path.lower())
    if ending in UNPACKERS:
        ending = os.path.splitext(name)[1]
    return ending


def stem(path):
    """"B" of a/B.jsonl.gz"""
    return os.path.basename(path).split(".")[0]


def read_file(path, raw, txt_document="blank"):
    """Yield (where, record) of the file open as `raw`; a Skip takes the place of a record that cannot be read.

    txt_document: a document of a .txt ends at a "blank" line, at each "line", or with the "file".
    """
    size = os.path.getsize(path)
    found = 0
    if raw.peek(40).startswith(b"version https://git-lfs"):
        fail(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` where it comes from")
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


class ZstdFile(io.RawIOBase):
    """The bytes inside a .zst. (The reader that zstandard brings does not say when a file is cut off.)"""

    def __init__(self, raw):
        import zstandard
        self.raw = raw
        self.new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self.frame = None     # a file is one frame after another; None between them
        self.packed = b""     # read from the file, not unpacked yet
        self.unpacked = b""   # not handed out yet

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.unpacked:
            self.packed = self.packed or self.raw.read(1 << 14)
            if not self.packed:
                if self.frame:
                    raise EOFError("the last frame does not end")
                return 0
            self.frame = self.frame or self.new_frame()
            self.unpacked = self.frame.decompress(self.packed)
            self.packed = b""
            if self.frame.eof:
                self.packed = self.frame.unused_data
                self.frame = None
        size = min(len(buffer), len(self.unpacked))
        buffer[:size] = self.unpacked[:size]
        self.unpacked = self.unpacked[size:]
        return size


UNPACKERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": ZstdFile}


# ---------------------------------------------------------------------------- encodings

EAST_ASIAN = ("gb18030", "cp950", "cp932", "euc_jp")  # mainland China; Big5 of Taiwan; Shift-JIS and EUC-JP of Japan
COMMON = set("的一是不了在人有我他这這个個们們来來到时時大地为為子中你说說生国國年着就那和要她出也得里裏后後自以会會家可下而过過天去能"
             "對小多然于於心学學上之无無日云雲山水风風花月春本文字第回行見见言長长高新知道所前分同事者十二三第，。、：；！？「」《》“”")
COMMON |= {chr(i) for i in range(0x3041, 0x30fd)}  # Japanese syllables


def open_text(raw):
    """Text of a byte stream, its encoding told by how it begins. Bytes that do not fit into that come as surrogates,
    for repair() to look at line by line."""
    raw = io.BufferedReader(raw, 1 << 16)
    head = raw.peek()
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return io.TextIOWrapper(raw, "utf-16", errors="replace", newline="")
    encoding = "utf-8-sig"
    # a program, a picture or an archive is full of bytes that stand for nothing in a text; UTF-16 of zeros
    strange = sum(head.count(byte) for byte in (*range(9), *range(14, 32)))
    if not decodes(head, "utf-8"):
        encoding = guess_encoding(head) or encoding
        strange *= 10
    if strange > len(head) // 3:
        raise Skip("binary file", "it is full of bytes that no text has (UTF-16 must begin with its byte order mark)")
    return io.TextIOWrapper(raw, encoding, errors="surrogateescape", newline="")


def decodes(data, encoding):
    """Whether bytes are text in this encoding; a character cut off at their end is fine."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(data)
        return True
    except UnicodeDecodeError:
        return False


def guess_encoding(data):
    """The East Asian encoding in which bytes that are not UTF-8 read like text, or None.

    Almost any two bytes are some character in each of these. But a quarter or more of the characters of a real text are
    COMMON, and less than an eighth where it is read in a wrong encoding.
    """
    # A line of a few words may do without these. It is GB18030 if it keeps to the 6,763 characters of GB2312: two bytes
    # from 0xA1 on each, as the others do not for long.
    is_simple = decodes(data, "gb2312")
    if is_simple and len(data) < 40:
        return "gb18030"
    shares = {}
    for encoding in EAST_ASIAN:
        if decodes(data, encoding):
            characters = [c for c in data.decode(encoding, "ignore") if c > "\x7f"]
            shares[encoding] = sum(c in COMMON for c in characters) / max(len(characters), 1)
    best = max(shares, key=shares.get, default=None)
    if best and shares[best] > 0.15:
        return best
    # nor is a list of names full of them; in Korean, which is as simple, none would be among these characters
    return "gb18030" if is_simple and shares["gb18030"] > 0.01 else None


def has_surrogates(text):
    """Whether a text holds halves of characters: bytes that could not be read, or broken JSON escapes."""
    try:
        text.encode()
        return False
    except UnicodeEncodeError:
        return True


def repair(line, encoding):
    """A line as its own bytes say: files glued from several sources change their encoding midway.

    Text in an East Asian encoding is almost never valid UTF-8; where it may be, in lines of a few characters, the
    file's encoding decides.
    """
    fits = not has_surrogates(line)
    if fits and (encoding not in EAST_ASIAN or len(line) <= 4):
        return line
    data = line.encode(encoding.removesuffix("-sig"), "surrogateescape")
    if decodes(data, "utf-8"):
        return data.decode("utf-8", "ignore")
    if fits:
        return line
    guess = guess_encoding(data)
    if not guess:
        raise Skip("wrong encoding", f"neither UTF-8, GB18030, Big5 nor Shift-JIS: {data[:40]!r}")
    return data.decode(guess, "ignore")


# ---------------------------------------------------------------------------- formats


def read_txt(raw, txt_document):
    f = open_text(raw)
    if txt_document == "blank" and re.search(rb"<\|endoftext\|>\s*?(\n|$)", f.buffer.peek()):
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


DECODER = json.JSONDecoder(strict=False)  # a line break inside a string is no reason to lose it
BROKEN = (ValueError, RecursionError)  # what it raises: a number of 5,000 digits and 2,000 nested lists are broken too


def breaks_off(error, text):
    """Whether what follows `text` could mend this error: then it is not wrong but cut off."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    # in a string, or in a word such as "false" or an escape such as "\\u5e8a" at the very end
    tail = text[error.pos:]
    return error.msg.startswith("Unterminated string") or len(tail) < 16 and not re.search(r"[\]}]", tail)


def read_jsonl(raw, _):
    f = open_text(raw)
    for number, line in enumerate(f, 1):
        try:
            text = repair(line, f.encoding).strip(" \t\r\n\0\ufeff")
            if text:
                yield number, DECODER.decode(text)
        except Skip as e:
            yield number, e
        except BROKEN as e:
            if not line.endswith(("\n", "\r")) and breaks_off(e, text):
                raise EOFError(f"line {number} does not end") from e
            hint = "; an array, or objects over several lines? Then call the file .json" if text in ("[", "{") else ""
            yield number, Skip("broken JSON", f"{e} in {text[:60]!r}{hint}")


def read_json(raw, _):
    """An array of records, one object, or JSON lines under the wrong name. Values are parsed one at a time from a
    buffer, so a file of any size is streamed; after a broken one it goes on at the next object."""
    f = open_text(raw)
    between = re.compile(r"[\s,\]}\0\ufeff]*")
    next_object = re.compile(r"\n[ \t]*(?=\{)|\},\s*(?=\{)")
    buffer = f.read(1 << 20)
    position = 0
    closed = True  # whether the array has ended, or there is none
    if buffer.lstrip("\ufeff \t\r\n").startswith("["):
        position = buffer.index("[") + 1
        closed = False
    is_array = not closed

    def refill():
        """Drop what is done and read on; False at the end of the file."""
        nonlocal buffer, position
        chunk = f.read(max(1 << 20, len(buffer) - position))  # doubling: a long record is not parsed again too often
        buffer = buffer[position:] + chunk
        position = 0
        return bool(chunk)

    number = 1
    while True:
        # what stands between two records; the array may end here
        end = between.match(buffer, position).end()
        closed = closed or "]" in buffer[position:end]
        position = end
        if position == len(buffer):
            if refill():
                continue
            if closed:
                return
            raise EOFError("the array does not end")
        try:
            start = position
            record, position = DECODER.raw_decode(buffer, start)
            closed = not is_array
            if has_surrogates(buffer[start:position]):
                record = DECODER.decode(repair(buffer[start:position], f.encoding))
        except Skip as e:
            record = e  # not even repair() can read its bytes
        except BROKEN as e:
            # it may go on behind the end of the buffer
            unfinished = breaks_off(e, buffer)
            if unfinished and len(buffer) - position < 1 << 26 and refill():
                continue
            record = Skip("broken JSON", f"{e} in {buffer[position:position + 60]!r}")
            match = next_object.search(buffer, position + 1)
            while not match:
                position = max(position, len(buffer) - 1000)
                if not refill():
                    if unfinished:
                        raise EOFError(f"record {number} does not end") from e
                    position = len(buffer)
                    closed = True
                    break
                match = next_object.search(buffer, position)
            if match:
                position = match.end()
        yield f"record {number}", record
        number += 1


def read_csv(raw, _):
    csv.field_size_limit(1 << 26)
    f = open_text(raw)

    taken = []  # the bytes of the lines of a row

    def lines():
        for line in f:
            taken.append(len(line.encode(errors="replace")))
            try:
                yield repair(line, f.encoding).replace("\0", "")
            except Skip:
                yield line  # a row may have many lines, so it is judged below

    # what separates the names in the header separates the fields
    head = f.buffer.peek().decode(f.encoding, "ignore")
    header = re.sub('"[^"]*"', "", head).splitlines() or [""]
    separator = "\t" if "\t" in header[0] else max(",;", key=header[0].count)
    # in most files with tabs, quotes are no more than that
    is_quoted = separator != "\t" or re.search('(^|\t)"[^"\t]*"(\t|\r|$)', head, re.MULTILINE)
    quoting = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    rows = csv.DictReader(lines(), restkey="more", delimiter=separator, strict=True, quoting=quoting)
    while True:
        taken.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            if "expected after" not in str(e):
                # a quote that never closes has swallowed all that follows
                raise EOFError(f"{e}: the quote that opens in line {rows.line_num} or before does not close") from e
            detail = f'{e}: a quote inside of a text in quotes must be written twice, ""'
            if len(taken) > 1:
                detail += f"; or one that opens {len(taken) - 1} lines before does not close, and all of them are lost"
            yield rows.line_num, Skip("broken CSV", detail, lost=sum(taken[1:]))
            continue
        more = row.get("more")
        if isinstance(more, list) and not any(more):
            del row["more"]  # separators at the end of a line
        elif isinstance(more, list):
            n = len(row) - 1
            row = Skip("broken CSV", f"{n + len(more)} fields, but the header names {n}: quotes must stand around a "
                       f"text with {separator!r} in it")
        elif has_surrogates("".join(map(str, row.values()))):
            row = Skip("wrong encoding", f"{row!a:.60}")
        yield rows.line_num, row


def read_parquet(raw, _):
    import pyarrow.parquet
    number = 0
    for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=256):
        for record in batch.to_pylist():
            number += 1
            yield f"row {number}", record


READERS = {
    ".txt": read_txt, ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv,
    ".tsv": read_csv, ".parquet": read_parquet}
