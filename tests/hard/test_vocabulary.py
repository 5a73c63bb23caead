"""Vocabularies of others: sentencepiece models, rank files, folders of transformers. Ids are theirs for any text."""
import base64
import io
import json
import random

import pytest
import sentencepiece
import tiktoken
from conftest import ROOT
from test_tokenizer import BITS, POEMS, TEXTS, TRAPS, streamed
from hypothesis import given, settings

from readers import vocabularies
from readers.vocabularies import GPT2_PATTERN, LLAMA3_PATTERN, QWEN_PATTERN
from readers.vocabularies import open_vocabulary as load_tokenizer
from tokenizer import StreamDecoder

# Written out once more, as the families publish them.
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
THREES = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # Llama 3, GLM-4, cl100k


def rank_file(path, size=0, digits=(b"12", b"123")):
    """A tiktoken rank file: all bytes, then parts of characters and words, then filler up to `size` ranks. Without a
    size it is of no known family, and may have no tokens of several digits."""
    tokens = [bytes([i]) for i in range(256)]
    for char in "床前明月光疑是地上霜举头望":
        tokens += [char.encode()[:2], char.encode()]
    tokens += ["明月".encode(), "床前".encode(), b"  ", b"    ", b"he", b"ll", b"hell", b" the", b"\n\n"]
    tokens += digits * bool(size)
    tokens = list(dict.fromkeys(tokens))
    tokens += [b"\xff\xfe" + str(i).encode() for i in range(size - len(tokens))]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    return {token: i for i, token in enumerate(tokens)}


def train_sentencepiece(path, texts=POEMS * 50, **changes):
    """A sentencepiece model as Llama 2's: dummy prefix, <s> </s>, no chat tokens."""
    model = io.BytesIO()
    usual = dict(vocab_size=380, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                 remove_extra_whitespaces=False, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, minloglevel=2,
                                             **{**usual, **changes})
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


# ---------------------------------------------------------------- files


def test_llama2_like_encodes_as_sentencepiece(tmp_path):
    sp = train_sentencepiece(tmp_path / "tokenizer.model")
    tok = load_tokenizer(tmp_path)
    base = sp.vocab_size()
    assert [tok.eot_id, tok.im_start_id, tok.im_end_id, tok.pad_id] == [base, base + 1, base + 2, base + 3]
    assert tok.vocab_size == base + 4
    for text in TRAPS + POEMS:
        assert tok.encode(text) == sp.encode(text)
        assert tok.decode(tok.encode(text)) == sp.decode(sp.encode(text))
        assert "".join(streamed(StreamDecoder(tok), tok.encode(text))) == tok.decode(tok.encode(text))
    assert tok.decode([sp.bos_id(), *tok.encode("明月"), tok.im_end_id], skip_special=True) == "明月"
    assert tok.decode(tok.encode("moon")) == "moon" and tok.decode(tok.encode("moon"), is_start=False) == " moon"


@pytest.mark.parametrize("size, pattern", [(151_643, QWEN), (128_000, THREES), (151_329, THREES), (100_256, THREES)])
def test_rank_files_encode_as_tiktoken(tmp_path, size, pattern):
    ranks = rank_file(tmp_path / "a.tiktoken", size)
    tok = load_tokenizer(tmp_path / "a.tiktoken")
    oracle = tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in TRAPS + POEMS + ["2024 123456 hell he'll\n\n\nthe the"]:
        assert tok.encode(text) == oracle.encode(text, disallowed_special=())
    assert tok.rule == pattern and len(tok.encode("123")) == (3 if size == 151_643 else 1)
    ours = [tok.eot_id, tok.im_start_id, tok.im_end_id, tok.pad_id]     # Qwen's own order, too
    first = 128_256 if size == 128_000 else size
    assert ours == list(range(first, first + 4)) and tok.vocab_size == first + 4


def test_llama3_has_its_own_special_tokens(tmp_path):
    rank_file(tmp_path / "tokenizer.model", size=128_000)
    tok = load_tokenizer(tmp_path)
    names = tok.special_names
    assert {128_000: "<|begin_of_text|>", 128_001: "<|end_of_text|>", 128_006: "<|start_header_id|>",
            128_007: "<|end_header_id|>", 128_009: "<|eot_id|>",
            128_255: "<|reserved_special_token_250|>"}.items() <= names.items()
    assert sorted(names) == list(range(128_000, 128_260))
    assert not set(tok.encode("<|begin_of_text|><|eot_id|>")) & set(names)


@pytest.mark.parametrize("size", [50_256, 50_280, 199_998, 163_584, 1000])
def test_rank_files_of_unknown_families_are_refused(tmp_path, size):
    rank_file(tmp_path / "other.tiktoken", size)
    with pytest.raises(ValueError, match=f"other.tiktoken: {size:,} ranks, some of several digits like b'12'.*Qwen"):
        load_tokenizer(tmp_path / "other.tiktoken")


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_a_small_rank_file_without_numbers_is_cut_as_qwens(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "ranks.tiktoken"
    if not path.exists():
        rank_file(path)
    tok = load_tokenizer(path)
    ids = tok.encode(text)
    assert tok.decode(ids) == text and not set(ids) & set(tok.special_names)
    assert len(tok.encode("123")) == 3


def test_what_a_vocabulary_without_bytes_does_not_know(tmp_path):
    rank_file(tmp_path / "a.tiktoken")
    assert load_tokenizer(tmp_path / "a.tiktoken").unk_id is None
    train_sentencepiece(tmp_path / "tokenizer.model", POEMS * 20, vocab_size=80, byte_fallback=False,
                        character_coverage=1.0)
    tok = load_tokenizer(tmp_path)
    assert tok.unk_id == 0 and tok.encode("龘").count(tok.unk_id) == 1 and tok.unk_id not in tok.encode("明月")


def test_pattern_is_part_of_the_fingerprint(tmp_path, monkeypatch):
    rank_file(tmp_path / "tokenizer.model")
    before = load_tokenizer(tmp_path).fingerprint
    assert load_tokenizer(tmp_path).fingerprint == before
    monkeypatch.setattr(vocabularies, "QWEN_PATTERN", LLAMA3_PATTERN)
    assert load_tokenizer(tmp_path).fingerprint != before


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "broken.tiktoken"
    rank_file(path)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:200]))                        # cut off in the download
    with pytest.raises(ValueError, match="broken.tiktoken: not a whole rank file.*56 bytes are missing"):
        load_tokenizer(path)
    path.write_bytes(b"".join(whole) + b"<html>\n")
    with pytest.raises(ValueError, match=f"line {len(whole) + 1}: not a base64 token"):
        load_tokenizer(path)
    path.write_text("床前明月光")
    with pytest.raises(ValueError, match="broken.tiktoken is neither"):
        load_tokenizer(path)


def test_a_million_spaces_do_not_overflow_tiktoken(tmp_path):
    rank_file(tmp_path / "tokenizer.model")
    tok = load_tokenizer(tmp_path)
    for text in (" " * 1_000_000, "月" * 1_000_000):
        assert tok.decode(tok.encode(text)) == text


# ---------------------------------------------------------------- folders of transformers

THINK = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
# what a family's tokenizer.json says: rule, normalizer, special tokens before and behind the pieces, words
FAMILIES = {
    "minimind": dict(rule=None, before=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "qwen2": dict(rule=QWEN, nfc=True, behind=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "qwen3": dict(rule=QWEN, nfc=True, behind=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"],
                  words=THINK),
    "llama3": dict(rule=THREES, behind=["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], ignore_merges=True,
                   start=["<|begin_of_text|>"]),
    "glm4": dict(rule=THREES, behind=["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|user|>"],
                 start=["[gMASK]", "<sop>"]),
    "deepseek": dict(rule=[r"\p{N}{1,3}", r"[一-龥]+", r"\p{P}\p{L}+| ?\p{L}+| ?\p{P}+|\s+(?!\S)|\s+"],
                     before=["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], start=["<｜begin▁of▁sentence｜>"]),
}
EOS = {"minimind": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|end_of_text|>", "deepseek": "<｜end▁of▁sentence｜>"}


@pytest.fixture(scope="module")
def lines():
    """Real text, without lines that name a special token: transformers takes the name for the token."""
    found = []
    for file in ("docs/results_zh.md", "docs/faults_zh.md", "docs/gpu_zh.md", "README_zh.md", "README.md", "tokenizer.py",
                 "model.py", "tests/test_tokenizer.py"):
        with open(f"{ROOT}/{file}", encoding="utf-8") as f:
            found += [line for line in f if "<|" not in line]
    return found


def write_family(family, folder, text):
    """A tokenizer.json with the settings of the family, its pieces trained by the tokenizers library."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install transformers")
    is_ = {"nfc": False, "before": [], "behind": [], "words": [], "start": [], **FAMILIES[family]}
    steps = tokenizers.pre_tokenizers
    splits = [steps.Split(tokenizers.Regex(rule), "isolated")
              for rule in ([is_["rule"]] if isinstance(is_["rule"], str) else is_["rule"] or [])]
    byte_level = steps.ByteLevel(add_prefix_space=False, use_regex=not splits)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = steps.Sequence([*splits, byte_level]) if splits else byte_level
    theirs.decoder = tokenizers.decoders.ByteLevel()
    if is_["nfc"]:
        theirs.normalizer = tokenizers.normalizers.NFC()
    theirs.train_from_iterator(text, tokenizers.trainers.BpeTrainer(
        vocab_size=2000, special_tokens=is_["before"], initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False))
    theirs.add_special_tokens(is_["behind"])
    theirs.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in is_["words"]])
    if is_["start"]:
        ids = [(name, theirs.token_to_id(name)) for name in is_["start"]]
        theirs.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*is_["start"], "$A"], pair=[*is_["start"], "$A", "$B"], special_tokens=ids)
    written = json.loads(theirs.to_str())
    written["model"]["ignore_merges"] = bool(is_.get("ignore_merges"))
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS.get(family, "<|endoftext|>")}))
    return is_


def any_texts(lines, n, seed=3):
    """n texts of pieces of lines and of what is likely to break."""
    rng = random.Random(seed)
    bits = [bit for bit in BITS if "<|" not in bit] + ["e\u0301", "he'll", "DON'T", "2024", "😀", "龘", *THINK]
    texts = []
    for _ in range(n):
        parts = rng.choices(bits, k=rng.randint(0, 8)) + [rng.choice(lines)[:rng.randint(1, 20)]]
        rng.shuffle(parts)
        texts.append("".join(parts))
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_todays_vocabularies_equal_transformers(family, lines, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    is_ = write_family(family, tmp_path / "theirs", lines)
    tok = load_tokenizer(tmp_path / "theirs")
    assert tok.raw.startswith(b"{") == (family == "deepseek")   # several rules, one after the other: by the library
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    texts = lines + any_texts(lines, 1000)
    wanted = theirs(texts, add_special_tokens=False)["input_ids"]
    assert [text for text, ids in zip(texts, wanted) if tok.encode(text) != ids] == []
    for text, ids in zip(texts, wanted):
        assert tok.decode(ids) == theirs.decode(ids)
    # every token of theirs keeps its id, ours come behind
    for name in is_["before"] + is_["behind"] + is_["words"]:
        assert tok.pieces[theirs.convert_tokens_to_ids(name)] == name.encode()
    assert not set(tok.encode("".join(is_["before"] + is_["behind"]))) & set(tok.special_names)
    new = {tok.special_names[i] for i in range(len(theirs), tok.vocab_size)}
    assert new == {"<|im_start|>", "<|im_end|>", "<|pad|>"} - theirs.get_vocab().keys()
    # what opens a text and what ends it
    assert tok.encode_start("月") == (theirs("月")["input_ids"] if is_["start"] else [tok.eot_id, *tok.encode("月")])
    if EOS.get(family) != "<|im_end|>":
        assert tok.eot_id == theirs.eos_token_id
    # saved in a file of its own it is the same
    tok.save(tmp_path / "tokenizer.model")
    again = load_tokenizer(tmp_path / "tokenizer.model")
    assert again.fingerprint == tok.fingerprint and again.vocab_size == tok.vocab_size and again.data == tok.data
    assert [again.encode_start(text) for text in texts[:50]] == [tok.encode_start(text) for text in texts[:50]]


def test_the_rule_stays_with_the_vocabulary(lines, tmp_path):
    rules = {"minimind": GPT2_PATTERN, "qwen3": QWEN_PATTERN, "glm4": LLAMA3_PATTERN}
    for family, rule in rules.items():
        write_family(family, tmp_path / family, lines)
        assert load_tokenizer(tmp_path / family).rule == rule


@pytest.mark.parametrize("place, change", [
    ("model", {"dropout": 0.1}), ("normalizer", {"type": "Lowercase"}),
    ("pre_tokenizer", {"add_prefix_space": True}), ("added", {"lstrip": True})])
def test_what_is_no_rank_file_goes_through_the_library(place, change, lines, tmp_path):
    write_family("minimind", tmp_path, lines)
    theirs = json.loads((tmp_path / "tokenizer.json").read_text())
    theirs["added"] = theirs["added_tokens"][0]
    theirs[place] = {**(theirs[place] or {}), **change}
    theirs["added_tokens"][0] = theirs.pop("added")
    (tmp_path / "tokenizer.json").write_text(json.dumps(theirs))
    tok = load_tokenizer(tmp_path)
    assert tok.raw.startswith(b"{") and tok.decode(tok.encode("床前 moon")) == "床前 moon"


def test_a_llama2_folder_begins_and_ends_as_its_settings_say(tmp_path):
    sp = train_sentencepiece(tmp_path / "tokenizer.model")
    size = sp.vocab_size()
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "tokenizer_class": "LlamaTokenizer"}
    for said, opening in (({}, [1]), ({"add_bos_token": True}, [1]), ({"add_bos_token": False}, [2])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **said}))
        tok = load_tokenizer(tmp_path)
        assert (tok.start_ids, tok.eot_id, tok.vocab_size) == (opening, 2, size + 3)
        assert tok.encode("明月 moon") == sp.encode("明月 moon")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2]}')
    tok = load_tokenizer(tmp_path)
    assert (tok.start_ids, tok.eot_id, tok.vocab_size) == ([1], 2, size + 3)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    tok = load_tokenizer(tmp_path)
    assert tok.special_names[size] == "[PAD]" and tok.im_start_id == size + 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 5}))
    with pytest.raises(SystemExit, match=r"\[PAD\] has the id 5, which is '<0x02>' in tokenizer.model"):
        load_tokenizer(tmp_path)


def test_folders_that_cannot_be_read(lines, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install transformers")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="has no vocabulary: neither tokenizer.model"):
        load_tokenizer(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "moon": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SystemExit, match="this vocabulary turns '床前 moon.n' into '.UNK.moon'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"vocab": {}, "type": "Other"}}')
    with pytest.raises(ValueError, match="the tokenizers library cannot read"):
        load_tokenizer(tmp_path)
