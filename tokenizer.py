"""
Text to token ids and back: train a vocabulary, load an existing one, lay out a chat, decode a stream.

    python tokenizer.py data/poems "床前明月光"        # print the pieces and their ids

in:  tokenizer.model of a data folder or a run: a sentencepiece model, or what readers/vocabularies.py has made of
     somebody else's (Qwen, Llama 3, GLM-4, a folder of transformers)
out: token ids. Every vocabulary has the four SPECIAL_TOKENS; encode() never yields one, whatever a text says

How a vocabulary is learned from text, byte pair by byte pair: recipes/bpe.py.
"""

import base64
import codecs
import collections
import hashlib
import io
import json
import os
import sys

import sentencepiece
import tiktoken

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
HEADER = b'{"mingyue": '  # begins a line that a saved vocabulary may have before it: its settings, as JSON


class Tokenizer:
    """A vocabulary and its chat tokens, made by load_tokenizer() or train_tokenizer().

    vocab_size counts the chat tokens. fingerprint is the sha256 of everything that decides the ids: data and weights
    belong together when their fingerprints are equal.

    settings is empty for a vocabulary of ours. Another model's has: "rule", a regular expression that cuts a text into
    words; "nfc", compose accents first; "tokens" {name: id}, which encode() never yields; "words" {name: id}, which it
    does yield (<think>); "start", the tokens that begin a document; "end", the token that ends it.
    """

    def __init__(self, raw, encode, pieces, specials, rule="", dummy_prefix=False, unk_id=None, settings=None):
        self.raw = raw                      # the vocabulary file's own bytes
        self.data = raw                     # what save() writes
        self.settings = settings or {}
        if settings:
            from readers.hf_tokenizer import follow
            encode = follow(encode, settings)  # first does what "nfc" and "words" ask for
            self.data = HEADER + json.dumps(settings, ensure_ascii=False).encode() + b"}\n" + raw
        self._encode = encode               # text -> ids of the base vocabulary
        self.pieces = dict(pieces)          # id -> bytes
        self.rule = rule                    # the regular expression that cuts a text before tokens are merged
        self.dummy_prefix = dummy_prefix    # whether encoding puts a space before the text
        self.unk_id = unk_id                # what unknown characters become; None: they are spelled in bytes
        self.words = self.settings.get("words", {})
        specials = {**specials, **self.settings.get("tokens", {})}
        end = self.settings.get("end", SPECIAL_TOKENS[0])
        names = (end, *SPECIAL_TOKENS[1:])
        size = 1 + max([*self.pieces, *specials.values(), *self.words.values()])
        for name in names:                  # chat tokens that another model's vocabulary lacks: ids after its own
            if name not in specials:
                specials[name] = size
                size += 1
        self.vocab_size = size
        self.special_names = {i: name for name, i in specials.items()}
        self.pieces.update((i, name.encode()) for name, i in [*specials.items(), *self.words.items()])
        self.eot_id, self.im_start_id, self.im_end_id, self.pad_id = (specials[name] for name in names)
        self.start_ids = [specials[name] for name in self.settings.get("start", [end])]
        rules = (rule, sorted(specials.items()))
        if self.words or "nfc" in self.settings:
            rules += ("nfc" in self.settings, sorted(self.words.items()))
        self.fingerprint = hashlib.sha256(raw + repr(rules).encode()).hexdigest()

    def encode(self, text):
        """Ids of `text`, never a special token: "<|im_end|>" typed by a user stays ten ordinary characters."""
        try:
            text.encode()
        except UnicodeEncodeError:          # half of a surrogate pair (broken JSON, a terminal) is no character
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode(text)

    def encode_start(self, text):
        """Ids of a text that a model is to continue: the tokens that begin a document, then the text."""
        return self.start_ids + self.encode(text) or [self.eot_id]

    def decode_bytes(self, ids, skip_special=False):
        """The bytes the ids stand for. An id beyond the vocabulary (padding rows of a model) becomes U+FFFD."""
        special = self.special_names if skip_special else ()
        return b"".join(self.pieces.get(int(i), b"\xef\xbf\xbd") for i in ids if int(i) not in special)

    def decode(self, ids, skip_special=False, is_start=True):
        """The text of ids, without half a character at its end. Where encoding puts a space before the text, it is
        removed again; is_start=False: these ids continue a text, so a space before their first word belongs to it."""
        data = self.decode_bytes(ids, skip_special)
        text = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data)
        return text.removeprefix(" ") if is_start and self.dummy_prefix else text

    def save(self, path):
        with open(path, "wb") as f:
            f.write(self.data)


class StreamDecoder:
    """Decodes ids as they are generated. A Chinese character may be split over two or three tokens, so push() keeps
    bytes back until a character is whole. The results of all push() calls, joined, equal tok.decode() of all ids.
    """

    def __init__(self, tok, skip_special=False, is_start=True):
        self.tok = tok
        self.skip_special = skip_special
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.at_start = is_start and tok.dummy_prefix

    def push(self, id):
        return self.show(self.tok.decode_bytes([id], self.skip_special))

    def show(self, data):
        text = self.utf8.decode(data)
        if self.at_start and text:
            self.at_start = False
            return text.removeprefix(" ")
        return text


def is_learned(message):
    return message["role"] == "assistant" and message.get("weight") != 0


def render_chat(tok, messages, add_generation_prompt=False):
    """ChatML: `<|im_start|>role\\n…<|im_end|>\\n` a message, [{"role": …, "content": …}] in, (ids, mask) out.

    mask is 1 on what the model learns to write: the assistant's words and the <|im_end|> that ends each of its turns
    (unless the message has "weight": 0), else 0.
    Header and words are encoded apart, so a prompt made with add_generation_prompt is a prefix of the row to train on.
    """
    newline = tok.encode("\n")
    ids = []
    mask = []
    for message in messages:
        header = [tok.im_start_id] + tok.encode(message["role"] + "\n")
        words = tok.encode(message["content"]) + [tok.im_end_id]
        learned = int(is_learned(message))
        ids += header + words + newline
        mask += [0] * len(header) + [learned] * len(words) + [0] * len(newline)
    if add_generation_prompt:
        header = [tok.im_start_id] + tok.encode("assistant\n")
        ids += header
        mask += [0] * len(header)
    return ids, mask


def render_document(tok, text):
    """Ids of a document as pretraining reads it: the text, then <|endoftext|>, which thus stands before the next
    document. Some vocabularies have other tokens to begin a document: these come first."""
    opening = [] if tok.start_ids == [tok.eot_id] else tok.start_ids
    return opening + tok.encode(text) + [tok.eot_id]


def train_tokenizer(texts, path, vocab_size, character_coverage=0.9995, max_piece_length=16,
                    max_characters=4_000_000):
    """Train a byte-fallback BPE on the first `max_characters` of `texts` (give them shuffled) and write it to `path`.

    These texts come back byte for byte: nothing is normalised, spaces and newlines are kept, and a character that is
    not in the vocabulary becomes several tokens, its bytes. character_coverage: the most frequent characters, which
    together are this share of the text, get a token of their own. It is lowered, down to 0.98, if less than a third of
    the vocabulary would be left for longer pieces. max_piece_length=1: no longer pieces, every token is a character.
    A text too short for vocab_size gives a smaller vocabulary.
    """
    lines = list(_training_lines(texts, max_characters))
    counts = collections.Counter()
    for line in lines:
        counts.update(line)
    if not counts:
        raise ValueError("there is no text to train a tokenizer on")
    n_characters = vocab_size if max_piece_length == 1 else vocab_size * 2 // 3
    # 266 tokens are no characters of the text: 256 bytes, <unk>, four special tokens, five user_defined_symbols
    most_common = counts.most_common(max(n_characters - 266, 0))
    possible = max(sum(n for _, n in most_common) / counts.total(), 0.98)
    if character_coverage > possible and max_piece_length > 1:
        print(f"{vocab_size} tokens are few for {len(counts)} different characters: the rarest may be spelled in bytes "
              f"(character_coverage={possible:.4f})")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=min(character_coverage, possible), hard_vocab_limit=False,
            byte_fallback=True, max_sentencepiece_length=max_piece_length, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
            required_chars="▁",  # sentencepiece's letter for a space, which a Chinese text may not contain
            # always tokens: "\n" and "\t", which the trainer never learns, and role names, which every chat repeats
            user_defined_symbols=["\n", "\t", "system", "user", "assistant"],
            control_symbols=list(SPECIAL_TOKENS[1:3]),  # control: text can never produce them
            unk_id=0, bos_id=-1, eos_id=1, eos_piece=SPECIAL_TOKENS[0], pad_id=2, pad_piece=SPECIAL_TOKENS[3],
            num_threads=os.cpu_count(), minloglevel=2)
    except RuntimeError as e:
        raise ValueError(f"cannot train {vocab_size} tokens on {len(counts)} characters: raise vocab_size "
                         f"(sentencepiece: {e})") from e
    with open(path, "wb") as f:
        f.write(model.getvalue())
    return load_tokenizer(path)


def _training_lines(texts, max_characters):
    """Yield lines of at most 1,000 characters: the trainer would leave out lines over 4,192 bytes without a word."""
    for text in texts:
        for line in text[:max_characters].split("\n"):
            for i in range(0, len(line), 1000):
                yield line[i:i + 1000]
        max_characters -= len(text)
        if max_characters <= 0:
            return


def load_tokenizer(path):
    """Return the Tokenizer of a data folder or a run. path: its tokenizer.model, or the folder that holds it."""
    path = os.fspath(path)
    if os.path.isdir(path):
        path = os.path.join(path, "tokenizer.model")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no tokenizer at {path}: name it, or the folder that holds it; a run's is that of its "
                                "data folder, copied")
    with open(path, "rb") as f:
        data = f.read()
    settings = {}
    if data.startswith(HEADER):
        line, data = data.split(b"\n", 1)
        settings = json.loads(line)["mingyue"]
    return make_tokenizer(data, settings, path)


def make_tokenizer(data, settings, path):
    """Return the Tokenizer of a vocabulary file's bytes and settings; path: for errors."""
    if "rule" in settings:
        return _load_ranks(data, settings, path)
    if data.startswith(b"{"):
        from readers.hf_tokenizer import load_library
        return Tokenizer(data, **load_library(data), specials={}, settings=settings)
    return _load_sentencepiece(data, settings, path)


def _load_sentencepiece(data, settings, path):
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as e:
        raise ValueError(f"{path} is neither a sentencepiece model nor a vocabulary that prepare.py has saved. "
                         f"It takes others by --tokenizer={path}") from e
    pieces = {}
    specials = {}
    for i in range(sp.vocab_size()):
        piece = sp.id_to_piece(i)
        if sp.is_control(i):
            specials[piece] = i
        if sp.is_byte(i):                           # written "<0xE5>"
            pieces[i] = bytes([int(piece[3:5], 16)])
        elif sp.is_unknown(i):
            pieces[i] = " ⁇ ".encode()
        else:
            pieces[i] = piece.replace("▁", " ").encode()

    encode = sp.encode
    unk_id = sp.unk_id() if sp.piece_to_id("<0xE2>") == sp.unk_id() else None
    if sp.normalize(" a  b ") == "▁a▁▁b▁" and unk_id is None:
        # sentencepiece writes a space as "▁", so a "▁" in the text would come back as a space: spell it in bytes.
        # Only for a vocabulary that keeps all else too, as ours do: others shall encode exactly as sentencepiece does.
        underline = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]

        def encode(text):
            first, *rest = text.split("▁")
            ids = sp.encode(first)
            for part in rest:
                ids += underline + sp.encode(part)
            return ids

    return Tokenizer(data, encode, pieces, specials, "", sp.normalize("a") == "▁a", unk_id, settings)


def _load_ranks(data, settings, path):
    """A rank file of tiktoken: each line a token in base64 and its id. The pair with the lowest id is merged first."""
    ranks = {}
    words = data.split()
    for token, rank in zip(words[::2], words[1::2]):
        ranks[base64.b64decode(token)] = int(rank)
    pieces = {rank: token for token, rank in ranks.items()}
    rule = settings["rule"]
    bpe = tiktoken.Encoding(os.path.basename(path), pat_str=rule, mergeable_ranks=ranks, special_tokens={})

    def encode(text):
        ids = []
        # in slices, as Llama 3 does: a million spaces at once overflow the stack of tiktoken's regex
        for start in range(0, len(text), 400_000):
            ids += bpe.encode_ordinary(text[start:start + 400_000])
        return ids

    return Tokenizer(data, encode, pieces, {}, rule, settings=settings)


def main():
    tok = load_tokenizer(sys.argv[1])
    text = " ".join(sys.argv[2:])
    ids = tok.encode(text)
    print(" ".join(f"{tok.pieces[i].decode(errors='backslashreplace')!r}:{i}" for i in ids))
    print(f"{len(text)} characters, {len(ids)} tokens, vocabulary {tok.vocab_size}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main()
