"""
.jsonl and .json: a broken record costs no other one, and a file of any size is streamed.
"""
import json
import re

from readers.account import Skip
from readers.encodings import has_surrogates, open_text, repair


def make_object(pairs):
    """Return the dict of a JSON object. Python keeps the last of two equal keys: here they must not differ."""
    record = dict(pairs)
    if len(record) < len(pairs):
        for key, value in pairs:
            if record[key] != value:
                raise ValueError(f"the key {key!r} stands twice, with different values")
    return record


# a line break inside a string is no reason to lose it
DECODER = json.JSONDecoder(strict=False, object_pairs_hook=make_object)
BROKEN = (ValueError, RecursionError)  # what it raises: a number of 5,000 digits and 2,000 nested lists are broken too


def breaks_off(error, text):
    """Whether what follows `text` could mend this error: then it is not wrong but cut off."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    # in a string, or in a word such as "false" or an escape such as "\\u5e8a" at the very end
    tail = text[error.pos:]
    return error.msg.startswith("Unterminated string") or len(tail) < 16 and not re.search(r"[\]}]", tail)


def read_jsonl(raw, _):
    yield from read_lines(open_text(raw))


def read_lines(f):
    """Yield (number, record) of the lines of a text stream that open_text() made."""
    for number, line in enumerate(f, 1):
        try:
            text = repair(line, f.encoding).strip(" \t\r\n\0\x1e\ufeff")
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
            closed = closed or not is_array
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
