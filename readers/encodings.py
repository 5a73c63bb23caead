"""
Bytes to text: UTF-8, UTF-16, GB18030, Big5, Shift-JIS or EUC-JP, even if the encoding changes within a file.
"""
import codecs
import io

from readers.account import Skip


EAST_ASIAN = ("gb18030", "cp950", "cp932", "euc_jp")  # mainland China; Big5 of Taiwan; Shift-JIS and EUC-JP of Japan
COMMON = set("的一是不了在人有我他这這个個们們来來到时時大地为為子中你说說生国國年着就那和要她出也得里裏后後自以会會家可下而过過天去能"
             "對小多然于於心学學上之无無日云雲山水风風花月春本文字第回行見见言長长高新知道所前分同事者十二三第，。、：；！？「」《》“”")
COMMON |= {chr(i) for i in range(0x3041, 0x30fd)}  # Japanese syllables


def open_text(raw):
    """Text of a byte stream, its encoding told by how it begins. Bytes that do not fit into that come as surrogates,
    for repair() to look at line by line."""
    raw = io.BufferedReader(raw, 1 << 16)
    head = raw.peek()
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return io.TextIOWrapper(raw, "utf-32", errors="replace", newline="")
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
    # UTF-8 that was read as Latin-1 and written as UTF-8: all its characters are bytes of another UTF-8 text, the
    # highest of them one that a Chinese character begins with
    text = head.decode("utf-8", "ignore")
    twice = text.encode("latin-1", "replace")
    if "\xc3" <= max(text, default="") <= "\xf4" and decodes(twice, "utf-8"):
        raise Skip("UTF-8 written twice", f"{text[:20]!r} stands for {twice.decode('utf-8', 'ignore')[:9]!r}: iconv "
                   "-f UTF-8 -t ISO-8859-1 FILE > NEW")
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
