"""
Raw files to records, and records to what a stage learns from: every file format, encoding and schema there is.

    for where, record in read_file(path, raw):         # .txt .jsonl .json .csv .parquet, plain, .gz or .zst
        to_text(record)                                # "…"
        to_conversation(record)                        # [{"role": "user", "content": "…"}, …], ends with an answer
        to_question(record)                            # the same, ends with a question
        to_ranking(record)                             # {"prompt": messages, "answers": [best, …, worst], "tied": 0}

A record is a dict, and its fields tell its schema. What cannot be used becomes a Skip with the reason.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import unicodedata

MAX_CHARACTERS = 1_000_000  # longer documents of a .txt are cut at a line end, so a file of any size can be streamed


class Skip(Exception):
    """Why a record cannot be used: Skip(reason to count, detail to print). Readers yield it, converters raise it."""


# ---------------------------------------------------------------- reading files

def find_files(path):
    """Sorted paths of all readable files at `path`."""
    if not os.path.exists(path):
        raise ValueError(f"--input={path} does not exist (looked in {os.getcwd()}): give a file or a folder")
    found = [path] if os.path.isfile(path) else [os.path.join(folder, name) for folder, _, names in os.walk(path)
                                                 for name in names if not name.startswith(".")]
    files = sorted(file for file in found if extension(file) in READERS)
    if not files:
        endings = sorted({os.path.splitext(file)[1] or "none" for file in found})
        raise ValueError(f"--input={path} has no file to read: wanted {' '.join(READERS)}, plain, .gz or .zst; "
                         f"found {len(found)} files with endings: {' '.join(endings) or '-'}")
    return files


def extension(path):
    return os.path.splitext(re.sub(r"\.(gz|zst)$", "", path.lower()))[1]


def read_file(path, raw, txt_document="blank"):
    """Yield (where, record) of the file open as `raw`; a Skip takes the place of a record that cannot be read.
    txt_document: a document of a .txt ends at a "blank" line, at each "line", or with the "file"."""
    try:
        if path.lower().endswith(".gz"):
            raw = gzip.GzipFile(fileobj=raw)
        elif path.lower().endswith(".zst"):
            import zstandard
            raw = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(raw, read_across_frames=True)
        reader = READERS[extension(path)]
        for where, record in reader(raw, txt_document) if reader is read_txt else reader(raw):
            yield f"{path}:{where}", record
    except ImportError as e:
        raise ValueError(f"reading {path} needs a package: pip install {e.name}") from e
    except Skip as e:
        yield path, e
    except Exception as e:  # whatever a damaged file makes its reader raise: report it, keep what came before
        yield path, Skip("damaged file", f"{type(e).__name__}: {e}")


def open_text(raw):
    """Text of a byte stream: UTF-8, UTF-16 with a BOM, or GB18030, told by how it begins. Bytes that do not fit come as
    surrogates, for repair() to look at line by line."""
    raw = io.BufferedReader(raw, 1 << 16)
    head = raw.peek()
    encoding = "utf-8-sig"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in head:
        raise Skip("binary file", "it holds zero bytes")
    elif not decodes(head, "utf-8") and decodes(head, "gb18030"):
        encoding = "gb18030"
    return io.TextIOWrapper(raw, encoding, errors="surrogateescape", newline="")


def decodes(head, encoding):
    """Whether bytes are text in this encoding; a character cut off at their end is fine."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
        return True
    except UnicodeDecodeError:
        return False


def repair(line, encoding):
    """Files glued from several sources change their encoding midway, so a line is judged by its own bytes. Text in
    GB18030 is almost never valid UTF-8; where it may be, in lines of a few characters, the file's encoding decides."""
    try:
        line.encode()
        if encoding != "gb18030" or len(line) <= 4:
            return line
    except UnicodeEncodeError:
        pass
    data = line.encode(encoding.removesuffix("-sig"), "surrogateescape")
    for other in ("utf-8", "gb18030"):
        try:
            return data.decode(other)
        except UnicodeDecodeError:
            pass
    raise Skip("wrong encoding", f"neither UTF-8 nor GB18030: {data[:40]!r}")


def read_txt(raw, txt_document):
    f = open_text(raw)
    held, size, start, number = [], 0, 1, 1
    while line := f.readline(MAX_CHARACTERS):  # a line of gigabytes comes in parts
        try:
            held.append(repair(line, f.encoding))
        except Skip as e:
            yield number, e
        size += len(line)
        number += line.endswith(("\n", "\r"))
        if txt_document == "line" or txt_document == "blank" and not line.strip() or size >= MAX_CHARACTERS:
            if text := "".join(held).strip():
                yield start, text
            held, size, start = [], 0, number
    if text := "".join(held).strip():
        yield start, text


def read_jsonl(raw):
    decoder = json.JSONDecoder(strict=False)  # a newline inside a string is no reason to lose it
    f = open_text(raw)
    for number, line in enumerate(f, 1):
        try:
            line = repair(line, f.encoding).strip().lstrip("\ufeff")
            if line:
                yield number, decoder.decode(line)
        except Skip as e:
            yield number, e
        except (json.JSONDecodeError, RecursionError) as e:
            yield number, Skip("broken JSON", f"{e} in {line[:60]!r}")


def read_json(raw):
    """An array of records, one object, or JSON lines under the wrong name. Values are parsed one at a time from a
    buffer, so a file of any size is streamed; after a broken one it goes on at the next object."""
    f = open_text(raw)
    decoder = json.JSONDecoder(strict=False)
    between = re.compile(r"[\s,\]}\ufeff]*")
    next_object = re.compile(r"(?:\n|\},)\s*(?=\{)")
    buffer = f.read(1 << 20)
    is_array = buffer.lstrip("\ufeff \t\r\n").startswith("[")
    position = buffer.index("[") + 1 if is_array else 0
    closed = not is_array
    number = 1

    def refill():
        nonlocal buffer, position
        chunk = f.read(max(1 << 20, len(buffer) - position))  # doubling: a long record is not parsed again too often
        buffer, position = buffer[position:] + chunk, 0
        return chunk

    while True:
        end = between.match(buffer, position).end()
        closed = closed or "]" in buffer[position:end]
        position = end
        if position == len(buffer):
            if refill():
                continue
            if not closed:
                yield f"record {number}", Skip("damaged file", "the array does not end: was the file cut off?")
            return
        try:
            record, position = decoder.raw_decode(buffer, position)
            closed = not is_array
        except json.JSONDecodeError as e:
            unfinished = e.msg.startswith("Unterminated string") or e.pos > len(buffer) - 16
            if unfinished and len(buffer) - position < 1 << 26 and refill():
                continue
            record = Skip("broken JSON", f"{e.msg} in {buffer[position:position + 60]!r}")
            while not (match := next_object.search(buffer, position + 1)):
                position = max(position, len(buffer) - 1000)
                if not refill():
                    position, closed = len(buffer), True
                    break
            else:
                position = match.end()
        yield f"record {number}", record
        number += 1


def read_csv(raw):
    csv.field_size_limit(1 << 26)
    rows = csv.DictReader(open_text(raw))
    for row in rows:
        yield rows.line_num, row


def read_parquet(raw):
    import pyarrow.parquet
    number = 0
    for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=256):
        for record in batch.to_pylist():
            number += 1
            yield f"row {number}", record


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}


# ---------------------------------------------------------------- schemas: record → text, messages, or ranked answers

LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\ufeff\ufffe\uffff\ud800-\udc7f\udd00-\udfff]")
BLANK_LINES = re.compile("\n{3,}")


def clean(text):
    """NFC, line ends as \\n, no control characters, no spaces at line ends, at most one blank line in a row.
    Punctuation stays as it is: full-width forms are how Chinese is written."""
    text = CONTROLS.sub("", LINE_ENDS.sub("\n", text))
    text = "\n".join([line.rstrip() for line in unicodedata.normalize("NFC", text).split("\n")])
    return BLANK_LINES.sub("\n\n", text).strip("\n")


def first_of(record, *names):
    """The first of these fields that is there and not empty."""
    return next((record[name] for name in names if record.get(name)), "")


def to_text(record):
    """text | title + content | completion | title + summary + sections [{title, content}] (Baidu Baike)"""
    if isinstance(record, str):
        return clean(record)
    parts = [first_of(record, "text")]
    if not parts[0] and any(key in record for key in ("content", "summary", "sections")):
        parts = [record.get("title"), first_of(record, "content", "summary")]
        for section in record.get("sections") or []:
            parts += [section.get("title"), section.get("content")]
    if not any(parts):
        parts = [first_of(record, "completion")]
    if not any(parts) and not {"text", "content", "summary", "sections", "completion"} & set(record):
        raise Skip("no text field", f"the fields are {', '.join(map(str, record))}")
    return clean("\n".join(part for part in parts if part))


ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
         "bing": "assistant", "bard": "assistant", "model": "assistant", "function_call": "assistant",
         "system": "system", "tool": "tool", "observation": "tool", "function": "tool"}


def to_messages(value, role):
    """Messages of a string said by `role`, of one {role|from, content|value}, or of a list of them."""
    messages = []
    for turn in value if isinstance(value, list) else [value]:
        if isinstance(turn, str):
            turn = {"role": role, "content": turn}
        name, content = first_of(turn, "role", "from"), first_of(turn, "content", "value", "text")
        if str(name).lower() not in ROLES:
            raise Skip("unknown role", f"{name!r}, wanted one of {', '.join(ROLES)}")
        if isinstance(content, list):  # [{"type": "text", "text": …}]
            content = "".join(part.get("text", "") for part in content)
        messages.append({"role": ROLES[name.lower()], "content": clean(content).strip()})
    return messages


def to_prompt(record):
    """What comes before the answer: system, history [[question, answer]], and the question in any spelling:
    messages | conversations | prompt | question | query | instruction + input."""
    if isinstance(record, list):
        record = {"messages": record}
    messages = to_messages(record.get("system") or [], "system")
    for question, answer in record.get("history") or []:
        messages += to_messages(question, "user") + to_messages(answer, "assistant")
    turns = first_of(record, "messages", "conversations")
    if not turns:
        turns = first_of(record, "instruction", "prompt", "question", "query")
        if isinstance(turns, str):
            turns = "\n".join(part for part in (turns, record.get("input")) if part) or []
    return messages + to_messages(turns, "user")


def to_conversation(record):
    """A prompt and its answer (output | answer | response | completion), or a conversation; ends with an answer."""
    messages = to_prompt(record)
    if isinstance(record, dict):
        messages += to_messages(first_of(record, "output", "answer", "response", "completion") or [], "assistant")
    if not messages:
        names = ", ".join(map(str, record)) if isinstance(record, dict) else "none"
        raise Skip("no question and answer", f"the fields are {names}")
    messages = [m for m in messages if m["content"] or m["role"] != "system"]
    empty = next((i for i, m in enumerate(messages) if not m["content"]), len(messages))
    messages = until_answer(messages[:empty])
    if not any(m["role"] == "user" for m in messages):
        raise Skip("empty", "no question with an answer")
    return messages


def until_answer(messages):
    """Without the turns after the last answer: there is nothing to learn from them."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return messages


def to_question(record):
    """For PPO: any of the above up to the last question."""
    messages = [m for m in to_prompt(record) if m["content"]]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise Skip("no question", f"the fields are {', '.join(map(str, record))}")
    return messages


def to_ranking(record):
    """{"prompt": messages, "answers": [best, …, worst]} of a preference record:
    chosen + rejected|reject, or responses with ranks (1 is best) or with order (their indices, best first)."""
    prompt = to_prompt(record)
    if "responses" in record:
        answers = record["responses"]
        if record.get("ranks"):
            ranks = record["ranks"]
        else:
            order = record.get("order") or []
            ranks = [order.index(i) if i in order else None for i in range(len(answers))]
        if len(ranks) != len(answers) or None in ranks:
            raise Skip("no ranking", f"{len(answers)} responses, but ranks or order are {ranks}")
    else:
        answers, ranks = [record.get("chosen"), first_of(record, "rejected", "reject")], [0, 1]
    if not all(answers):
        raise Skip("no ranked answers", f"the fields are {', '.join(map(str, record))}")
    whole = []
    for _, answer in sorted(zip(ranks, answers), key=lambda pair: pair[0]):
        turns = to_messages(answer, "assistant")
        whole.append(turns if turns[:len(prompt)] == prompt else prompt + turns)  # some repeat the prompt
    prompts = [turns[:-1] for turns in whole]
    if any(prompt != prompts[0] or turns[-1]["role"] != "assistant" for prompt, turns in zip(prompts, whole)):
        raise Skip("answers to different prompts")
    if not prompts[0] or not all(m["content"] for turns in whole for m in turns):
        raise Skip("empty", "a question or an answer has no words")
    # "Best first" cannot say "equally good": of answers with one rank, or with the same words, the first stays.
    answers, seen_ranks, seen_words = [], set(), set()
    for rank, turns in zip(sorted(ranks), whole):
        if rank not in seen_ranks and turns[-1]["content"] not in seen_words:
            answers.append(turns[-1]["content"])
        seen_ranks.add(rank)
        seen_words.add(turns[-1]["content"])
    return {"prompt": prompts[0], "answers": answers, "tied": len(whole) - len(answers)}


CONVERTERS = {"text": to_text, "sft": to_conversation, "pairs": to_ranking, "prompts": to_question}
