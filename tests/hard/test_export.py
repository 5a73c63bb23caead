"""tools/export.py: what other programs make of our weights and vocabularies, and what comes back."""
import base64
import glob
import json
import os
import random
import runpy
import sys
import unicodedata
import urllib.request

import jinja2
import pytest
import sentencepiece
import torch

from common.checkpoint import load_checkpoint, load_model, load_reward_model, save_checkpoint
from common.lora import weights_hash
from common.generate import generate
from common.lora import add_lora
from model import ScalarModel
from oracles import KINDS, config_of, random_model
from readers.calls import call_tools, list_tools
from test_vocabulary import FAMILIES, train_sentencepiece, write_family
from readers.vocabularies import open_vocabulary as load_tokenizer
from tokenizer import SPECIAL_TOKENS, render_chat, train_tokenizer
from tools import export, from_hf, to_hf, vocabulary
from tools.chat_template import PLAIN_TEMPLATE
from tools.hf_names import config_from_hf, hf_config, hf_views

from conftest import ROOT

EXPORTED = {
    **{kind: {} for kind in KINDS},
    # mixtures of experts: tied as config/moe.py, without a shared expert, with every switch on, without a dense layer
    "moe": dict(n_heads=4, n_kv_heads=2, n_experts=8, n_active_experts=3, expert_hidden_dim=16),
    "moe_alone": dict(n_experts=8, n_active_experts=2, n_shared_experts=0, expert_hidden_dim=16),
    "moe_all": dict(n_kv_heads=2, qk_norm=True, qkv_bias=True, n_experts=8, expert_hidden_dim=16, route_scale=2.5),
    "moe_only": dict(n_experts=4, n_active_experts=1, expert_hidden_dim=32, first_dense=0, tie_embeddings=False),
    "qwen2_wide": dict(n_kv_heads=2, qkv_bias=True, head_dim=16),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make(kind, vocab_size, seed=3, **changes):
    """A random model of one of EXPORTED."""
    base = kind if kind in KINDS else "llama"
    return random_model(base, seed, **{**EXPORTED[kind], "vocab_size": vocab_size, "max_seq_len": 256, **changes})


def largest(difference):
    return difference.abs().max().item()


def logits(model, ids):
    with torch.no_grad():
        return model.logits(model(ids))


def save_run(folder, module, tok, stage="sft", **changes):
    """A run's folder as a stage leaves it."""
    os.makedirs(folder, exist_ok=True)
    tok.save(f"{folder}/tokenizer.model")
    save_checkpoint(f"{folder}/ckpt.pt", {
        "stage": stage, "step": 1, "model": module.state_dict(), "model_config": vars(module.config), "config": {},
        "lora": None, "fingerprint": tok.fingerprint, "best_val": 1.0, "optimizers": [], "scaler": {}, **changes})
    return str(folder)


# ---------------------------------------------------------------------------- texts and vocabularies

BITS = ["▁", " ", "  ", "   ", "\n", "\n\n", "\t", "\r", "\0", "床", "明月", "，", "hell", "1", "12", "2024", "<unk>",
        "<0x41>", "system", "user", "assistant", "sys", "usersystem", *SPECIAL_TOKENS, "😀", "👨‍👩‍👧", "é", "e\u0301",
        "\ufeff", "龘", "𠀀", "……", "的的的", "aab"]
RANGES = [(0x4e00, 0x9fff), (0, 0x2ff), (0x2000, 0x27ff), (0xe000, 0xffff), (0x10000, 0x1ffff)]


def fuzzed(lines, n, bits=BITS, seed=7):
    """Texts of what is likely to break, of any character, and of pieces of real lines."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        parts = []
        for _ in range(rng.randint(0, 20)):
            draw = rng.random()
            if draw < 0.5:
                parts.append(rng.choice(bits) * rng.choice([1, 1, 1, 5]))
            elif draw < 0.7:
                parts.append(chr(rng.randint(*rng.choice(RANGES))))
            else:
                line = rng.choice(lines)
                start = rng.randrange(len(line))
                parts.append(line[start:start + rng.randint(1, 8)])
        texts.append("".join(parts))
    return texts


@pytest.fixture(scope="module")
def text():
    """What the vocabularies here are trained on: READMEs and docs, whatever else lies around."""
    return read_lines([f"{ROOT}/README_zh.md", f"{ROOT}/README.md", *sorted(glob.glob(f"{ROOT}/docs/*.md"))])


@pytest.fixture(scope="module")
def lines(text):
    """Real text to encode: with that of the recipes, where they have been prepared."""
    found = text + read_lines(sorted(glob.glob(f"{ROOT}/data/raw/*/*.jsonl"))[:4])
    random.Random(3).shuffle(found)
    return found[:3000]


def read_lines(files):
    """Lines of some files, at most 3,000 of each, without those that name a special token: others read it as one."""
    found = []
    for file in files:
        with open(file, encoding="utf-8") as f:
            for line, _ in zip(f, range(3000)):
                if line.strip() and not any(name in line for name in SPECIAL_TOKENS):
                    found.append(line.strip())
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def tok(text, place):
    return train_tokenizer(text, place / "bpe.model", 2000)


@pytest.fixture(scope="module")
def characters(text, place):
    return train_tokenizer(text, place / "characters.model", 3000, max_piece_length=1)


@pytest.fixture(scope="module")
def prefixed(text, place):
    """As Llama 2's: a space before every text, no chat tokens."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(place / "prefixed"), vocab_size=2000, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        character_coverage=0.98, hard_vocab_limit=False)
    return load_tokenizer(f"{place}/prefixed.model")


@pytest.fixture(scope="module")
def ranked(text, place):
    """A plain rank file that cuts text as Qwen does."""
    write_family("qwen2", place / "ranked-family", text)
    tok = load_tokenizer(place / "ranked-family")
    (place / "ranks").write_bytes(tok.raw)
    return load_tokenizer(place / "ranks")


@pytest.fixture(scope="module")
def named(request, text, place):
    """A vocabulary of these fixtures, or that of a folder of transformers; see FAMILIES."""
    if request.param not in FAMILIES:
        return request.getfixturevalue(request.param)
    folder = place / f"family-{request.param}"
    write_family(request.param, folder, text)
    return load_tokenizer(folder)


def every(*names):
    return pytest.mark.parametrize("named", names, indirect=True)


def library(tok):
    """The exported vocabulary in the tokenizers library, text never a special token."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install transformers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(vocabulary.tokenizer_json(tok)))
    theirs.encode_special_tokens = True
    return theirs


def test_pieces_are_those_of_sentencepiece(tok, prefixed):
    for t in (tok, prefixed):
        sp = sentencepiece.SentencePieceProcessor(model_proto=t.data)
        pieces = vocabulary.sentencepieces(t)
        assert [piece.text for piece in pieces] == [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        assert [piece.score for piece in pieces] == [sp.get_score(i) for i in range(sp.vocab_size())]
        for i, piece in enumerate(pieces):
            assert (piece.kind == vocabulary.BYTE) == sp.is_byte(i)
            assert (piece.kind == vocabulary.CONTROL) == sp.is_control(i)


def test_merges_by_hand():
    pieces = [vocabulary.Piece(*entry) for entry in [("a", -9.0, 1), ("b", -8.0, 1), ("ab", -1.0, 1), ("aba", 0.0, 1),
                                                 ("<s>", 0.0, 3), ("c", -7.0, 6)]]
    assert vocabulary.merges(pieces) == [["ab", "a"], ["a", "b"]]  # "ba" is no piece


@every("tok", "characters", "prefixed", "ranked", *FAMILIES)
def test_ids_equal_the_tokenizers_library(named, text):
    t = named
    theirs = library(t)
    texts = text + fuzzed(text, 3000)
    ours = [t.encode(text) for text in texts]
    there = [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]
    assert [text for text, a, b in zip(texts, ours, there) if a != b] == []
    decoded = theirs.decode_batch(ours, skip_special_tokens=False)
    assert [text for text, ids, back in zip(texts, ours, decoded) if t.decode(ids) != back] == []


@every("tok", "prefixed", "ranked", *FAMILIES)
def test_vocabularies_come_back(named, tmp_path):
    """From tokenizer.json, and the sentencepiece model beside it where there is one: the very same vocabulary."""
    for stage in ("pretrain", "sft"):
        to_hf.write_tokenizer(named, str(tmp_path / stage), 256, stage)
        to_hf.write_json(str(tmp_path / stage), "config.json", to_hf.end_ids(named, stage))
        again = load_tokenizer(tmp_path / stage)
        assert again.fingerprint == named.fingerprint and again.raw == named.raw
        assert again.eot_id == named.eot_id and (stage == "sft" or again.start_ids == named.start_ids)


def test_a_llamas_tokenizer_json_without_its_model(prefixed, lines, tmp_path):
    to_hf.write_tokenizer(prefixed, str(tmp_path), 256, "pretrain")
    os.remove(tmp_path / "tokenizer.model")
    tok = load_tokenizer(tmp_path)      # through the tokenizers library
    texts = fuzzed(lines, 500)
    assert tok.raw.startswith(b"{") and (tok.dummy_prefix, tok.unk_id) == (True, None)
    assert [text for text in texts if tok.encode(text) != prefixed.encode(text)] == []
    assert [text for text in texts if tok.decode(tok.encode(text)) != prefixed.decode(tok.encode(text))] == []
    assert not {1, 2} & set(tok.encode("<s> moon </s>")) and tok.special_names[tok.eot_id] == "<|endoftext|>"


def test_a_word_that_no_merges_lead_to(place):
    """tiktoken takes a whole word that is a piece, even where neither "ab" nor "bc" is one."""
    tokens = [bytes([i]) for i in range(256)] + [b"abc"]
    (place / "word").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    tok = load_tokenizer(place / "word")
    for text in ("abc", "abcd", "abc abc"):
        assert library(tok).encode(text).ids == tok.encode(text)
    assert tok.encode("abc") == [256]
    to_hf.write_tokenizer(tok, str(place / "word-hf"), 256, "sft")
    assert load_tokenizer(place / "word-hf").raw == tok.raw


def test_foreign_vocabularies_are_refused(text, place):
    def refused(message, **changes):
        settings = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                        remove_extra_whitespaces=False)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_prefix=str(place / "foreign"), vocab_size=1500, minloglevel=2,
            character_coverage=0.98, hard_vocab_limit=False, **{**settings, **changes})
        foreign = load_tokenizer(f"{place}/foreign.model")
        run = save_run(place / "foreign", make("llama", foreign.vocab_size), foreign)
        for to in ("hf", "gguf"):
            with pytest.raises(SystemExit, match=message):
                export.main(export.Config(run, to, out=f"{place}/foreign-{to}"))
            assert not os.path.exists(f"{place}/foreign-{to}")
    refused("is no BPE", model_type="unigram")
    refused("no byte fallback", byte_fallback=False)
    refused("rewrites its text", normalization_rule_name="nmt_nfkc")
    refused("rewrites its text", remove_extra_whitespaces=True)


# ---------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def folder(tok, place):
    """An exported folder of a chat model."""
    pytest.importorskip("transformers", reason="pip install transformers")
    run = save_run(place / "run", make("llama", tok.vocab_size), tok)
    export.main(export.Config(run, out=str(place / "hf")))
    return str(place / "hf")


def conversations(lines, n, bits, seed=1):
    rng = random.Random(seed)
    contents = fuzzed(lines, 3 * n, bits, seed) + lines
    found = []
    for _ in range(n):
        roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(0, 3)
        roles = roles or ["user"]
        roles += ["tool", "assistant"] * rng.randint(0, 1)
        found.append([{"role": role, "content": rng.choice(contents)} for role in roles])
    return found


def test_chat_template_equals_render_chat(folder, tok, lines):
    """Same ids, same mask of what the assistant learns; a name of a special token in the text is theirs to misread."""
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(folder)
    bits = [bit for bit in BITS if bit not in SPECIAL_TOKENS]
    for messages in conversations(lines, 500, bits):
        ids, mask = render_chat(tok, messages)
        there = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert there["input_ids"] == ids and there["assistant_masks"] == mask
        prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt == render_chat(tok, messages[:1], add_generation_prompt=True)[0]


def texts_of_tools():
    """(messages, tools, the turns that render_chat is given for them): as prepare.py and tools/serve.py make them."""
    spec = {"type": "function", "function": {"name": "天气", "description": "\"引号\" \\ <b>&'\n\t一行", "parameters": {
        "type": "object", "required": ["城", 1], "properties": {"z": {"at": 0.5, "min": None, "x": True}, "a": {}}}}}
    call = {"id": "1", "type": "function", "function": {"name": "天气", "arguments": {"城": "京", "n": [1, 2.5, None, {}]}}}
    as_text = {"id": "2", "type": "function", "function": {"name": "g", "arguments": '{"a": "\\n"}'}}
    calls = [call, as_text, {"function": {"name": "g", "parameters": {"a": 1}}}]
    parts = [{"type": "text", "text": "北京"}, "天气？"]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": {"天": "晴"}}, {"role": "assistant", "content": "好。", "tool_calls": [as_text]},
            {"role": "tool", "content": "3"}, {"role": "assistant", "content": "晴天。"}]
    turns = [{"role": "user", "content": "北京天气？"}, {"role": "assistant", "content": call_tools(calls)},
             {"role": "tool", "content": '{"天": "晴"}'},
             {"role": "assistant", "content": "好。\n" + call_tools([as_text])}, *talk[4:]]
    for tools in (None, [], [spec], [spec, {"name": "g"}]):
        offer = [list_tools(tools)] if tools else []
        for system in ([], [""], ["你是助手"]):
            head = [{"role": "system", "content": "\n\n".join([text for text in system if text] + offer)}]
            before = [{"role": "developer" if tools else "system", "content": text} for text in system]
            yield before + talk, tools, (head if system or offer else []) + turns


def test_tools_in_the_chat_template(folder, tok):
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(folder)
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(PLAIN_TEMPLATE)
    for messages, tools, turns in texts_of_tools():
        ids, mask = render_chat(tok, turns)
        there = theirs.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        assert there["input_ids"] == ids and there["assistant_masks"] == mask
        assert plain.render(messages=messages, tools=tools) == tok.decode(ids)
        prompt = plain.render(messages=messages[:-1], tools=tools, add_generation_prompt=True)
        assert prompt == tok.decode(render_chat(tok, turns[:-1], add_generation_prompt=True)[0])
    image = {"role": "user", "content": [{"type": "text", "text": "春"}, {"type": "image", "url": "x"}]}
    for lost in (image, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}):
        with pytest.raises(jinja2.TemplateError, match="parts that are texts|write it as tool_calls"):
            theirs.apply_chat_template([lost])


def test_chat_template_of_a_rank_file(ranked, lines, place, capsys):
    """A message that begins with a line break merges with the one before it: that is said. All others are equal."""
    from transformers import AutoTokenizer
    run = save_run(place / "ranked", make("llama", ranked.vocab_size), ranked)
    export.main(export.Config(run, out=str(place / "ranked-hf")))
    assert "merges line breaks" in capsys.readouterr().out
    theirs = AutoTokenizer.from_pretrained(place / "ranked-hf")
    same = 0
    for messages in conversations(lines, 300, [bit for bit in BITS if bit not in SPECIAL_TOKENS]):
        breaks = [m["content"] for m in messages if "\n" in m["content"][:-len(m["content"].lstrip()) or None]]
        if not breaks:
            there = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
            assert there == render_chat(ranked, messages)[0]
            same += 1
    assert same > 100


def test_a_dummy_prefix_gets_no_chat_template(prefixed, place, capsys):
    run = save_run(place / "prefixed-run", make("llama", prefixed.vocab_size), prefixed)
    export.main(export.Config(run, out=str(place / "prefixed-hf")))
    assert "no chat template" in capsys.readouterr().out
    assert not os.path.exists(place / "prefixed-hf/chat_template.jinja")


def check_there_and_back(model, tok, lines, folder):
    """Logits, greedy tokens, ids; then the same tensors from our folder and from one that transformers has saved."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    to_hf.write_hf(model, tok, "sft", folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, tok.vocab_size, (2, 100))
    with torch.no_grad():
        assert largest(theirs(ids).logits - logits(model, ids)) < 2e-5
    ours = generate(model, ids[:, :20].tolist(), 64, temperature=0)
    there = theirs.generate(ids[:, :20], max_new_tokens=64, do_sample=False, eos_token_id=None)
    assert there[:, 20:].tolist() == ours

    template = transformers.AutoTokenizer.from_pretrained(folder)
    assert (len(template), template.eos_token_id, template.pad_token_id) == (tok.vocab_size, tok.im_end_id, tok.pad_id)
    assert [template(line)["input_ids"] for line in lines[:50]] == [tok.encode(line) for line in lines[:50]]
    assert [template.decode(tok.encode(line)) for line in lines[:50]] == lines[:50]

    theirs.save_pretrained(f"{folder}-again", max_shard_size="60KB")
    assert len(glob.glob(f"{folder}-again/*.safetensors")) > 1
    tok.save(f"{folder}-again/tokenizer.model")
    for source in (folder, f"{folder}-again"):
        back, again, _ = from_hf.read_hf(source)
        assert back.config == model.config and again.fingerprint == tok.fingerprint
        state = back.state_dict()
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    return theirs


@pytest.mark.parametrize("kind", EXPORTED)
def test_to_transformers_and_back(kind, tok, lines, place):
    check_there_and_back(make(kind, tok.vocab_size), tok, lines, f"{place}/{kind}")


def test_views_are_the_model():
    """What is written into the views is in the model: every tensor but the expert of zeros, which is not there."""
    for kind in EXPORTED:
        model = make(kind, 64)
        for tensor in hf_views(model).values():
            tensor.fill_(7.0)
        assert all((tensor == 7).all() for tensor in model.state_dict().values())


def test_config_comes_back():
    for kind in EXPORTED:
        config = make(kind, 64).config
        back = config_from_hf(hf_config(config))
        if config.n_experts:    # the two things that read_hf takes off again
            back.tie_embeddings = config.tie_embeddings
            back.n_shared_experts = config.n_shared_experts
        assert back == config


def test_config_of_transformers_4():
    """Its files have rope_theta alone, rope_scaling: null, and may leave out what is not special."""
    config = make("llama", 64, rope_theta=500000.0).config
    theirs = {**hf_config(config), "rope_scaling": None}
    for name in ("rope_parameters", "dtype", "num_key_value_heads", "head_dim", "mlp_bias", "n_group"):
        del theirs[name]
    assert config_from_hf(theirs) == config


def test_yarn_as_qwen_writes_it():
    """Qwen's model cards have it added by hand, and leave max_position_embeddings; what YaRN may be told is checked."""
    theirs = {**hf_config(config_of("qwen3")), "max_position_embeddings": 40960, "rope_theta": 1e6}
    del theirs["rope_parameters"]
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": None}
    back = config_from_hf({**theirs, "rope_scaling": yarn})
    assert back == config_of("qwen3", rope_theta=1e6, rope_factor=4.0, rope_original_len=32768, max_seq_len=131072)
    for name, value in [("beta_fast", 16), ("truncate", False), ("attention_factor", 1.0), ("mscale", 0.7)]:
        with pytest.raises(SystemExit, match=f"{name}={value}; our model computes"):
            config_from_hf({**theirs, "rope_scaling": {**yarn, name: value}})


def test_no_architecture():
    with pytest.raises(SystemExit, match="both qkv_bias and qk_norm"):
        hf_config(config_of("qwen3", qkv_bias=True))
    with pytest.raises(SystemExit, match="dim=32 and n_heads=3"):
        hf_config(config_of("llama", n_heads=3, head_dim=8))


@pytest.mark.parametrize("kind", ["llama_gqa", "qwen2", "qwen3"])
def test_reward_scores(kind, tok, lines, place):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    model = ScalarModel(make(kind, tok.vocab_size).config)
    model.head.bias.data.fill_(0.75)
    run = save_run(place / f"{kind}-reward", model, tok, "reward")
    folder = f"{place}/{kind}-classifier"
    export.main(export.Config(run, out=folder))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__.endswith("ForSequenceClassification") and theirs.config.num_labels == 1
    template = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_reward_model(run)
    talks = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in zip("床前明", lines)]
    batch = template.apply_chat_template(talks, padding=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        scores = theirs(**batch).logits[:, 0] + theirs.config.score_bias
        for score, talk in zip(scores, talks):
            ids, _ = render_chat(tok, talk)
            ids = ids[:-1]      # up to the answer's <|im_end|>, where the score is read
            assert abs(ours(torch.tensor([ids]))[0, -1] - score) < 2e-5


def test_reward_refusals(tok, place):
    run = save_run(place / "moe-reward", ScalarModel(make("moe", tok.vocab_size).config), tok, "reward")
    with pytest.raises(SystemExit, match="no Glm4MoeForSequenceClassification"):
        export.main(export.Config(run, out=str(place / "nothing")))
    with pytest.raises(SystemExit, match="is a reward model"):
        export.main(export.Config(run, "gguf", out=str(place / "nothing")))
    assert not os.path.exists(place / "nothing")


# ---------------------------------------------------------------------------- adapters


def save_adapters(place, tok, kind, targets):
    """A base and a LoRA run over it, adapters random; return the run's folder."""
    base = make(kind, tok.vocab_size)
    save_run(place / f"{kind}-base", base, tok)
    digest = weights_hash(base.state_dict())
    add_lora(base, 4, 8.0, targets, f"../{kind}-base", digest, [1, 2, 7])
    for name, p in base.named_parameters():
        if "lora_b" in name or "lora_rows" in name:
            torch.nn.init.normal_(p, std=0.1)
    adapters = {name: p for name, p in base.state_dict().items() if "lora_" in name}
    return save_run(place / f"{kind}-lora", base, tok, model=adapters, lora=base.lora)


@pytest.mark.parametrize("kind, targets", [("llama_gqa", "qkv|out|gate_up|down"), ("qwen2", r"blocks\.1\..*|qkv"),
                                           ("qwen3", "gate_up"), ("moe_all", "qkv|out")])
def test_adapters_equal_peft(kind, targets, tok, place):
    peft = pytest.importorskip("peft", reason="pip install peft")
    run = save_adapters(place, tok, kind, targets)
    export.main(export.Config(run, "peft", out=f"{place}/{kind}-peft"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(f"{place}/{kind}-peft", dtype=torch.float32).eval()
    ids = torch.randint(0, tok.vocab_size, (2, 50))
    base, _, _ = load_model(f"{place}/{kind}-base")
    merged, _, _ = load_model(run)
    with torch.no_grad():
        there = theirs(ids).logits
    assert largest(there - logits(merged, ids)) < 2e-5
    assert largest(there - logits(base, ids)) > 0.1


def test_merged(tok, place):
    run = save_adapters(place, tok, "qwen2_wide", "qkv|gate_up")
    export.main(export.Config(run, "merged", out=f"{place}/merged"))
    wanted, _, _ = load_model(run)
    found, _, checkpoint = load_model(f"{place}/merged")
    assert checkpoint["lora"] is None and checkpoint["optimizers"] == [] and checkpoint["stage"] == "sft"
    assert all(torch.equal(a, b) for a, b in zip(wanted.state_dict().values(), found.state_dict().values()))
    for folder, message in ((run, "holds a run already"), (f"{place}/merged", "holds a run already")):
        with pytest.raises(SystemExit, match=message):
            export.main(export.Config(run, "merged", out=folder))
    with pytest.raises(SystemExit, match="holds no adapters and no shards, but whole weights"):
        export.main(export.Config(f"{place}/merged", "merged", out=f"{place}/merged-again"))
    assert "lora" in load_checkpoint(run) and not os.path.exists(f"{place}/merged-again")


def test_adapters_that_peft_misreads_are_refused(tok, place):
    run = save_adapters(place, tok, "moe", "qkv|gate_up")
    with pytest.raises(SystemExit, match="attention alone.*adapts ffn"):
        export.main(export.Config(run, "peft", out=f"{place}/moe-peft"))
    with pytest.raises(SystemExit, match="has no adapters"):
        export.main(export.Config(f"{place}/moe-base", "peft", out=f"{place}/moe-peft"))
    assert not os.path.exists(f"{place}/moe-peft")


# ---------------------------------------------------------------------------- llama.cpp


class LlamaServer:
    """llama-server inside this process: one thread, no flash attention, keys and values in fp32."""

    def __init__(self, path):
        x = pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
        settings = x.CommonParams()
        settings.model.path = path
        settings.n_ctx = 256
        settings.n_parallel = 1
        settings.cpuparams.n_threads = 1
        settings.cpuparams_batch.n_threads = 1
        settings.warmup = False
        settings.port = 0
        settings.hostnames = ["127.0.0.1"]
        settings.cache_type_k = x.ggml_type.GGML_TYPE_F32
        settings.cache_type_v = x.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = x.Server(settings)

    def post(self, path, **body):
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def tokenize(self, text, special=False):
        return self.post("/tokenize", content=text, add_special=False, parse_special=special)["tokens"]


def to_gguf(model, tok, place, name, stage="sft", dtype="f32"):
    pytest.importorskip("gguf", reason="pip install gguf")
    run = save_run(place / f"{name}-run", model, tok, stage)
    export.main(export.Config(run, "gguf", out=f"{place}/{name}-gguf", dtype=dtype))
    return LlamaServer(f"{place}/{name}-gguf/model.gguf")


@every("tok", "characters", "prefixed", "ranked", "minimind", "llama3")
def test_ids_equal_llama_cpp(named, lines, place):
    """But for a "▁", which llama.cpp takes for a space, and characters that Unicode has given away only lately."""
    server = to_gguf(make("llama", named.vocab_size + 5), named, place, f"ids-{named.vocab_size}")  # five rows more
    bits = [bit for bit in BITS if bit != "▁"]
    texts = [text for text in lines[:150] + fuzzed(lines, 350, bits) if "▁" not in text]
    texts = ["".join(c for c in text if unicodedata.category(c) != "Cn") for text in texts]
    assert [text for text in texts if server.tokenize(text) != named.encode(text)] == []


@pytest.mark.parametrize("kind", [*EXPORTED, "qwen3_bias"])
def test_greedy_and_chat_equal_llama_cpp(kind, tok, lines, place):
    if kind == "qwen3_bias":    # no architecture of transformers, but llama.cpp takes it
        model = random_model("qwen3", 3, vocab_size=tok.vocab_size, max_seq_len=256, qkv_bias=True)
    else:
        model = make(kind, tok.vocab_size)
    with torch.no_grad():   # greedy never spells in bytes, so that every answer is valid text
        for i, piece in enumerate(vocabulary.sentencepieces(tok)):
            if piece.kind in (vocabulary.BYTE, vocabulary.UNKNOWN):
                model.head_weight[i] = 0
    server = to_gguf(model, tok, place, kind)
    stops = [tok.im_end_id, tok.eot_id]
    for line in lines[:5]:
        messages = [{"role": "user", "content": line[:40]}]
        prompt, _ = render_chat(tok, messages, add_generation_prompt=True)
        new = generate(model, [prompt], 40, temperature=0, stop_ids=stops)[0]
        text = server.post("/apply-template", messages=messages)["prompt"]
        assert server.tokenize(text, special=True) == prompt
        found = server.post("/completion", prompt=prompt, n_predict=40, temperature=0, return_tokens=True, n_probs=5)
        assert [i for i in found["tokens"] if i not in stops] == [i for i in new if i not in stops]
        logps = logits(model, torch.tensor([prompt]))[0, -1].log_softmax(-1)
        for entry in found["completion_probabilities"][0]["top_logprobs"]:
            assert abs(entry["logprob"] - logps[entry["id"]].item()) < 1e-4
        answer = server.post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=40)
        assert answer["choices"][0]["message"]["content"] == tok.decode(new, skip_special=True)


@pytest.mark.parametrize("what", ["base", "chat", "tools"])
def test_fifty_greedy_continuations(what, tok, lines, place):
    """Given as text, through the tokenizer and the template of transformers and of llama.cpp."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    stage = "pretrain" if what == "base" else "sft"
    model = make("qwen2_wide", tok.vocab_size)
    folder = f"{place}/fifty-{what}-hf"
    to_hf.write_hf(model, tok, stage, folder)
    template = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    server = to_gguf(model, tok, place, f"fifty-{what}", stage)
    stops = [tok.im_end_id, tok.eot_id]
    spec = {"type": "function", "function": {"name": "天气", "description": "查", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "天气", "arguments": '{"城": "京"}'}}
    tools = [spec] if what == "tools" else None
    for line in lines[:50]:
        text = line[:30].strip()
        if what == "base":
            prompt = tok.encode_start(text)
            there = template(text, return_tensors="pt")
        else:
            messages = turns = [{"role": "user", "content": text}]
            if tools:
                more = [{"role": "tool", "content": "晴"}]
                messages = [*turns, {"role": "assistant", "content": None, "tool_calls": [call]}, *more]
                turns = [{"role": "system", "content": list_tools(tools)}, *turns,
                         {"role": "assistant", "content": call_tools([call])}, *more]
            prompt, _ = render_chat(tok, turns, add_generation_prompt=True)
            there = template.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True,
                                                 return_tensors="pt")
            text = server.post("/apply-template", messages=messages, **({"tools": tools} if tools else {}))["prompt"]
        ours = [i for i in generate(model, [prompt], 12, temperature=0, stop_ids=stops)[0] if i not in stops]
        new = theirs.generate(**there, max_new_tokens=12, do_sample=False, eos_token_id=stops)[0, len(prompt):].tolist()
        assert there["input_ids"][0].tolist() == prompt and [i for i in new if i not in stops] == ours
        found = server.post("/completion", prompt=text, n_predict=12, temperature=0, return_tokens=True)
        assert found["tokens_evaluated"] == len(prompt) and [i for i in found["tokens"] if i not in stops] == ours


@pytest.mark.parametrize("dtype, tolerance", [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.1)])
def test_smaller_dtypes(dtype, tolerance, tok, place):
    model = make("qwen2", tok.vocab_size)
    server = to_gguf(model, tok, place, dtype, "pretrain", dtype)
    prompt = [tok.eot_id] + tok.encode("床前明月光")
    assert server.post("/tokenize", content="床前明月光", add_special=True)["tokens"] == prompt  # as sample.py begins
    logps = logits(model, torch.tensor([prompt]))[0, -1].log_softmax(-1)
    found = server.post("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=5)
    for entry in found["completion_probabilities"][0]["top_logprobs"]:
        assert abs(entry["logprob"] - logps[entry["id"]].item()) < tolerance


# ---------------------------------------------------------------------------- the way in


def command(monkeypatch, *words):
    """python -m tools.export, in this process."""
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    monkeypatch.delitem(sys.modules, "tools.export", raising=False)
    runpy.run_module("tools.export", run_name="__main__")


def test_commands(folder, tok, place, monkeypatch, capsys):
    command(monkeypatch, f"--from={folder}", f"--out={place}/back")
    model, again, checkpoint = load_model(f"{place}/back")
    assert checkpoint["stage"] == "sft" and again.fingerprint == tok.fingerprint
    wanted, _, _ = load_model(f"{place}/run")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), wanted.state_dict().values()))
    command(monkeypatch, f"{place}/back", "--to=hf", f"--out={place}/forth")
    with open(f"{folder}/model.safetensors", "rb") as a, open(f"{place}/forth/model.safetensors", "rb") as b:
        assert a.read() == b.read()
    assert "stood there before" not in capsys.readouterr().out
    os.remove(f"{place}/forth/config.json")
    command(monkeypatch, f"{place}/back", "--to=gguf", f"--out={place}/forth")
    assert "note: chat_template.jinja, generation_config.json, model.safetensors" in capsys.readouterr().out
    for words, message in [
            ([f"{place}/back"], "say where to write"),
            ([f"--out={place}/x"], "one of the two"),
            ([f"{place}/back", f"--from={folder}", f"--out={place}/x"], "one of the two"),
            ([f"--from={folder}", f"--out={place}/back"], "holds a run already"),
            ([f"--from={folder}", "--to=gguf", f"--out={place}/x"], "leave --to=gguf and --dtype=f32 out"),
            ([f"--from={place}/nowhere", f"--out={place}/x"], "no config.json"),
            ([f"{place}/back", "--dtype=f16", f"--out={place}/x"], "--dtype=f16 is for --to=gguf"),
            ([f"{place}/back", "--to=onnx", f"--out={place}/x"], "known are hf, gguf, peft")]:
        with pytest.raises(SystemExit, match=message):
            command(monkeypatch, *words)
    assert not os.path.exists(place / "x")


def test_base_models_stay_base_models(tok, place):
    run = save_run(place / "base", make("qwen2", tok.vocab_size), tok, "pretrain")
    export.main(export.Config(run, out=f"{place}/base-hf"))
    assert from_hf.read_hf(f"{place}/base-hf")[2] == "pretrain"
    with open(f"{place}/base-hf/config.json", encoding="utf-8") as f:
        assert json.load(f)["eos_token_id"] == tok.eot_id


@pytest.mark.parametrize("named, kind, class_name", [
    ("tok", "llama_gqa", "Llama"), ("tok", "qwen2", "Llama"), ("ranked", "qwen2", "Llama"), ("qwen2", "qwen2", "Qwen2"),
    ("minimind", "qwen3", "Qwen3"), ("llama3", "llama", "Llama"), ("glm4", "moe", "Glm4Moe"),
    ("deepseek", "qwen2", "Llama")], indirect=["named"])
def test_a_base_model_goes_on_with_a_text_as_ours_does(named, kind, class_name, place, lines):
    """The text goes through their tokenizer, which puts before it what opens a document. transformers 5 would tokenize
    any qwen2 as Qwen does: with another vocabulary it becomes a Llama whose bias on o_proj is zero."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder = f"{place}/base-{kind}-{named.fingerprint}"
    model = make(kind, named.vocab_size)
    to_hf.write_hf(model, named, "pretrain", folder)
    template = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for line in lines[:3]:
        prompt = named.encode_start(line[:20])
        there = template(line[:20], return_tensors="pt")
        assert there["input_ids"][0].tolist() == prompt and prompt[0] in named.special_names
        new = generate(model, [prompt], 20, temperature=0, stop_ids=[named.eot_id])[0]
        assert theirs.generate(**there, max_new_tokens=20, do_sample=False)[0, len(prompt):].tolist() == new
    # and comes back with it
    _, again, stage = from_hf.read_hf(folder)
    assert (again.start_ids, again.eot_id, stage) == (named.start_ids, named.eot_id, "pretrain")
    assert type(theirs).__name__ == f"{class_name}ForCausalLM"
    if (kind, class_name) == ("qwen2", "Llama"):
        theirs.model.layers[1].self_attn.o_proj.bias.data[3] = 1.0
        theirs.save_pretrained(folder)
        with pytest.raises(SystemExit, match="unknown: model.layers.1.self_attn.o_proj.bias"):
            from_hf.read_hf(folder)


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_llama_brought_in_begins_and_ends_as_there(add_bos, text, place, lines):
    """<s> begins, where transformers puts it, and </s> ends; both are found again where the run goes out."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder = place / f"llama-{add_bos}"
    folder.mkdir()
    sp = train_sentencepiece(folder / "tokenizer.model", text, vocab_size=1000, character_coverage=0.98)
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=sp.vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, initializer_range=0.5))
    theirs.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer", "add_bos_token": add_bos}))
    export.main(export.Config(from_=str(folder), out=f"{folder}-run"))
    export.main(export.Config(f"{folder}-run", out=f"{folder}-again"))
    _, again, _ = from_hf.read_hf(f"{folder}-again")
    template = transformers.AutoTokenizer.from_pretrained(f"{folder}-again")
    model, tok, checkpoint = load_model(f"{folder}-run")
    assert checkpoint["stage"] == "pretrain" and again.fingerprint == tok.fingerprint
    assert tok.eot_id == 2 and tok.start_ids == again.start_ids == [1] * add_bos
    for line in lines[:5]:
        prompt = [1] * add_bos + sp.encode(line[:20])
        assert prompt == tok.encode_start(line[:20]) == again.encode_start(line[:20])
        assert prompt == template(line[:20])["input_ids"]
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt):].tolist()
        new = generate(model, [prompt], 40, temperature=0, stop_ids=[tok.eot_id])[0]
        assert new == ids


def test_tokens_that_a_model_knows_keep_their_rows(text, place, capsys):
    """Qwen3's folders: 26 tokens behind the ranks, rows of zeros behind them. Ours take no row that is taken."""
    write_family("qwen3", place / "rows", text)
    with open(place / "rows/tokenizer.json", encoding="utf-8") as f:
        added = {token["content"]: token["id"] for token in json.load(f)["added_tokens"]}
    rows = max(added.values()) + 4
    model = make("qwen3", rows)
    to_hf.write_json(str(place / "rows"), "config.json", hf_config(model.config))
    to_hf.write_safetensors(str(place / "rows"), "model.safetensors", hf_views(model))
    back, tok, stage = from_hf.read_hf(str(place / "rows"))
    assert {**added, "<|pad|>": max(added.values()) + 1}.items() == {
        **{name: i for i, name in tok.special_names.items()}, **tok.words}.items()
    assert torch.equal(back.embed.weight, model.embed.weight)
    assert stage == "sft" and "new" not in capsys.readouterr().out
    assert tok.encode("<think>月") == [added["<think>"], *tok.encode("月")] and tok.start_ids == []


def test_half_precision_is_read_exactly(tok, place):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    model = make("qwen3", tok.vocab_size).bfloat16().float()
    to_hf.write_hf(model, tok, "sft", f"{place}/bf16")
    transformers.AutoModelForCausalLM.from_pretrained(f"{place}/bf16", dtype=torch.bfloat16).save_pretrained(
        f"{place}/bf16-again")
    tok.save(f"{place}/bf16-again/tokenizer.model")
    back, _, _ = from_hf.read_hf(f"{place}/bf16-again")
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))


def test_new_chat_tokens_grow_the_model(prefixed, place, capsys):
    """As Llama 2's folders come: four chat tokens more than rows. The new rows are the mean of the old ones."""
    rows = prefixed.vocab_size - 4
    model = make("llama_gqa", rows)
    to_hf.write_hf(model, prefixed, "pretrain", f"{place}/grown")
    os.remove(f"{place}/grown/tokenizer.json")
    back, again, _ = from_hf.read_hf(f"{place}/grown")
    assert "4 tokens are new" in capsys.readouterr().out
    assert back.config.vocab_size == again.vocab_size == rows + 4
    for ours, old in ((back.embed.weight, model.embed.weight), (back.lm_head.weight, model.lm_head.weight)):
        assert torch.equal(ours[:rows], old)
        assert largest(ours[rows:] - old.mean(dim=0)) < 1e-6


@pytest.mark.parametrize("kind, changes, message", [
    ("llama", {"model_type": "gpt2"}, "model_type='gpt2'; what can be imported is llama"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type='linear'"),
    ("llama", {"attention_bias": True}, "missing: model.layers.0.self_attn.k_proj.bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"hidden_size": None}, "does not say hidden_size"),
    ("llama", {"num_hidden_layers": 3}, "missing: model.layers.2"),
    ("llama", {"num_hidden_layers": 1}, "unknown: model.layers.1"),
    ("llama", {"intermediate_size": 88}, r"mlp.gate_proj.weight is \[80, 32\], config.json says \[88, 32\]"),
    ("llama_gqa", {"tie_word_embeddings": True}, "tie_word_embeddings=True, but lm_head.weight is not"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    ("moe", {"n_group": 2}, "n_group=2"),
    ("moe", {"rope_parameters": None, "partial_rotary_factor": None}, "partial_rotary_factor=0.5"),
])
def test_what_cannot_be_imported(kind, changes, message, tok, tmp_path):
    to_hf.write_hf(make(kind, tok.vocab_size), tok, "sft", str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(changes)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(SystemExit, match=message):
        from_hf.read_hf(str(tmp_path))


def test_vocabularies_that_cannot_be_imported(tok, tmp_path):
    to_hf.write_hf(make("llama", tok.vocab_size), tok, "sft", str(tmp_path))
    theirs = json.loads((tmp_path / "tokenizer.json").read_text())
    theirs["added_tokens"][1]["id"] += 7
    (tmp_path / "tokenizer.json").write_text(json.dumps(theirs))
    with pytest.raises(SystemExit, match="has the id .*, which is .* in tokenizer.model"):
        from_hf.read_hf(str(tmp_path))
    os.remove(tmp_path / "tokenizer.json")
    os.remove(tmp_path / "tokenizer.model")
    with pytest.raises(SystemExit, match="has no vocabulary"):
        from_hf.read_hf(str(tmp_path))


def test_a_missing_package_is_named():
    with pytest.raises(SystemExit, match="needs the package no_such: pip install no_such"):
        to_hf.need("no_such.thing", "flying")
