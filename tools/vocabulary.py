"""
The vocabularies that tokenizer.py reads, as other programs write them.

    vocabulary(tok)        every piece with its score and kind: what a GGUF file holds
    tokenizer_json(tok)    the dict of transformers' tokenizer.json
    rank_file(dict)        the way back: a byte-level tokenizer.json (Qwen, Llama 3) as a tiktoken rank file

Plain protobuf and JSON: no library of the other side is needed. A text must get the same ids on both sides, so a
vocabulary that cannot promise that is refused.
"""
import base64
import json
import struct
from typing import NamedTuple

from configurator import check
from tokenizer import LLAMA3_PATTERN, LLAMA3_RANKS, QWEN_PATTERN

# kinds of a piece, numbered as in sentencepiece and in GGUF
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """An entry of a vocabulary; its id is its place."""
    text: str
    score: float
    kind: int


# ---------------------------------------------------------------------------- protobuf


def read_varint(message, at):
    """Return a number written in 7 bits a byte, lowest first, and where it ends; the top bit says that more follow."""
    value = 0
    shift = 0
    while message[at] >= 128:
        value |= (message[at] & 127) << shift
        shift += 7
        at += 1
    return value | message[at] << shift, at + 1


def protobuf_fields(message):
    """Yield (number, value) for the fields of a protobuf message: numbers, or bytes for texts and messages inside."""
    at = 0
    while at < len(message):
        key, at = read_varint(message, at)
        number, wire_type = divmod(key, 8)
        if wire_type == 0:
            value, at = read_varint(message, at)
        elif wire_type == 2:
            size, at = read_varint(message, at)
            value = message[at:at + size]
            at += size
        elif wire_type == 5:
            value = struct.unpack("<f", message[at:at + 4])[0]
            at += 4
        else:
            raise ValueError(f"a sentencepiece model has no field of wire type {wire_type}")
        yield number, value


# ---------------------------------------------------------------------------- sentencepiece and tiktoken


def is_tiktoken(tok):
    # a sentencepiece model begins with field 1, its first piece: byte 0x0A. A rank file begins with base64
    return tok.data[:1] != b"\n"


def sentencepieces(tok):
    """Return the pieces of a sentencepiece model, or exit where it does more than merge pieces.

    The numbers are those of the fields in sentencepiece_model.proto.
    """
    pieces = []
    trainer = {}
    normalizer = {}
    for number, value in protobuf_fields(tok.data):
        if number == 1:
            piece = dict(protobuf_fields(value))
            pieces.append(Piece(piece[1].decode(), piece.get(2, 0.0), piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(protobuf_fields(value))
        elif number == 3:
            normalizer = dict(protobuf_fields(value))
    is_bpe = trainer.get(3, 1) == 2                         # model_type: unigram where it is left out
    byte_fallback = trainer.get(35, 0)
    rewrites = normalizer.get(2) or normalizer.get(4, 1)    # precompiled_charsmap, remove_extra_whitespaces
    check(is_bpe, "this sentencepiece model is no BPE (but unigram, words or characters): it cannot be exported")
    check(byte_fallback, "this sentencepiece model has no byte fallback, so it cannot spell unknown characters and "
          "cannot be exported. prepare.py trains vocabularies that can be")
    check(not rewrites, "this sentencepiece model rewrites its text first (normalization, spaces removed), so other "
          "programs would not find the same ids: it cannot be exported")
    return pieces


def byte_letters():
    """Return {byte: letter}: GPT-2's way to write any bytes as visible text. Visible Latin-1 characters stand for
    themselves, the other bytes for the letters from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    letters.update({byte: chr(256 + i) for i, byte in enumerate(hidden)})
    return letters


def vocabulary(tok):
    """Return every Piece of a Tokenizer, chat tokens included. Pieces of a rank file are written in byte_letters."""
    pieces = []
    if is_tiktoken(tok):
        letters = byte_letters()
        for i in range(count_ranks(tok)):
            text = "".join(letters[byte] for byte in tok.pieces[i])
            pieces.append(Piece(text, 0.0, NORMAL))
    else:
        pieces = sentencepieces(tok)
    # what the file itself lacks, tokenizer.py has put behind it
    for i in range(len(pieces), tok.vocab_size):
        pieces.append(Piece(tok.special_names[i], 0.0, CONTROL))
    return pieces


def merges(pieces):
    """Return the pairs [left, right] to merge, the first ones first.

    Neither file names its pairs: whatever two pieces make a third one may be merged, the best third first (the highest
    score, or the lowest rank). So each piece stands for all its cuts into two.
    """
    normal = [piece for piece in pieces if piece.kind == NORMAL]
    normal.sort(key=lambda piece: -piece.score)     # stable: the scores of a rank file are equal, its order stays
    texts = {piece.text for piece in normal}
    pairs = []
    for piece in normal:
        for cut in range(1, len(piece.text)):
            left = piece.text[:cut]
            right = piece.text[cut:]
            if left in texts and right in texts:
                pairs.append([left, right])
    return pairs


def count_ranks(tok):
    return len(tok.pieces) - len(tok.special_names)


def tiktoken_pattern(n_ranks):
    """Return (how a text is cut before merging, llama.cpp's name for it), chosen by the number of ranks as tokenizer.py
    does: the files themselves do not say."""
    return (LLAMA3_PATTERN, "llama-bpe") if n_ranks == LLAMA3_RANKS else (QWEN_PATTERN, "qwen2")


# ---------------------------------------------------------------------------- tokenizer.json


def tokenizer_json(tok):
    """Return the vocabulary as the dict that transformers reads from tokenizer.json."""
    pieces = vocabulary(tok)
    added = []
    for i, piece in enumerate(pieces):
        if piece.kind in (CONTROL, USER_DEFINED):
            # found in the text before any merging; special ones only where the caller lets a text name them
            added.append({
                "id": i,
                "content": piece.text,
                "special": piece.kind == CONTROL,
                "normalized": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            })
    model = {
        "type": "BPE",
        "byte_fallback": False,
        "ignore_merges": False,
        "fuse_unk": False,
        "unk_token": None,
        "dropout": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    theirs = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": model,
    }
    if is_tiktoken(tok):
        pieces = pieces[:count_ranks(tok)]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        pattern, _ = tiktoken_pattern(count_ranks(tok))
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        theirs["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        theirs["decoder"] = byte_level
        model["ignore_merges"] = True       # as tiktoken: a word that is a piece is taken whole
    else:
        # sentencepiece writes spaces as "▁". With real ones no normaliser is needed, and a "▁" in a text is no space
        in_file = pieces[:len(sentencepieces(tok))]
        pieces = [piece._replace(text=piece.text.replace("▁", " ")) for piece in in_file]
        decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}]
        if tok.dummy_prefix:
            # such vocabularies (Llama 2) do take a "▁" for a space, and put one before the text
            as_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
            theirs["normalizer"] = {"type": "Sequence", "normalizers": [as_space, {"type": "Prepend", "prepend": " "}]}
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        theirs["decoder"] = {"type": "Sequence", "decoders": decoders}
        model["byte_fallback"] = True
        model["unk_token"] = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    model["vocab"] = {piece.text: i for i, piece in enumerate(pieces)}
    model["merges"] = merges(pieces)
    return theirs


def rank_file(theirs):
    """Return the bytes of a tiktoken rank file for the dict of a byte-level tokenizer.json (Qwen, Llama 3)."""
    model = theirs["model"]
    special = {token["content"] for token in theirs["added_tokens"]}
    ranks = {piece: i for piece, i in model["vocab"].items() if piece not in special}
    rules = json.dumps(theirs.get("pre_tokenizer"))
    pattern, _ = tiktoken_pattern(len(ranks))
    check(model.get("type") == "BPE" and "ByteLevel" in rules and json.dumps(pattern) in rules,
          "tokenizer.json is no byte-level BPE that cuts text as Qwen or Llama 3 do. If the model came with a "
          "sentencepiece or rank file, put that beside it as tokenizer.model")
    # tiktoken merges whatever makes the lowest id, so the ids must rise along the list of merges
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merged = [ranks.get(left + right, -1) for left, right in pairs]
    rising = merged == sorted(merged) and -1 not in merged
    check(rising and sorted(ranks.values()) == list(range(len(ranks))),
          "tokenizer.json numbers its tokens in another order than it merges them, so there is no rank file for it")
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    lines = []
    for piece in sorted(ranks, key=ranks.get):
        token = bytes(byte_of[letter] for letter in piece)
        lines.append(base64.b64encode(token) + b" %d\n" % ranks[piece])
    return b"".join(lines)
