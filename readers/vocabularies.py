"""
Vocabularies of others, opened once, by prepare.py --tokenizer: what a data folder then holds, tokenizer.py can load.

    open_vocabulary(path)    a sentencepiece .model (ChatGLM2/3, Llama 2) or a tiktoken rank file (Qwen, Llama 3, GLM-4,
                             cl100k), told apart by content; a folder with one of these, or of transformers
"""
import base64
import os
import re

from configurator import check
from readers.hf_tokenizer import read_folder
from tokenizer import HEADER, SPECIAL_TOKENS, load_tokenizer, make_tokenizer

# How tiktoken cuts a text before it merges. The rank files come without it, so it is told by the number of ranks.
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # digits in threes
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # minimind, too
PATTERNS = {
    151_643: QWEN_PATTERN,
    128_000: LLAMA3_PATTERN,
    151_329: LLAMA3_PATTERN,  # GLM-4
    100_256: LLAMA3_PATTERN,  # cl100k
}
LLAMA3_SPECIALS = (
    "<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)))


def open_vocabulary(path):
    """Return the Tokenizer of a vocabulary file or of a folder."""
    path = os.fspath(path)
    folder = os.path.dirname(path) if path.endswith("tokenizer.json") else path
    theirs = ("tokenizer.json", "tokenizer_config.json", "config.json")
    if any(os.path.exists(os.path.join(folder, name)) for name in theirs):
        path = folder
        data, settings = read_folder(folder, [QWEN_PATTERN, LLAMA3_PATTERN, GPT2_PATTERN], SPECIAL_TOKENS)
    else:
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.model")
        if not os.path.exists(path):
            raise FileNotFoundError(f"no tokenizer at {path}: give a sentencepiece .model, a tiktoken rank file, or a "
                                    "folder that holds tokenizer.model or tokenizer.json")
        with open(path, "rb") as f:
            data = f.read()
        settings = {}
    if data.startswith(HEADER):
        return load_tokenizer(path)  # ours already
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data):
        settings = rank_settings(data, settings, path)
    try:
        tok = make_tokenizer(data, settings, path)
    except ImportError:
        check(False, f"{path} is read by the package tokenizers: pip install tokenizers")
    except ValueError:
        raise
    except Exception as error:  # the library knows no other
        raise ValueError(f"{path}: the tokenizers library cannot read its tokenizer.json: {error}") from error
    if data.startswith(b"{"):
        # the text of the ids must be the text
        sample = "床前 moon\n"
        back = tok.decode(tok.encode(sample))
        check(back == sample, f"{path}: this vocabulary turns {sample!r} into {back!r}, so a model that learned it could "
              "not write it. Take one that keeps line breaks and spaces")
    return tok


def rank_settings(data, settings, path):
    """Return the settings of a rank file with the rule that cuts its text, and Llama 3's special tokens. Exits where
    tokens are missing."""
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        if line:
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: not a base64 token and its rank, but {line[:60]!r}") from e
    pieces = {rank: token for token, rank in ranks.items()}
    # special tokens may stand before the ranks
    taken = {*pieces, *settings.get("tokens", {}).values(), *settings.get("words", {}).values()}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(pieces) < len(ranks) or not taken.issuperset(range(max(pieces))):
        raise ValueError(f"{path}: not a whole rank file: ranks must run from 0 without gaps, and all 256 bytes be "
                         f"there ({len(missing)} bytes are missing)")
    settings = {**settings, "rule": settings.get("rule") or rule_of(pieces, path)}
    if len(pieces) == 128_000 and "tokens" not in settings:
        settings["tokens"] = {name: 128_000 + i for i, name in enumerate(LLAMA3_SPECIALS)}
    return settings


def rule_of(pieces, path):
    """The rule of a rank file. Of an unknown family the tokens tell whether it cuts digits one by one, as Qwen does."""
    if len(pieces) in PATTERNS:
        return PATTERNS[len(pieces)]
    several = [piece for piece in pieces.values() if re.fullmatch(rb" ?\d\d+", piece)]
    if several:
        raise ValueError(f"{path}: {len(pieces):,} ranks, some of several digits like {several[0]!r}: nothing tells "
                         f"how it cuts text. Known are {', '.join(map(str, PATTERNS))} ranks (Qwen, Llama 3, GLM-4, "
                         "cl100k); of others give the folder with tokenizer.json")
    return QWEN_PATTERN
