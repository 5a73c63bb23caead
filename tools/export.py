"""
Take a trained model to other programs, or bring one in from transformers.

    python -m tools.export out/poems-sft --to=hf --out=out/poems-hf         # transformers, vLLM, SGLang
    python -m tools.export out/poems-sft --to=gguf --out=out/poems-gguf     # llama.cpp, ollama
    python -m tools.export out/poems-lora --to=peft --out=out/poems-peft    # a LoRA run's adapters, its base in base/
    python -m tools.export --from=Qwen3-0.6B --out=out/qwen3                # a folder of transformers becomes a run

in:  a run's folder (ckpt.pt, tokenizer.model), or a folder with config.json, *.safetensors and a vocabulary
out: hf: config.json, model.safetensors, tokenizer.json, a chat template; gguf: model.gguf; peft: the adapters, and
     base/ as hf; --from: ckpt.pt, tokenizer.model. What the other program would compute or spell otherwise is refused

A reward model goes to hf as a …ForSequenceClassification.
"""
import dataclasses
import glob
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from typing import Literal

import torch

from common.checkpoint import load_checkpoint, load_model, load_reward_model, save_checkpoint
from configurator import check, run
from model import Transformer
from tokenizer import QWEN_PATTERN, SPECIAL_TOKENS, load_tokenizer
from tools.hf_names import config_from_hf, hf_config, hf_views, qkv_rows
from tools.vocabulary import (UNKNOWN, UNUSED, Piece, count_ranks, is_tiktoken, merges, rank_file, tiktoken_pattern,
                              tokenizer_json, vocabulary)


@dataclass
class Config:
    run: str = ""     # folder of the run to take out (the bare word)
    to: Literal["hf", "gguf", "peft"] = "hf"
    from_: str = ""   # instead of a run: a folder of transformers to bring in (write --from=FOLDER)
    out: str = ""     # folder to write
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32"  # of the matrices in a GGUF file


# ---------------------------------------------------------------------------- the chat template

# render_chat() of tokenizer.py as text. What stands between the generation marks is what the assistant learns
TURN_END = r"{{- '\n' }}"
CHAT_TEMPLATE = (
    r"{%- for message in messages %}"
    r"{{- '<|im_start|>' + message['role'] + '\n' }}"
    r"{%- if message['role'] == 'assistant' %}"
    r"{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}"
    r"{%- else %}"
    r"{{- message['content'] + '<|im_end|>' }}"
    r"{%- endif %}"
    + TURN_END +
    r"{%- endfor %}"
    r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
# a reward model is read at the last <|im_end|>, and transformers reads the last token: nothing may follow
REWARD_TEMPLATE = CHAT_TEMPLATE.replace(TURN_END, r"{%- if not loop.last %}" + TURN_END + r"{%- endif %}")
# llama.cpp and ollama know no generation marks
PLAIN_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def note_limits(tok):
    """Say where the chat template, which writes one text, cannot give the ids of render_chat, which encodes parts."""
    if tok.dummy_prefix:
        print("note: this vocabulary puts a space before every text, so no text gives the ids the chat was trained on: "
              "no chat template is written. Make prompts with render_chat() of tokenizer.py and pass their ids")
    elif is_tiktoken(tok):
        print("note: this vocabulary merges line breaks, so a message that begins with one gets other ids through the "
              "chat template than in training; all others get the same")


# ---------------------------------------------------------------------------- transformers


def need(name, why):
    """Import a package that only an export needs."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        check(False, f"{why} needs the package {name.split('.')[0]}: pip install {name.split('.')[0]}")


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, indent=1)


def write_safetensors(folder, name, tensors):
    safetensors = need("safetensors.torch", "writing *.safetensors")
    # each a tensor of its own: the format takes no views, and no two names for one memory
    own = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    safetensors.save_file(own, os.path.join(folder, name), metadata={"format": "pt"})


def write_tokenizer(tok, folder, max_seq_len, stage):
    """Write tokenizer.json, the chat template, and tokenizer.model, which lets the folder be brought in again."""
    theirs = tokenizer_json(tok)    # first: a vocabulary that cannot be exported leaves no folder behind
    os.makedirs(folder, exist_ok=True)
    template = REWARD_TEMPLATE if stage == "reward" else CHAT_TEMPLATE
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len, "bos_token": None,
              "eos_token": "<|endoftext|>" if stage == "pretrain" else "<|im_end|>", "pad_token": "<|pad|>",
              "unk_token": None, "clean_up_tokenization_spaces": False}
    if not tok.dummy_prefix:
        config["chat_template"] = template
        with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as f:
            f.write(template)
    write_json(folder, "tokenizer_config.json", config)
    write_json(folder, "tokenizer.json", theirs)
    tok.save(os.path.join(folder, "tokenizer.model"))


def end_ids(tok, stage):
    """Return the ids that config.json names: a chat answer ends at <|im_end|>, a document at <|endoftext|>."""
    eos = tok.eot_id if stage == "pretrain" else [tok.im_end_id, tok.eot_id]
    return {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": tok.pad_id}


def config_and_weights(model, tok, stage):
    """Return what goes into config.json, and {name: tensor}, of a Transformer with this vocabulary."""
    config = {**hf_config(model.config), **end_ids(tok, stage)}
    weights = hf_views(model)
    as_qwen = is_tiktoken(tok) and tiktoken_pattern(count_ranks(tok))[0] == QWEN_PATTERN
    if config["model_type"] == "qwen2" and not as_qwen:
        # For a qwen2, AutoTokenizer of transformers 5 cuts text as Qwen does, whatever tokenizer.json says: other ids.
        # A Llama with attention_bias computes the same, as long as the bias that it has on o_proj too is zero
        config.update(model_type="llama", architectures=["LlamaForCausalLM"])
        for i in range(model.config.n_layers):
            weights[f"model.layers.{i}.self_attn.o_proj.bias"] = torch.zeros(model.config.dim)
    return config, weights


def write_hf(model, tok, stage, folder):
    """Write a Transformer as a folder of transformers."""
    config, weights = config_and_weights(model, tok, stage)
    write_tokenizer(tok, folder, model.config.max_seq_len, stage)
    write_json(folder, "config.json", config)
    write_json(folder, "generation_config.json", end_ids(tok, stage))
    write_safetensors(folder, "model.safetensors", weights)


def write_hf_reward(model, tok, folder):
    """Write a ScalarModel as a …ForSequenceClassification with one label, whose logit is the score.

    transformers' head has no bias. What ours adds to every score stands in config.json as score_bias: no comparison of
    two answers needs it.
    """
    check(not model.config.n_experts, "transformers has no Glm4MoeForSequenceClassification: a reward model with "
          "n_experts cannot be exported")
    config, weights = config_and_weights(model.trunk, tok, "reward")
    config["architectures"] = [name.replace("CausalLM", "SequenceClassification") for name in config["architectures"]]
    config["id2label"] = {"0": "score"}
    config["label2id"] = {"score": 0}
    config["problem_type"] = "regression"   # the number itself, no sigmoid of it
    config["score_bias"] = model.head.bias.item()
    weights["score.weight"] = model.head.weight
    write_tokenizer(tok, folder, model.config.max_seq_len, "reward")
    write_json(folder, "config.json", config)
    write_safetensors(folder, "model.safetensors", weights)


# ---------------------------------------------------------------------------- llama.cpp

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def gguf_architecture(config):
    """Return which of llama.cpp's models computes what ours does. Its qwen3 norms q and k and turns the pairs of
    channels that we turn; its llama takes biases, but turns neighbours (see interleave)."""
    if config.n_experts:
        return "glm4moe"
    return "qwen3" if config.qk_norm else "llama"


def interleave(tensor, head_dim):
    """Reorder the rows of q or k within each head for llama.cpp's llama, which turns the pair of channels (2i, 2i + 1)
    where we turn (i, i + D/2)."""
    heads = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])                # (heads, 2, D/2[, C])
    return heads.transpose(1, 2).reshape(tensor.shape)


def gguf_tensors(model):
    """Yield (name in llama.cpp, tensor) for all weights of a Transformer."""
    config = model.config
    arch = gguf_architecture(config)
    for name, tensor in hf_views(model).items():
        stem, _, kind = name.rpartition(".")
        if stem in GGUF_NAMES:
            yield f"{GGUF_NAMES[stem]}.{kind}", tensor
            continue
        _, _, layer, part = stem.split(".", 3)      # model.layers.3.mlp.gate_proj
        if kind == "e_score_correction_bias":
            yield f"blk.{layer}.exp_probs_b.bias", tensor
        elif not part.startswith("mlp.experts."):
            theirs = GGUF_NAMES[part]
            if arch == "glm4moe" and theirs == "ffn_norm":
                theirs = "post_attention_norm"
            if arch == "llama" and theirs in ("attn_q", "attn_k"):
                tensor = interleave(tensor, config.head_dim)
            yield f"blk.{layer}.{theirs}.{kind}", tensor
    # the experts of a layer are one tensor, as ours are, with the input channels last
    for layer, block in enumerate(model.blocks):
        if hasattr(block.ffn, "router"):
            gate, up = block.ffn.gate_up.detach().transpose(1, 2).chunk(2, dim=1)   # (E, W, C)
            yield f"blk.{layer}.ffn_gate_exps.weight", gate
            yield f"blk.{layer}.ffn_up_exps.weight", up
            yield f"blk.{layer}.ffn_down_exps.weight", block.ffn.down.detach().transpose(1, 2)


def add_gguf_config(writer, config, gguf):
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.n_experts:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.n_active_experts)
        writer.add_expert_shared_count(config.n_shared_experts or 1)    # one of zeros, see hf_names.py
        writer.add_expert_feed_forward_length(config.expert_hidden_dim)
        writer.add_leading_dense_block_count(config.first_dense)
        writer.add_expert_weights_scale(config.route_scale)
        writer.add_expert_weights_norm(True)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def add_gguf_vocabulary(writer, tok, vocab_size, stage):
    pieces = vocabulary(tok)
    for i in range(len(pieces), vocab_size):
        pieces.append(Piece(f"<|unused_{i}|>", 0.0, UNUSED))    # rows of the embedding that no token uses
    if is_tiktoken(tok):
        writer.add_tokenizer_model("gpt2")
        _, pattern_name = tiktoken_pattern(count_ranks(tok))
        writer.add_tokenizer_pre(pattern_name)
        writer.add_token_merges([f"{left} {right}" for left, right in merges(pieces)])
    else:
        # llama.cpp merges by score, as sentencepiece does
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([piece.score for piece in pieces])
        writer.add_unk_token_id(next(i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN))
    writer.add_token_list([piece.text.encode() for piece in pieces])
    writer.add_token_types([piece.kind for piece in pieces])
    # both are on where a file does not say otherwise
    writer.add_add_space_prefix(tok.dummy_prefix)
    writer.add_add_bos_token(stage == "pretrain")       # a text begins with <|endoftext|>, as in sample.py
    writer.add_add_eos_token(False)
    writer.add_bos_token_id(tok.eot_id)
    writer.add_eos_token_id(tok.eot_id if stage == "pretrain" else tok.im_end_id)
    writer.add_pad_token_id(tok.pad_id)
    if not tok.dummy_prefix:
        writer.add_chat_template(PLAIN_TEMPLATE)


def write_gguf(model, tok, stage, path, dtype="f32"):
    """Write a Transformer as a file of llama.cpp, its matrices as dtype."""
    gguf = need("gguf", "writing GGUF files")
    matrices, file_type = {
        "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }[dtype]
    writer = gguf.GGUFWriter(path, gguf_architecture(model.config))
    writer.add_name("mingyue")
    writer.add_file_type(file_type)
    add_gguf_config(writer, model.config, gguf)
    add_gguf_vocabulary(writer, tok, model.config.vocab_size, stage)
    for name, tensor in gguf_tensors(model):
        values = tensor.float().contiguous().numpy()
        # gains, biases and the router stay exact; q8_0 wants rows of whole blocks of 32
        exact = values.ndim == 1 or "ffn_gate_inp" in name or (dtype == "q8_0" and values.shape[-1] % 32)
        kind = gguf.GGMLQuantizationType.F32 if exact else matrices
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------------- peft

PEFT_NAMES = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out": ("self_attn.o_proj",),
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": ("mlp.down_proj",),
}


def peft_adapters(state, config):
    """Return {peft's name: tensor} of a LoRA checkpoint's tensors {…lora_a, …lora_b}.

    A fused matrix has one A and a B of all its rows. Cut apart, each part keeps the A and its own rows of B.
    """
    adapters = {}
    for name, a in state.items():
        if not name.endswith(".lora_a"):
            continue    # its B is taken with it
        _, layer, module = name.removesuffix(".lora_a").split(".", 2)       # blocks.3.attn.qkv
        check(not config.n_experts or module.startswith("attn."),
              f"of a mixture of experts peft can adapt the attention alone, and this run adapts {module}: train it "
              "with --lora_targets='qkv|out', or export it merged with --to=hf")
        targets = PEFT_NAMES[module]
        b = state[name.removesuffix("a") + "b"]
        parts = b.split(qkv_rows(config)) if module == "attn.qkv" else b.chunk(len(targets))
        for target, part in zip(targets, parts, strict=True):
            theirs = f"base_model.model.model.layers.{layer}.{target}"
            adapters[f"{theirs}.lora_A.weight"] = a
            adapters[f"{theirs}.lora_B.weight"] = part
    return adapters


def run_folder(path):
    """Return the folder of a run that was named by its folder or by a file in it."""
    return path if os.path.isdir(path) else os.path.dirname(path) or "."


def write_peft(path, folder):
    """Write the adapters of a LoRA run, and the model they belong to as folder/base."""
    _, tok, checkpoint = load_model(path)    # also makes sure that the base is still the one that was trained on
    lora = checkpoint.get("lora")
    check(lora, f"{path} has no adapters: it was trained without --lora_rank. Export it with --to=hf")
    base, _, _ = load_model(os.path.normpath(os.path.join(run_folder(path), lora["base"])))
    adapters = peft_adapters(checkpoint["model"], base.config)
    base_folder = os.path.join(folder, "base")
    write_hf(base, tok, checkpoint["stage"], base_folder)
    write_tokenizer(tok, folder, base.config.max_seq_len, checkpoint["stage"])
    write_safetensors(folder, "adapter_model.safetensors", adapters)
    write_json(folder, "adapter_config.json", {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_folder,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.split(".")[-3] for name in adapters}),   # q_proj, …
    })


# ---------------------------------------------------------------------------- the way in


def read_vocabulary(folder):
    """Return the Tokenizer of a folder of transformers: its tokenizer.model, or one made of its tokenizer.json."""
    path = os.path.join(folder, "tokenizer.model")
    theirs = read_json(folder, "tokenizer.json")
    if os.path.exists(path):
        tok = load_tokenizer(path)
    else:
        check(theirs, f"{folder} has no vocabulary: neither tokenizer.model nor tokenizer.json")
        with tempfile.TemporaryDirectory() as scratch:
            path = os.path.join(scratch, "tokenizer.model")
            with open(path, "wb") as f:
                f.write(rank_file(theirs))
            tok = load_tokenizer(path)
    # a file without chat tokens gets them behind its own; where the folder has them already, they must be the same
    for token in theirs.get("added_tokens", []):
        number = token["id"]
        ours = tok.special_names.get(number)
        check(token["content"] not in SPECIAL_TOKENS or token["content"] == ours,
              f"{folder}/tokenizer.json gives {token['content']} the id {number}, which tokenizer.py gives {ours}")
    return tok


def read_json(folder, name):
    """Return the dict in folder/name, an empty one where there is no such file."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def open_weights(folder):
    """Return (names, read): the names of all tensors in a folder's *.safetensors, and name -> tensor in fp32."""
    safetensors = need("safetensors", "reading *.safetensors")
    path_of = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))):
        with safetensors.safe_open(path, "pt") as f:
            path_of.update(dict.fromkeys(f.keys(), path))
    check(path_of, f"no *.safetensors in {folder}")

    def read(name):
        # one at a time: the model and its largest tensor are all that lies in memory
        with safetensors.safe_open(path_of[name], "pt") as f:
            return f.get_tensor(name).float()

    return set(path_of), read


def fill(model, names, read, known_rows):
    """Copy every tensor into the model. known_rows: tokens that the file's embedding has; ours may have more."""
    views = hf_views(model)
    missing = sorted(views.keys() - names)
    unknown = []
    for name in sorted(names - views.keys()):
        # tied models may name their head all the same, old ones the rotary frequencies, Llamas a bias that is zero
        zero_bias = name.endswith("o_proj.bias") and not read(name).any()
        if name != "lm_head.weight" and not name.endswith("inv_freq") and not zero_bias:
            unknown.append(name)
    check(not missing and not unknown, "the weights are not those that config.json promises; missing: "
          f"{', '.join(missing[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}")
    for name, view in views.items():
        tensor = read(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            # tokens that are new to the model start as the mean of those it knows
            view[known_rows:] = tensor.mean(dim=0)
            view = view[:known_rows]
        check(tensor.shape == view.shape, f"{name} is {list(tensor.shape)}, config.json says {list(view.shape)}")
        view.copy_(tensor)


@torch.no_grad()
def read_hf(folder):
    """Return (Transformer, Tokenizer, stage) of a folder of transformers."""
    theirs = read_json(folder, "config.json")
    check(theirs, f"no config.json in '{folder}': --from wants a folder as transformers writes it")
    config = config_from_hf(theirs)
    tok = read_vocabulary(folder)
    names, read = open_weights(folder)
    if config.n_experts:
        # what hf_views had to add to a mixture of experts is taken off again: a second head, an expert of zeros
        head = "lm_head.weight"
        config.tie_embeddings = head in names and torch.equal(read(head), read("model.embed_tokens.weight"))
        shared = [name for name in names if ".shared_experts." in name]
        if config.n_shared_experts == 1 and not any(read(name).any() for name in shared):
            config.n_shared_experts = 0
    # a vocabulary without chat tokens has got them from tokenizer.py: the embedding grows by their rows
    known_rows = config.vocab_size
    config.vocab_size = max(known_rows, tok.vocab_size)
    model = Transformer(config)
    fill(model, names, read, known_rows)
    if config.vocab_size > known_rows:
        print(f"note: {config.vocab_size - known_rows} tokens are new to this model, among them "
              f"{tok.special_names[config.vocab_size - 1]}: train it with sft.py before you chat with it")

    # a model whose texts end with <|im_end|> has learned to chat
    eos = read_json(folder, "tokenizer_config.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return model.eval(), tok, "sft" if eos == "<|im_end|>" else "pretrain"


def write_run(model, tok, stage, folder):
    """Write a run of ours, whole weights and no optimizer, that every later stage can start from."""
    os.makedirs(folder, exist_ok=True)
    tok.save(os.path.join(folder, "tokenizer.model"))
    save_checkpoint(os.path.join(folder, "ckpt.pt"), {
        "stage": stage,
        "step": 0,
        "model": model.state_dict(),
        "model_config": dataclasses.asdict(model.config),
        "config": {},
        "lora": None,
        "fingerprint": tok.fingerprint,
        "best_val": math.inf,
        "optimizers": [],
        "scaler": {},
    })


def main(cfg):
    check(bool(cfg.run) != bool(cfg.from_), "name a run to take out (python -m tools.export out/poems-sft "
          "--out=FOLDER) or a folder to bring in (--from=FOLDER --out=out/NAME), one of the two")
    check(cfg.out, "say where to write: --out=FOLDER")
    check(not os.path.exists(os.path.join(cfg.out, "ckpt.pt")), f"{cfg.out} holds a run already: choose another --out")
    if cfg.from_:
        model, tok, stage = read_hf(cfg.from_)
        write_run(model, tok, stage, cfg.out)
        print(f"{cfg.out}: {model.count()[0]:,} parameters. Try python sample.py --out_dir={cfg.out}")
        return

    check(cfg.to == "gguf" or cfg.dtype == "f32", f"--to={cfg.to} writes fp32: --dtype={cfg.dtype} is for --to=gguf")
    stage = load_checkpoint(cfg.run)["stage"]
    tok = load_tokenizer(run_folder(cfg.run))
    note_limits(tok)
    if stage == "reward":
        check(cfg.to == "hf", f"{cfg.run} is a reward model, which writes no text: export it with --to=hf")
        write_hf_reward(load_reward_model(cfg.run, "cpu", tok.fingerprint), tok, cfg.out)
    elif cfg.to == "peft":
        write_peft(cfg.run, cfg.out)
    else:
        model, _, _ = load_model(cfg.run)
        if cfg.to == "hf":
            write_hf(model, tok, stage, cfg.out)
        else:
            write_gguf(model, tok, stage, os.path.join(cfg.out, "model.gguf"), cfg.dtype)
    print(f"{cfg.out}: {', '.join(sorted(os.listdir(cfg.out)))}")


if __name__ == "__main__":
    # `from` is a word of Python and can name no field, so --from= fills from_
    sys.argv = [re.sub("^--from=", "--from_=", word) for word in sys.argv]
    run(main, Config, positional="run")
