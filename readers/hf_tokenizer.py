"""
The vocabulary of a folder of transformers, as tokenizer.py keeps it: the bytes of a file, and settings for what the
file does not say.

    read_folder(folder, rules, ours)    a sentencepiece model as it is; a byte-level tokenizer.json (minimind, Qwen, Llama 3,
                                        GLM-4) as a tiktoken rank file; any other tokenizer.json as it is
    load_library(data, path)            such another one, through the tokenizers library

Ids are those that transformers gives: rank files are made only where merging by rank is the same as merging by list.
"""
import base64
import glob
import json
import os

from configurator import check

FILES = "tokenizer.model, tokenizer.json or a *.tiktoken rank file"


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
    if data.startswith(b"\n"):                          # sentencepiece, whatever tokenizer.json there is
        ids, tokens, words = sentencepiece_tokens(data, folder, tokens, words)
    elif theirs:
        ids = dict(theirs["model"]["vocab"]) if isinstance(theirs["model"]["vocab"], dict) else {}
        ranks = as_ranks(theirs, rules)
        data, settings = ranks or (canonical(theirs, ours), {})
        if not ranks:
            words = {}                                  # the library finds them
    else:
        check(data, f"{folder} has no vocabulary: neither {FILES}")
        ids = {}
    ids.update(tokens)

    if ours[0] not in ids:
        settings["end"] = end_of_text(folder, config, ids, ours) or ours[0]
    opening = opening_tokens(folder, theirs, config, ids)
    if opening:
        settings["start"] = opening
    if not data.startswith(b"\n"):
        tokens.update((name, ids[name]) for name in [settings.get("end", ours[0]), *opening] if name in ids)
    settings.update({name: found for name, found in (("tokens", tokens), ("words", words)) if found})
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
        names = [text_of(config.get("bos_token"))] + [name_of.get(i) for i in model_ids(folder, "bos_token_id")]
        bos = [name for name in names if name in ids][:1]
        return bos if config.get("add_bos_token", True) else []
    steps = theirs.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        if step.get("type") == "TemplateProcessing":
            opening = []
            for part in step["single"]:
                if "SpecialToken" not in part:
                    break
                opening += step["special_tokens"][part["SpecialToken"]["id"]]["tokens"]
            return opening
    return []


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
    steps = steps_of(theirs.get("pre_tokenizer"), "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return next(rule for rule in rules if rule.startswith("'(?:"))      # GPT-2's, built in there
    if len(steps) == 2 and not steps[1].get("use_regex", True) and steps[0]["type"] == "Split":
        split = steps[0]
        pattern = split["pattern"].get("Regex")
        if pattern in rules and split["behavior"] == "Isolated" and not split.get("invert"):
            return pattern
    return None


def as_ranks(theirs, rules):
    """Return (rank file, settings) of a byte-level BPE, None where it is something else, or merges in another order."""
    model = theirs["model"]
    rule = cutting_rule(theirs, rules)
    normalizers = [step["type"] for step in steps_of(theirs.get("normalizer"), "normalizers")]
    others = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or not rule or normalizers not in ([], ["NFC"]) or any(map(model.get, others)):
        return None
    added = theirs.get("added_tokens", [])
    if any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word")):
        return None
    names = {token["content"] for token in added}
    ranks = {piece: i for piece, i in model["vocab"].items() if piece not in names}
    # tiktoken merges whatever makes the lowest id, so the ids must rise along the list of merges
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merged = [ranks.get(left + right, -1) for left, right in pairs]
    letters = byte_letters()
    taken = set(ranks.values()) | {token["id"] for token in added}
    if merged != sorted(merged) or -1 in merged or not ranks.keys() >= set(letters.values()) \
            or taken != set(range(len(taken))):
        return None
    byte_of = {letter: byte for byte, letter in letters.items()}
    lines = []
    for piece in sorted(ranks, key=ranks.get):
        token = bytes(byte_of[letter] for letter in piece)
        lines.append(base64.b64encode(token) + b" %d\n" % ranks[piece])
    return b"".join(lines), {"rule": rule, **({"nfc": True} if normalizers else {})}


# ---------------------------------------------------------------------------- any other


def canonical(theirs, ours):
    """Return the bytes of a tokenizer.json without what decides no ids of a text, nor the tokens that we have added."""
    added = list(theirs.get("added_tokens", []))
    while added and added[-1]["content"] in ours:
        added.pop()
    kept = {"version": theirs.get("version", "1.0"), "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": theirs.get("normalizer"), "pre_tokenizer": theirs.get("pre_tokenizer"), "post_processor": None,
            "decoder": theirs.get("decoder"), "model": theirs.get("model")}
    return json.dumps(kept, ensure_ascii=False).encode()


def load_library(data, path):
    """Return what a Tokenizer needs of a tokenizer.json: encode, pieces {id: bytes}, dummy_prefix, unk_id."""
    try:
        import tokenizers
    except ImportError:
        check(False, f"{path} is read by the package tokenizers: pip install tokenizers")
    theirs = json.loads(data)
    try:
        library = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:
        raise ValueError(f"{path}: the tokenizers library cannot read tokenizer.json: {error}") from error
    library.encode_special_tokens = True        # a text that names one is a text like any other
    special = {token["id"] for token in theirs["added_tokens"]}
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps_of(theirs["pre_tokenizer"], "pretokenizers"))
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    pieces = {}
    for piece, i in library.get_vocab(with_added_tokens=True).items():
        if i in special:
            pieces[i] = piece.encode()
        elif is_byte_level:
            pieces[i] = bytes(byte_of[letter] for letter in piece)
        elif len(piece) == 6 and piece.startswith("<0x") and theirs["model"].get("byte_fallback"):
            pieces[i] = bytes([int(piece[3:5], 16)])
        else:
            pieces[i] = piece.replace("▁", " ").encode()

    def encode(text):
        return library.encode(text, add_special_tokens=False).ids

    # the text of the ids must be the text, but for a space before it
    sample = "床前 moon\n"
    back = b"".join(pieces[i] for i in encode(sample)).decode(errors="replace")
    check(back.removeprefix(" ") == sample, f"{path}: this vocabulary turns {sample!r} into {back!r}, so a model that "
          "learned it could not write it. Take one that keeps line breaks and spaces")
    unknown = library.token_to_id(theirs["model"].get("unk_token") or "")
    spelled = is_byte_level or theirs["model"].get("byte_fallback")
    return {"encode": encode, "pieces": pieces, "dummy_prefix": back != sample, "unk_id": None if spelled else unknown}
