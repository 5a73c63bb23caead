"""
Take a trained model to other programs, or bring one in from transformers.

    python -m tools.export out/poems-sft --to=hf --out=out/poems-hf         # transformers, vLLM, SGLang
    python -m tools.export out/poems-sft --to=gguf --out=out/poems-gguf     # llama.cpp, ollama
    python -m tools.export out/poems-lora --to=peft --out=out/poems-peft    # a LoRA run's adapters, its base in base/
    python -m tools.export out/poems-lora --to=merged --out=out/poems-full  # … or a run's shards: weights in one file
    python -m tools.export --from=Qwen3-0.6B --out=out/qwen3                # a folder of transformers becomes a run

in:  a run's folder (ckpt.pt, tokenizer.model), or a folder with config.json, *.safetensors and a vocabulary
out: hf: config.json, model.safetensors, tokenizer.json, a chat template; gguf: model.gguf; peft: the adapters, and
     base/ as hf; merged, --from: ckpt.pt, tokenizer.model. What the other program would compute or spell otherwise is
     refused

A base model's text begins there as it does here, with what opens a document. A reward model goes to hf as a
…ForSequenceClassification.
"""
import dataclasses
import math
import os
import re
import sys
from dataclasses import dataclass
from typing import Literal

from common.checkpoint import load_checkpoint, load_model, load_reward_model, save_checkpoint
from common.sharding import read_shards
from configurator import check, run
from tokenizer import load_tokenizer
from tools.chat_template import CHAT_TEMPLATE  # noqa: F401, what a chat export writes
from tools.from_hf import read_hf
from tools.to_gguf import write_gguf
from tools.to_hf import run_folder, write_hf, write_hf_reward, write_peft
from tools.vocabulary import is_tiktoken


@dataclass
class Config:
    run: str = ""     # folder of the run to take out (the bare word)
    to: Literal["hf", "gguf", "peft", "merged"] = "hf"
    from_: str = ""   # instead of a run: a folder of transformers to bring in (write --from=FOLDER)
    out: str = ""     # folder to write
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32"  # of the matrices in a GGUF file


def note_limits(tok, to):
    """Say where the other program cannot give the ids that the model was trained with."""
    if tok.dummy_prefix:
        print("note: this vocabulary puts a space before every text, so no text gives the ids the chat was trained on: "
              "no chat template is written. Make prompts with render_chat() of tokenizer.py and pass their ids")
    elif is_tiktoken(tok):
        print("note: this vocabulary merges line breaks, so a message that begins with one gets other ids through the "
              "chat template than in training; all others get the same")
    if to == "gguf" and tok.settings.get("nfc"):
        print("note: this vocabulary composes accents first (NFC), and llama.cpp does not: give it composed text")


def write_run(model, tok, stage, folder):
    """Write a run of ours, whole weights and no optimizer, that every later stage can start from."""
    os.makedirs(folder, exist_ok=True)
    tok.save(os.path.join(folder, "tokenizer.model"))
    save_checkpoint(os.path.join(folder, "ckpt.pt"), {
        "stage": stage,
        "step": 0,
        "model": model.state_dict(),
        "model_config": dataclasses.asdict(model.config),
        "trained_len": model.trained_len,
        "config": {},
        "lora": None,
        "fingerprint": tok.fingerprint,
        "best_val": math.inf,
        "optimizers": [],
        "scaler": {},
    })


def write_merged(path, folder):
    """Write a run in shards, or of adapters, as a run of whole weights in one file."""
    checkpoint = load_checkpoint(path, shards_too=True)
    lora = checkpoint.get("lora")
    check(lora or checkpoint.get("shards"), f"{path} holds no adapters and no shards, but whole weights: there is "
          "nothing to merge")
    os.makedirs(folder, exist_ok=True)
    tok = load_tokenizer(run_folder(path))
    tok.save(os.path.join(folder, "tokenizer.model"))
    # what belongs to training is left behind
    merged = {**checkpoint, "optimizers": [], "scaler": {}, "shards": ""}
    if checkpoint.get("shards"):
        merged["model"] = read_shards(checkpoint["shards"])
        if lora:
            base = os.path.join(run_folder(path), lora["base"])
            merged["lora"] = {**lora, "base": os.path.relpath(base, folder)}
            save_checkpoint(os.path.join(folder, "ckpt.pt"), merged)
            path = folder
    if lora:
        # load_model adds up base and adapters
        model, _, _ = load_model(path)
        merged.update(model=model.state_dict(), lora=None)
    save_checkpoint(os.path.join(folder, "ckpt.pt"), merged)


def write_for_others(cfg):
    """Write a run for another program, as cfg.to says."""
    stage = load_checkpoint(cfg.run)["stage"]
    tok = load_tokenizer(run_folder(cfg.run))
    note_limits(tok, cfg.to)
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


def files_of(folder):
    """{name: time of its last change} of the files in a folder."""
    if not os.path.isdir(folder):
        return {}
    return {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(folder) if entry.is_file()}


def main(cfg):
    check(bool(cfg.run) != bool(cfg.from_), "name a run to take out (python -m tools.export out/poems-sft "
          "--out=FOLDER) or a folder to bring in (--from=FOLDER --out=out/NAME), one of the two")
    check(cfg.out, "say where to write: --out=FOLDER")
    check(not os.path.exists(os.path.join(cfg.out, "ckpt.pt")), f"{cfg.out} holds a run already: choose another --out")
    if cfg.from_:
        check(cfg.to == "hf" and cfg.dtype == "f32", f"--from= brings a model in as a run of ours, in fp32: leave "
              f"--to={cfg.to} and --dtype={cfg.dtype} out")
        model, tok, stage = read_hf(cfg.from_)
        write_run(model, tok, stage, cfg.out)
        n_params = sum(p.numel() for p in model.parameters())
        print(f"{cfg.out}: {n_params:,} parameters. Try python sample.py --out_dir={cfg.out}")
        return

    check(cfg.to == "gguf" or cfg.dtype == "f32", f"--to={cfg.to} writes fp32: --dtype={cfg.dtype} is for --to=gguf")
    before = files_of(cfg.out)
    if cfg.to == "merged":
        write_merged(cfg.run, cfg.out)
    else:
        write_for_others(cfg)
    print(f"{cfg.out}: {', '.join(sorted(os.listdir(cfg.out)))}")
    # what an earlier export has left may contradict this one: another chat template, another vocabulary
    left = sorted(name for name, changed in files_of(cfg.out).items() if before.get(name) == changed)
    if left:
        print(f"note: {', '.join(left)} stood there before and may be of another model: remove it, or take a new --out")


if __name__ == "__main__":
    # `from` is a word of Python and can name no field, so --from= fills from_
    sys.argv = [re.sub("^--from=", "--from_=", word) for word in sys.argv]
    run(main, Config, positional="run")
