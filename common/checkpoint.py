"""
What a run leaves on disk, its folder out/<run>/: ckpt.pt, best.pt, tokenizer.model, log.jsonl.
The ckpt.pt of a model in shards (sharding.py) has no weights: it names the folder that holds them.

    own(cfg, env)                                     before the loop: no other process writes to this folder
    catch_signals(env)                                Ctrl-C ends the run after a step, with a checkpoint
    checkpoint = find(STAGE, SAME, cfg, env, …)       what an earlier start of this run has saved, or None
    step, best_val = restore(checkpoint, …)           its weights, optimizers, step
    save("ckpt.pt", STAGE, cfg, env, step, …)         in the loop
    model, tokenizer, checkpoint = load_model(path)   elsewhere: a finished run

Which rows a step sees follows from its number, so weights, optimizers and the step are all that a run needs to go on.
"""
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal

import torch
import torch.distributed as dist

from common.distributed import all_sum, leave
from common.lora import adapters_of, merge_adapters, weights_hash
from common.sharding import is_shard, load_shards
from configurator import check
from model import ModelConfig, ScalarModel, Transformer
from tokenizer import load_tokenizer

# ---------------------------------------------------------------------------- before the loop


def own(cfg, env, base=""):
    """Lock cfg.out_dir, so that no other process writes to it; the lock ends with this process, even if it is killed.
    Exits where out_dir is the run that this one starts from (base)."""
    folder = base if os.path.isdir(base) else os.path.dirname(base)
    check(not base or os.path.realpath(folder) != os.path.realpath(cfg.out_dir), f"out_dir={cfg.out_dir} is the run "
          "that this one starts from, and would be overwritten. Choose another --out_dir")
    check(cfg.min_lr <= cfg.lr, f"min_lr={cfg.min_lr} exceeds lr={cfg.lr}, from which the rate falls to it. Set both")
    if not env.is_main:
        return
    if cfg.warmup_steps > cfg.max_steps:
        print(f"note: warmup_steps={cfg.warmup_steps}, but the run ends after {cfg.max_steps} steps and never reaches "
              f"lr={cfg.lr}. Without --warmup_steps the warmup takes a tenth of the steps")
    os.makedirs(cfg.out_dir, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        return
    env.lock = open(os.path.join(cfg.out_dir, ".lock"), "w")
    try:
        fcntl.flock(env.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        check(False, f"another process is writing to {cfg.out_dir}. Wait for it, or choose another --out_dir")


def catch_signals(env):
    """Note signals that ask this process to stop (Ctrl-C, kill) in env.signals; the same one again ends it at once."""

    def handler(number, frame):
        env.signals.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # nohup has made us ignore SIGHUP: leave it so
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def find(stage, same, cfg, env, model, tokenizer):
    """Return the checkpoint in cfg.out_dir, if this run has saved one, else None. Exits if it is another run's: another
    stage, model or tokenizer, or other values of the settings named in `same`. Later lines of the log are cut off."""
    path = os.path.join(cfg.out_dir, "ckpt.pt")
    checkpoint = None
    if os.path.exists(path):
        checkpoint = load_checkpoint(path, shards_too=True)
        check(checkpoint["stage"] == stage, f"{cfg.out_dir} holds a run of {checkpoint['stage']}.py, and {stage}.py "
              "would overwrite it. Choose another --out_dir")
    if not cfg.resume:
        checkpoint = None
    # all processes must go on from the same step, or they would train different models
    step = checkpoint["step"] if checkpoint else 0
    total = all_sum([step], env)[0]
    check(total == step * env.world, f"rank {env.rank} finds step {step} in {path}, others find another: out_dir must "
          "be one folder that all machines share")
    # cut off log lines of later steps: these steps will be done again
    lines = log_lines(cfg)
    n_kept = checkpoint.get("log", len(lines)) if checkpoint else 0
    if env.is_main and len(lines) > n_kept:
        os.truncate(os.path.join(cfg.out_dir, "log.jsonl"), sum(map(len, lines[:n_kept])))
    if checkpoint is None:
        return None
    then = checkpoint["config"]
    now = dataclasses.asdict(cfg)
    check(then and (checkpoint["optimizers"] or checkpoint.get("shards")), f"{path} holds weights alone (imported or "
          "merged), without the optimizers' state that a run needs to go on. Choose another --out_dir")
    theirs = identity(then, same, checkpoint["model_config"], checkpoint.get("lora"), checkpoint["fingerprint"])
    ours = identity(now, same, vars(model.config), getattr(model, "lora", None), tokenizer.fingerprint)
    different = [f"{key}={theirs.get(key)} there, {value} here" for key, value in ours.items()
                 if theirs.get(key) != value]
    check(not different, f"{path} is of another run: {'; '.join(different)}. Use its settings, choose another "
          "--out_dir, or start again with --resume=False")
    if env.is_main:
        changes = {key: value for key, value in now.items() if then.get(key) != value}
        if checkpoint.get("data") != data_size(cfg):
            changes["the data itself"] = "prepared anew"  # from now on other rows, in another order
        print(f"resuming {path} at step {step} of {cfg.max_steps}; settings changed since: {changes or 'none'}")
        if step >= cfg.max_steps:
            print("it is finished: raise --max_steps, choose another --out_dir, or start again with --resume=False")
    return checkpoint


def identity(settings, same, model_config, lora, fingerprint):
    """Return the facts in which a checkpoint and a run that goes on from it must agree: {name: value}."""
    facts = {**vars(ModelConfig(**model_config)), "lora": lora, "tokenizer": fingerprint[:12]}
    for name in same:
        value = settings.get(name)
        # realpath: data/x and data/../data/x are one folder
        facts[name] = os.path.realpath(value) if name in ("data_dir", "init_from") and value else value
    # the product alone: how a step is cut into micro-steps may change, as its rows stay the same
    facts["batch_size * grad_accum"] = settings["batch_size"] * settings["grad_accum"]
    return facts


def data_size(cfg):
    """Bytes of the training tokens: if they differ, the data have changed."""
    path = os.path.join(cfg.data_dir, "train.bin")
    return os.path.getsize(path) if os.path.exists(path) else 0


def restore(checkpoint, model, optimizers, env):
    """Load the checkpoint of find(). Return (step, lowest validation loss so far); (0, infinity) without checkpoint."""
    if checkpoint is None:
        return 0, math.inf
    if checkpoint.get("shards"):
        load_shards(checkpoint["shards"], learned_weights(model), optimizers)
    else:
        check(not is_shard(next(model.parameters())), "this run was saved whole: go on without --shard")
        model.load_state_dict(checkpoint["model"], strict=not checkpoint.get("lora"))
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            # take the averages of gradients from the checkpoint; learning rate, decay and momentum from the settings
            state["param_groups"] = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(state)
    if checkpoint["scaler"]:  # empty where matmuls were in bf16 or fp32
        env.scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"], checkpoint.get("best_val", math.inf)


# ---------------------------------------------------------------------------- save


def save(name, stage, cfg, env, step, model, optimizers, tokenizer, **extra):
    """Write all that a run needs to go on to out_dir/name, and the tokenizer beside it. extra: best_val, critic."""
    weights = learned_weights(model)
    finite = all(weight.isfinite().all() for weight in [*weights.values(), *extra.get("critic", {}).values()])
    check(finite, f"after step {step} not all weights are finite, so they are not saved. Lower --lr (now {cfg.lr})")
    states = [optimizer.state_dict() for optimizer in optimizers]
    shards = ""
    if is_shard(next(model.parameters())):
        # each process writes its part of the model into a folder, which ckpt.pt will name
        from torch.distributed.checkpoint import save as save_shards
        shards = f"{name.removesuffix('.pt')}-{step}"
        save_shards({"model": weights, "optimizers": states}, checkpoint_id=os.path.join(cfg.out_dir, shards))
        weights = {}
        states = []
    if not env.is_main:
        return
    path = os.path.join(cfg.out_dir, "tokenizer.model")
    tokenizer.save(path + ".tmp")
    os.replace(path + ".tmp", path)
    save_checkpoint(os.path.join(cfg.out_dir, name), {
        "stage": stage,
        "step": step,
        "model": weights,
        "shards": shards,
        "model_config": dataclasses.asdict(model.config),
        "lora": getattr(model, "lora", None),
        "trained_len": getattr(model, "trained_len", 0),
        "config": dataclasses.asdict(cfg),
        "fingerprint": tokenizer.fingerprint,
        "data": data_size(cfg),
        "log": len(log_lines(cfg)),
        "optimizers": states,
        "scaler": env.scaler.state_dict(),
        **extra})
    for folder in os.listdir(cfg.out_dir):
        if re.fullmatch(rf"{name.removesuffix('.pt')}-\d+", folder) and folder != shards:
            shutil.rmtree(os.path.join(cfg.out_dir, folder))  # shards of an older checkpoint


def learned_weights(model):
    """Return the weights that a checkpoint of the model holds: all, or its adapters alone."""
    if getattr(model, "lora", None):
        return adapters_of(model)
    return model.state_dict()


def save_checkpoint(path, checkpoint):
    """Write a dict to path, whole or not at all: to a temporary name, flushed to disk, then renamed."""
    temporary = path + ".tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        reason = str(error).splitlines()[0]
        check(False, f"cannot write {path} ({reason}). What was there before is whole: make room and run it again")


# ---------------------------------------------------------------------------- load


def load_checkpoint(path, shards_too=False):
    """Return the dict in path (a ckpt.pt or the folder that holds one); exits with advice where there is none.
    shards_too: accept one whose weights are in shards, in a folder beside it."""
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")
    check(os.path.isfile(path), f"no checkpoint at '{path}'. Train one first, or name another folder")
    try:
        # mmap: the processes of a machine share one copy of the file in its memory
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=dist.is_initialized())
    except Exception as error:  # a file cut short, of another format, or with code in it (weights_only refuses that)
        check(False, f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or not one of "
              "ours. Move it away; best.pt beside it, where there is one, is whole and can take its place")
    needed = {"stage", "model", "model_config", "fingerprint"}
    known = isinstance(checkpoint, dict) and needed <= checkpoint.keys()
    check(known, f"{path} is not a checkpoint of this project")
    if checkpoint.get("shards"):
        check(shards_too, f"{path} is saved in shards. Make one file of them: python -m tools.export "
              f"{os.path.dirname(path)} --to=merged --out=FOLDER")
        checkpoint["shards"] = os.path.join(os.path.dirname(path), checkpoint["shards"])
    return checkpoint


def load_model(path, device="cpu"):
    """Return (model, tokenizer, checkpoint) of a run's folder or file, ready to generate; adapters are merged in."""
    checkpoint = load_checkpoint(path)
    check(checkpoint["stage"] != "reward", f"{path} is a reward model: it scores answers and writes none")
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    tokenizer = load_tokenizer(os.path.join(folder, "tokenizer.model"))
    check(tokenizer.fingerprint == checkpoint["fingerprint"], f"{folder}/tokenizer.model is "
          f"{tokenizer.fingerprint[:12]}, but the checkpoint was trained with {checkpoint['fingerprint'][:12]}. "
          f"Copy the tokenizer.model of its data there, {(checkpoint.get('config') or {}).get('data_dir', 'data/NAME')}")
    weights = checkpoint["model"]
    if checkpoint.get("lora"):
        weights = with_base(checkpoint, folder)
    with torch.device("meta"):  # parameters without memory or numbers
        model = Transformer(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(weights, strict=True, assign=True)  # assign: the file's tensors become the parameters
    model.trained_len = checkpoint.get("trained_len") or model.trained_len
    return model.to(device), tokenizer, checkpoint


def with_base(checkpoint, folder, prefix=""):
    """Return the weights of a checkpoint that holds adapters alone: they are added to those of another run.

    prefix: what stands before the names of the base's weights in this model ("trunk." in a reward model).
    """
    lora = checkpoint["lora"]
    base = os.path.normpath(os.path.join(folder, lora["base"]))
    base_model, _, base_checkpoint = load_model(base)
    check(weights_hash(base_checkpoint["model"]) == lora["base_hash"], f"{base} has other weights now than when "
          f"the adapters in {folder} were trained: train them again, or put the old base back")
    weights = {prefix + name: tensor for name, tensor in base_model.state_dict().items()}
    scale = lora["alpha"] / lora["rank"]
    return merge_adapters(weights, checkpoint["model"], scale, lora.get("rows", ()))


def load_reward_model(path, device="cpu", fingerprint=None):
    """Return the ScalarModel of a run of reward.py; exits when it was trained with another tokenizer."""
    checkpoint = load_checkpoint(path)
    check(checkpoint["stage"] == "reward", f"{path} is a run of {checkpoint['stage']}.py, wanted one of reward.py")
    check(fingerprint in (None, checkpoint["fingerprint"]), f"{path} was trained with another tokenizer "
          f"({checkpoint['fingerprint'][:12]}) than the model it is to score ({str(fingerprint)[:12]})")
    weights = checkpoint["model"]
    if checkpoint.get("lora"):
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        # the trunk's weights are those of the run that it started from, without the head over the vocabulary, plus the
        # adapters; the head that gives the score is in this checkpoint
        weights = with_base(checkpoint, folder, "trunk.")
        weights.update({name: checkpoint["model"][name] for name in ("head.weight", "head.bias")})
        weights.pop("trunk.lm_head.weight", None)
    model = ScalarModel(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(weights, strict=True)
    return model.to(device)


def newest_run(stages, root="out"):
    """Return the folder under root that has the newest ckpt.pt of one of these stages; exits where there is none."""
    files = []
    if os.path.isdir(root):
        for entry in os.scandir(root):
            file = os.path.join(entry.path, "ckpt.pt")
            if os.path.isfile(file):
                files.append(file)
    for file in sorted(files, key=os.path.getmtime, reverse=True):
        if load_checkpoint(file, shards_too=True)["stage"] in stages:
            return os.path.dirname(file)
    check(False, f"no {' or '.join(stages)} run under '{root}/'. Train one first (bash runs/quickstart.sh), or name a "
          "folder with --out_dir=")


# ---------------------------------------------------------------------------- log, end


FORMATS = {"lr": "{:.2e}", "tok/s": "{:,.0f}"}  # all other numbers: {:.4f}


def log(cfg, env, step, record):
    """Print one line a step on rank 0 and append the same record to out_dir/log.jsonl. record: {name: number}."""
    if not env.is_main:
        return
    words = [f"{name} {FORMATS.get(name, '{:.4f}').format(value)}" for name, value in record.items()]
    left = int(record.get("seconds", 0) * (cfg.max_steps - step))
    words.append(f"left {left // 3600}h{left // 60 % 60:02d}m{left % 60:02d}s")
    print(f"step {step}/{cfg.max_steps} | " + " | ".join(words), flush=True)
    with open(os.path.join(cfg.out_dir, "log.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps({"step": step, **record}) + "\n")


def log_lines(cfg):
    """The lines of the log, as bytes: a kill may have cut the last one anywhere."""
    path = os.path.join(cfg.out_dir, "log.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        return f.readlines()


def finish(cfg, env, step, hint=""):
    """Say how the run ended, and leave the other processes."""
    stopped = step < cfg.max_steps
    if env.is_main:
        how = "done"
        if stopped:
            who = env.signals[0] if env.signals else "another process"
            how = f"stopped by {who}; the same command goes on from here"
        print(f"{cfg.out_dir}/ckpt.pt: step {step}, {how}. {hint}", flush=True)
    if env.lock:
        env.lock.close()
    leave(env, stopped)
