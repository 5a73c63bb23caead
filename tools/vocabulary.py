"""
The vocabularies that tokenizer.py reads, as other programs write them.

    vocabulary(tok)               every piece with its score and kind: what a GGUF file holds
    tokenizer_json(tok, start)    the dict of transformers' tokenizer.json; start: ids that it puts before a text

Plain protobuf and JSON: no library of the other side is needed. A text must get the same ids on both sides, so a
vocabulary that cannot promise that is refused. The way back: readers/vocabularies.py.
"""
import json
import struct
from typing import NamedTuple

from configurator import check
from readers.hf_tokenizer import byte_letters
from readers.vocabularies import GPT2_PATTERN, LLAMA3_PATTERN, QWEN_PATTERN

# what llama.cpp calls the rules by which tokenizer.py cuts a text
LLAMA_CPP_RULES = {QWEN_PATTERN: "qwen2", LLAMA3_PATTERN: "llama-bpe", GPT2_PATTERN: "gpt-2"}

# kinds of a piece, numbered as in sentencepiece and in GGUF
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """An entry of a vocabulary; its id is its place."""
    text: str
    score: float
    kind: int


# ---------------------------------------------------------------------------- protobuf


def read_varint(message, at):
    """Return a number written in 7 bits per byte, lowest first, and where it ends; the top bit: more follow."""
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
    return tok.rule != ""       # the rule that cuts a text; sentencepiece models have none


def is_library(tok):
    """Whether it is a tokenizer.json that only the tokenizers library understands."""
    return tok.raw.startswith(b"{")


def sentencepieces(tok):
    """Return the pieces of a sentencepiece model, or exit where it does more than merge pieces.

    The numbers are those of the fields in sentencepiece_model.proto.
    """
    pieces = []
    trainer = {}
    normalizer = {}
    for number, value in protobuf_fields(tok.raw):
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


def vocabulary(tok):
    """Return every Piece of a Tokenizer, chat tokens included. Pieces of a rank file are written in byte_letters."""
    check(not is_library(tok), "this vocabulary is a tokenizer.json that is neither byte-level BPE of a known kind nor "
          "sentencepiece: it can be exported with --to=hf alone")
    pieces = {}
    if is_tiktoken(tok):
        letters = byte_letters()
        for i, token in tok.pieces.items():
            pieces[i] = Piece("".join(letters[byte] for byte in token), 0.0, NORMAL)
    else:
        pieces.update(enumerate(sentencepieces(tok)))
    # what the file itself lacks
    pieces.update((i, Piece(name, 0.0, USER_DEFINED)) for name, i in tok.words.items())
    pieces.update((i, Piece(name, 0.0, CONTROL)) for i, name in tok.special_names.items())
    return [pieces.get(i, unused(i)) for i in range(tok.vocab_size)]


def unused(i):
    """An id that no text yields and no token has."""
    return Piece(f"<|unused_{i}|>", 0.0, UNUSED)


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


# ---------------------------------------------------------------------------- tokenizer.json


def added_token(i, name, is_special):
    """An entry of added_tokens: found in a text before any merging; special ones only where the caller allows it."""
    flags = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    return {"id": i, "content": name, "special": is_special, **flags}


def put_before(tok, start):
    """The step of tokenizer.json that puts the tokens `start` (ids) before a text."""
    names = [tok.special_names[i] for i in start]
    opening = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in zip(names, start)}
    return {"type": "TemplateProcessing", "single": [*opening, first], "pair": [*opening, first, second],
            "special_tokens": tokens}


def tokenizer_json(tok, start=()):
    """Return the vocabulary as the dict that transformers reads from tokenizer.json."""
    if is_library(tok):
        theirs = json.loads(tok.raw)
        known = {token["id"] for token in theirs["added_tokens"]}
        new = sorted(tok.special_names.keys() - known - set(theirs["model"]["vocab"].values()))
        theirs["added_tokens"] += [added_token(i, tok.special_names[i], True) for i in new]
        theirs["post_processor"] = put_before(tok, start) if start else None
        return theirs
    pieces = vocabulary(tok)
    added = []
    for i, piece in enumerate(pieces):
        if piece.kind in (CONTROL, USER_DEFINED):
            added.append(added_token(i, piece.text, piece.kind == CONTROL))
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
        "normalizer": {"type": "NFC"} if tok.settings.get("nfc") else None,
        "pre_tokenizer": None,
        "post_processor": put_before(tok, start) if start else None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": model,
    }
    if is_tiktoken(tok):
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": tok.rule}, "behavior": "Isolated", "invert": False}
        theirs["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        theirs["decoder"] = byte_level
        model["ignore_merges"] = True       # as tiktoken: a word that is a piece is taken whole
    else:
        # sentencepiece writes spaces as "▁". With real ones no normaliser is needed, and a "▁" in a text is no space
        pieces = [piece._replace(text=piece.text.replace("▁", " ")) for piece in pieces]
        decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}]
        if tok.dummy_prefix:
            # such vocabularies (Llama 2) do take a "▁" for a space, and put one before the text
            as_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
            theirs["normalizer"] = {"type": "Sequence", "normalizers": [as_space, {"type": "Prepend", "prepend": " "}]}
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        theirs["decoder"] = {"type": "Sequence", "decoders": decoders}
        model["byte_fallback"] = True
        model["unk_token"] = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    # tokens behind the last piece are the library's own to count; those before it are part of the vocabulary
    last = max(i for i, piece in enumerate(pieces) if piece.kind not in (CONTROL, USER_DEFINED))
    model["vocab"] = {piece.text: i for i, piece in enumerate(pieces[:last + 1])}
    model["merges"] = merges(pieces)
    return theirs
