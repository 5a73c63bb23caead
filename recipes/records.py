"""
Raw files to records: every file format and encoding there is.

    with open(path, "rb") as raw:
        for where, record in read_file(path, raw):
            …                                          # a dict, a list, a text; or a Skip, where nothing can be read

.txt .jsonl .json .csv .parquet, plain or as .gz .bz2 .xz .zst; in UTF-8, UTF-16, GB18030, Big5, Shift-JIS or EUC-JP, even
if the encoding changes within a file. A damaged file gives all records before the damage, and a broken record costs no
other one. What the fields of a record mean is told by recipes/schemas.py.
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

from configurator import check, fail

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
    endings = sorted({os.path.splitext(file)[1] or "none" for file in found})
    check(files, f"--input={path} has no file to read: wanted {' '.join(READERS)}, plain or with {' '.join(UNPACKERS)}; "
          f"found {len(found)} files with endings: {' '.join(endings) or '-'}")
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
    reader = READERS[extension(path)]
    found = 0
    try:
        unpack = UNPACKERS.get(os.path.splitext(path.lower())[1], io.BufferedReader)
        for where, record in reader(unpack(raw), txt_document):
            found += 1
            yield f"{path}:{where}", record
    except ImportError as e:
        fail(f"reading {path} needs a package: pip install {e.name}")
    except Skip as e:
        e.lost = size
        yield path, e
    except Exception as e:
        # Whatever a damaged file makes its reader raise: what came before is kept, what comes after is lost. A file that
        # is cut off has been read to its end, and nobody knows how much is missing: that counts as half of it.
        position = raw.tell() if found else 0
        lost = size - position or size // 2
        where = f"{lost:,} of {size:,} bytes not read"
        if position == size:
            where = f"it breaks off, counted as {lost:,} bytes not read"
        yield path, Skip("damaged file", f"{type(e).__name__}: {e}; {where}", lost)


class ZstdFile(io.RawIOBase):
    """The bytes inside a .zst. zstandard's own reader does not say when a file is cut off."""

    def __init__(self, raw):
        import zstandard
        self.raw = raw
        self.start = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self.frame = None  # a file is a row of frames
        self.unpacked = b""

    def readable(self):
        return True

    def readinto(self, buffer):
        packed = b""
        while not self.unpacked:
            packed = packed or self.raw.read(1 << 14)
            if not packed:
                if self.frame is not None:
                    raise EOFError("the last frame does not end")
                return 0
            self.frame = self.frame or self.start()
            self.unpacked = self.frame.decompress(packed)
            packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        ...


UNPACKERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": ZstdFile}
