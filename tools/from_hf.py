"""
A folder of transformers as a model of ours: read_hf(folder) -> (Transformer, Tokenizer, stage).
"""
import glob
import math
import os

import torch

from configurator import check
from model import Transformer
from readers.hf_tokenizer import read_json, text_of
from readers.vocabularies import open_vocabulary
from tokenizer import make_tokenizer
from tools.hf_names import config_from_hf, hf_views
from tools.to_hf import need


def read_vocabulary(folder):
    """Return the Tokenizer of a folder of transformers. What opens a text there opens it here, too: nothing, where
    transformers puts nothing before a text."""
    tok = open_vocabulary(folder)
    return make_tokenizer(tok.raw, {"start": [], **tok.settings}, folder)


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
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight"
    tied = head in views or head not in names or torch.equal(read(head), read(embedding))
    check(tied, f"config.json says tie_word_embeddings=True, but {head} is not {embedding}. Write false there")
    check(not missing and not unknown, "the weights are not those that config.json promises; missing: "
          f"{', '.join(missing[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}")
    for name, view in views.items():
        tensor = read(name)
        if name in (embedding, head):
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

    settings = read_json(folder, "tokenizer_config.json")
    model.trained_len = int(min(settings.get("model_max_length") or math.inf, config.max_seq_len))
    # a model whose texts end with <|im_end|> has learned to chat
    eos = text_of(settings.get("eos_token"))
    return model.eval(), tok, "sft" if eos == "<|im_end|>" else "pretrain"
