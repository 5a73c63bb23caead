"""
Models as folders of transformers, and adapters as folders of peft.

    write_hf(model, tok, stage, folder)      config.json, model.safetensors, tokenizer.json, the chat template
    write_hf_reward(model, tok, folder)      the same as …ForSequenceClassification
    write_peft(run, folder)                  the adapters of a LoRA run, and its base in base/
"""
import json
import os

import torch

from common.checkpoint import load_model
from configurator import check
from readers.vocabularies import QWEN_PATTERN
from tools.chat_template import CHAT_TEMPLATE, REWARD_TEMPLATE
from tools.hf_names import hf_config, hf_views, qkv_rows
from tools.vocabulary import is_library, tokenizer_json


def need(name, why):
    """Import a package that only an export needs."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        check(False, f"{why} needs the package {name.split('.')[0]}: pip install {name.split('.')[0]}")


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, indent=1)


FILE_BYTES = 5 * 10 ** 9  # of one *.safetensors, at most


def write_safetensors(folder, name, tensors):
    """Write {key: tensor} to folder/name; where one file is not enough, to several, and an index of what lies where."""
    safetensors = need("safetensors.torch", "writing *.safetensors")
    files = [{}]
    size = 0
    for key, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][key] = tensor
        size += tensor.nbytes
    file_of = {}
    for number, part in enumerate(files, 1):
        file = name
        if len(files) > 1:
            file = name.replace(".safetensors", f"-{number:05}-of-{len(files):05}.safetensors")
        # each a tensor of its own: the format takes no views, and no two names for one memory
        own = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in part.items()}
        safetensors.save_file(own, os.path.join(folder, file), metadata={"format": "pt"})
        file_of.update(dict.fromkeys(part, file))
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder, f"{name}.index.json", {"metadata": {"total_size": total}, "weight_map": file_of})


def opening_ids(tok, stage):
    """Return the tokens before a text: those that open a document, for a model that has read documents; none before a
    chat, where the template writes all there is."""
    return tok.start_ids if stage == "pretrain" else []


def write_tokenizer(tok, folder, trained_len, stage):
    """Write tokenizer.json and the chat template; and tokenizer.model, where other programs know it."""
    start = opening_ids(tok, stage)
    theirs = tokenizer_json(tok, start)     # first: a vocabulary that cannot be exported leaves no folder behind
    os.makedirs(folder, exist_ok=True)
    end = tok.special_names[tok.eot_id]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": trained_len,     # may be less than config.json allows
        "bos_token": tok.special_names[start[0]] if len(start) == 1 else None,
        "eos_token": end if stage == "pretrain" else "<|im_end|>",
        "pad_token": "<|pad|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    if not tok.dummy_prefix:
        template = REWARD_TEMPLATE if stage == "reward" else CHAT_TEMPLATE
        config["chat_template"] = template
        with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as f:
            f.write(template)
    write_json(folder, "tokenizer_config.json", config)
    write_json(folder, "tokenizer.json", theirs)
    if not tok.rule and not is_library(tok):
        with open(os.path.join(folder, "tokenizer.model"), "wb") as f:
            f.write(tok.raw)


def end_ids(tok, stage):
    """Return the ids that config.json names: a chat answer ends at <|im_end|>, a document at <|endoftext|>."""
    start = opening_ids(tok, stage)
    eos = tok.eot_id if stage == "pretrain" else [tok.im_end_id, tok.eot_id]
    return {"bos_token_id": start[0] if len(start) == 1 else None, "eos_token_id": eos, "pad_token_id": tok.pad_id}


def config_and_weights(model, tok, stage):
    """Return what goes into config.json, and {name: tensor}, of a Transformer with this vocabulary."""
    config = {**hf_config(model.config), **end_ids(tok, stage)}
    weights = hf_views(model)
    as_qwen = tok.rule == QWEN_PATTERN and tok.settings.get("nfc")
    if config["model_type"] == "qwen2" and not as_qwen:
        # For a qwen2, AutoTokenizer of transformers 5 composes accents and cuts text as Qwen does, whatever
        # tokenizer.json says: other ids.
        # A Llama with attention_bias computes the same, as long as the bias that it has on o_proj too is zero
        config.update(model_type="llama", architectures=["LlamaForCausalLM"])
        for i in range(model.config.n_layers):
            weights[f"model.layers.{i}.self_attn.o_proj.bias"] = torch.zeros(model.config.dim)
    return config, weights


def write_hf(model, tok, stage, folder):
    """Write a Transformer as a folder of transformers."""
    config, weights = config_and_weights(model, tok, stage)
    write_tokenizer(tok, folder, model.trained_len, stage)
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
        if name.endswith(".lora_rows"):
            tables = ["model.embed_tokens"] if name.startswith("embed.") else ["lm_head"]
            if config.n_experts and config.tie_embeddings:
                tables.append("lm_head")    # a mixture of experts is written with a head of its own
            for table in tables:
                adapters[f"base_model.model.{table}.token_adapter.trainable_tokens_delta"] = a
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
    model, tok, checkpoint = load_model(path)    # also makes sure that the base is still the one that was trained on
    lora = checkpoint.get("lora")
    check(lora, f"{path} has no adapters: it was trained without --lora_rank. Export it with --to=hf")
    base, _, _ = load_model(os.path.normpath(os.path.join(run_folder(path), lora["base"])))
    adapters = peft_adapters(checkpoint["model"], base.config)
    tables = [name.split(".")[-3] for name in adapters if "token_adapter" in name]     # embed_tokens, lm_head
    base_folder = os.path.join(folder, "base")
    write_hf(base, tok, checkpoint["stage"], base_folder)
    write_tokenizer(tok, folder, model.trained_len, checkpoint["stage"])
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
        "target_modules": sorted({name.split(".")[-3] for name in adapters if ".lora_" in name}),   # q_proj, …
        "trainable_token_indices": {table: lora["rows"] for table in tables} or None,
    })
