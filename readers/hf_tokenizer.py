"""
The vocabulary of a folder of transformers, as tokenizer.py keeps it: the bytes of a file, and settings for what the
file does not say.

    read_folder(folder, rules, ours)    a sentencepiece model as it is; a byte-level tokenizer.json (minimind, Qwen,
                                        Llama 3, GLM-4) as a tiktoken rank file; any other tokenizer.json as it is
    load_library(data)                  such another one, through the tokenizers library
    follow(encode, settings)            what settings do to a text before it is encoded

Ids are those that transformers gives: rank files are made only where merging by rank is the same as merging by list.
"""
import base64
import glob
import json
import os
import re
import unicodedata

from configurator import check

FILES = "tokenizer.model, tokenizer.json or a *.tiktoken rank file"


def follow(encode, settings):
    """Return encode(text) with what the settings of a Tokenizer do first: words are found, accents composed."""
    words = settings.get("words", {})
    longest_first = sorted(words, key=len, reverse=True)
    pattern = re.compile("(%s)" % "|".join(map(re.escape, longest_first)))

    def encode_part(text):
        return encode(unicodedata.normalize("NFC", text) if settings.get("nfc") else text)

    def encode_all(text):
        ids = []
        for part in pattern.split(text):
            ids += [words[part]] if part in words else encode_part(part)
        return ids

    return encode_all if words else encode_part


def read_json(folder, name):
    """Return the dict in folder/name, an empty one where there is no such file."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_folder(folder, rules, ours):
    """Return (bytes of a vocabulary file, settings of a Tokenizer).

    rules: the regular expressions that may cut the text of a rank file. ours: SPECIAL_TOKENS of tokenizer.py.
    """
    theirs = read_json(folder, "tokenizer.json")
    config = read_json(folder, "tokenizer_config.json")
    data = read_model(folder)
    tokens, words = added_tokens(folder, theirs, config)
    settings = {}
    if data.startswith(b"\n"):                  # sentencepiece, whatever tokenizer.json there is
        ids, tokens, words = sentencepiece_tokens(data, folder, tokens, words)
    elif theirs:
        vocab = theirs["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {}
        ranks = as_ranks(theirs, rules)
        if ranks:
            data, settings = ranks
        else:
            data = canonical(theirs, ours)
            words = {}                          # the library finds them
    else:
        check(data, f"{folder} has no vocabulary: neither {FILES}")
        ids = {}
    ids.update(tokens)

    # what opens a document and what ends it
    end = ours[0]
    if end not in ids:
        end = end_of_text(folder, config, ids, ours) or end
        settings["end"] = end
    opening = opening_tokens(folder, theirs, config, ids)
    if opening:
        settings["start"] = opening
    if not data.startswith(b"\n"):
        tokens.update((name, ids[name]) for name in [end, *opening] if name in ids)
    for name, found in (("tokens", tokens), ("words", words)):
        if found:
            settings[name] = found
    return data, settings


def read_model(folder):
    """Return the bytes of the sentencepiece model or rank file in a folder, none where there is neither."""
    paths = [os.path.join(folder, "tokenizer.model"), *glob.glob(os.path.join(glob.escape(folder), "*.tiktoken"))]
    for path in filter(os.path.exists, paths):
        with open(path, "rb") as f:
            return f.read()
    return b""


def sentencepiece_tokens(data, folder, tokens, words):
    """Return {name: id} of a sentencepiece model's control pieces, and of tokens and words those that it lacks."""
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    control = {sp.id_to_piece(i): i for i in range(sp.vocab_size()) if sp.is_control(i)}
    for name, i in {**tokens, **words}.items():
        if i < sp.vocab_size():
            piece = sp.id_to_piece(i)
            check(name in (piece, piece.replace("▁", " ")),
                  f"{folder}: {name} has the id {i}, which is {piece!r} in tokenizer.model")
    tokens = {name: i for name, i in tokens.items() if name not in control and i != sp.unk_id()}
    words = {name: i for name, i in words.items() if i >= sp.vocab_size()}
    return control, tokens, words


# ---------------------------------------------------------------------------- special tokens


def text_of(token):
    """A token is a text, or a dict that says how it is looked for."""
    return token.get("content") if isinstance(token, dict) else token


def added_tokens(folder, theirs, config):
    """Return ({name: id} of the special tokens, {name: id} of words that a text may name), from wherever they stand."""
    tokens = {}
    words = {}
    listed = [(token["id"], token) for token in theirs.get("added_tokens", [])]
    listed += [(int(i), token) for i, token in config.get("added_tokens_decoder", {}).items()]
    listed += [(i, {"content": name, "special": True}) for name, i in read_json(folder, "added_tokens.json").items()]
    for i, token in listed:
        name = token["content"]
        if name not in tokens and name not in words:
            (tokens if token.get("special") else words)[name] = i
    return tokens, words


def model_ids(folder, name):
    """Return the ids that config.json and generation_config.json give to bos_token_id or eos_token_id."""
    found = []
    for file in ("config.json", "generation_config.json"):
        value = read_json(folder, file).get(name)
        found += value if isinstance(value, list) else [value]
    return [i for i in found if i is not None]


def end_of_text(folder, config, ids, ours):
    """Return the token that ends a document; None where the folder names none but the end of a chat's turn."""
    name_of = {i: name for name, i in ids.items()}
    names = [text_of(config.get("eos_token"))] + [name_of.get(i) for i in model_ids(folder, "eos_token_id")]
    return next((name for name in names if name in ids and name not in ours), None)


def opening_tokens(folder, theirs, config, ids):
    """Return the tokens that transformers puts before a text."""
    kind = config.get("tokenizer_class") or ""
    if not theirs or "add_bos_token" in config and kind.startswith(("Llama", "CodeLlama", "Gemma")):
        # these read the setting, and put the token where there is none
        name_of = {i: name for name, i in ids.items()}
        names = [text_of(config.get("bos_token"))]
        names += [name_of.get(i) for i in model_ids(folder, "bos_token_id")]
        bos = [name for name in names if name in ids]
        return bos[:1] if config.get("add_bos_token", True) else []
    steps = theirs.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        if step.get("type") == "TemplateProcessing":
            return tokens_before_text(step)
    return []


def tokens_before_text(template):
    """[{"SpecialToken": {"id": "<s>"}}, {"Sequence": …}, …] -> ["<s>"]"""
    opening = []
    for part in template["single"]:
        if "SpecialToken" not in part:
            break
        name = part["SpecialToken"]["id"]
        opening += template["special_tokens"][name]["tokens"]
    return opening


# ---------------------------------------------------------------------------- byte-level BPE as a rank file


def byte_letters():
    """Return {byte: letter}: GPT-2's way to write any bytes as visible text. Visible Latin-1 characters stand for
    themselves, the other bytes for the letters from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    letters.update({byte: chr(256 + i) for i, byte in enumerate(hidden)})
    return letters


def steps_of(part, name):
    """Return the steps of a normalizer or pre-tokenizer: none, one, or a sequence of them."""
    if not part:
        return []
    return part[name] if part["type"] == "Sequence" else [part]


def cutting_rule(theirs, rules):
    """Return which of rules cuts a byte-level tokenizer.json's text before it merges; None where another one does."""
    *before, last = steps_of(theirs.get("pre_tokenizer"), "pretokenizers") or [{"type": None}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    built_in = last.get("use_regex", True)
    if not before and built_in:
        return next(rule for rule in rules if rule.startswith("'(?:"))      # GPT-2's
    if len(before) != 1 or before[0]["type"] != "Split" or built_in:
        return None
    split = before[0]
    pattern = split["pattern"].get("Regex")
    keeps_all = split["behavior"] == "Isolated" and not split.get("invert")
    return pattern if pattern in rules and keeps_all else None


def as_ranks(theirs, rules):
    """Return (rank file, settings) of a byte-level BPE, None where it is something else, or merges in another order."""
    model = theirs["model"]
    rule = cutting_rule(theirs, rules)
    normalizers = [step["type"] for step in steps_of(theirs.get("normalizer"), "normalizers")]
    others = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if not rule or model.get("type") != "BPE" or any(map(model.get, others)) or normalizers not in ([], ["NFC"]):
        return None
    added = theirs.get("added_tokens", [])
    if any(token.get("lstrip") or token.get("rstrip") or token.get("single_word") for token in added):
        return None

    # tiktoken merges whatever makes the lowest id, so the ids must rise along the list of merges
    names = {token["content"] for token in added}
    ranks = {piece: i for piece, i in model["vocab"].items() if piece not in names}
    merged = []
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        merged.append(ranks.get(left + right, -1))
    letters = byte_letters()
    rising = merged == sorted(merged) and -1 not in merged
    taken = {*ranks.values(), *(token["id"] for token in added)}
    no_gaps = taken == set(range(len(taken)))
    if not rising or not no_gaps or not ranks.keys() >= set(letters.values()):
        return None

    byte_of = {letter: byte for byte, letter in letters.items()}
    lines = []
    for piece in sorted(ranks, key=ranks.get):
        token = bytes(byte_of[letter] for letter in piece)
        lines.append(base64.b64encode(token) + b" %d\n" % ranks[piece])
    settings = {"rule": rule}
    if normalizers:
        settings["nfc"] = True
    return b"".join(lines), settings


# ---------------------------------------------------------------------------- any other


def canonical(theirs, ours):
    """Return the bytes of a tokenizer.json without what decides no ids of a text, and without the tokens that an export
    of ours has added."""
    added = list(theirs.get("added_tokens", []))
    while added and added[-1]["content"] in ours:
        added.pop()
    kept = {
        "version": theirs.get("version", "1.0"),
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": theirs.get("normalizer"),
        "pre_tokenizer": theirs.get("pre_tokenizer"),
        "post_processor": None,
        "decoder": theirs.get("decoder"),
        "model": theirs.get("model"),
    }
    return json.dumps(kept, ensure_ascii=False).encode()


def load_library(data):
    """Return what a Tokenizer needs of a tokenizer.json: encode, pieces {id: bytes}, dummy_prefix, unk_id."""
    import tokenizers
    library = tokenizers.Tokenizer.from_str(data.decode())
    library.encode_special_tokens = True        # a text that names one is a text like any other

    def encode(text):
        return library.encode(text, add_special_tokens=False).ids

    theirs = json.loads(data)
    model = theirs["model"]
    is_byte_level = "ByteLevel" in json.dumps(theirs["pre_tokenizer"])
    spelled = is_byte_level or model.get("byte_fallback")
    added = {token["id"] for token in theirs["added_tokens"]}
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    pieces = {}
    for piece, i in library.get_vocab(with_added_tokens=True).items():
        if is_byte_level and i not in added:
            pieces[i] = bytes(byte_of[letter] for letter in piece)
        elif spelled and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            pieces[i] = bytes([int(piece[3:5], 16)])
        else:
            pieces[i] = piece.replace("▁", " ").encode()

    prefix = b"".join(pieces[i] for i in encode("moon")).startswith(b" ")  # some put a space before a text
    unknown = None if spelled else library.token_to_id(model.get("unk_token") or "")
    return {"encode": encode, "pieces": pieces, "dummy_prefix": prefix, "unk_id": unknown}
