"""
What every stage must do alike: start (device, processes, seed), data folders, the order of rows, learning rate,
optimizers, gradients over several processes, checkpoints, the log line. Functions only; each stage shows its own loop.
"""
import contextlib
import dataclasses
import filecmp
import json
import math
import os
import shutil
import signal
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from configurator import changed
from lora import add_lora, load_lora, merge_lora, weights_hash
from model import ModelConfig, Transformer
from tokenizer import load_tokenizer

# dense bf16 TFLOP/s of common GPUs, from their data sheets (without sparsity)
GPU_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "L40S": 362, "L20": 119,
              "A10": 125, "V100": 125, "T4": 65, "5090": 209, "4090": 165, "3090": 71, "3080": 60, "4060": 60}


@dataclass
class Env:
    """Where this process runs: rank of world processes, its device, and the dtype products are made in."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    @property
    def main(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


# ---------------------------------------------------------------------------- start


def start(cfg, announce=True):
    """Join the other processes if torchrun started us, choose device and dtype, seed; return an Env.

    cfg: a Config with `device` ("auto", "cpu", "cuda", "mps") and `seed`. Products are made in bf16 on GPUs (fp16 on
    older ones) and in fp32 on CPUs; where cfg has dtype="auto", in bf16 on CPUs that are fast at it.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # the first optimizer imports this; after init its default arguments would hold the group past its destruction,
        # and gloo's threads, still alive when Python ends, abort now and then
        from torch.distributed.nn import functional  # noqa: F401
        dist.init_process_group("nccl" if "cuda" in device else "gloo")
    dtype = torch.float32
    if device == "cpu" and getattr(cfg, "dtype", "float32") == "auto" and bf16_is_fast():
        dtype = torch.bfloat16
    if "cuda" in device:
        torch.set_float32_matmul_precision("high")
        dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    torch.manual_seed(cfg.seed)
    env = Env(rank, world, torch.device(device), dtype)
    if env.main and announce:
        settings = " ".join(f"{k}={v}" for k, v in changed(cfg).items()) or "(all defaults)"
        print(f"settings changed: {settings}")
        print(f"device {device}, {str(dtype).split('.')[1]}, {world} process{'es' * (world > 1)}", flush=True)
    return env


def bf16_is_fast():
    """Measure: with native support (AMX, AVX512-BF16) bf16 products are several times faster than fp32, without it
    hundreds of times slower, and what a CPU says of itself does not tell."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a
        t = time.perf_counter()
        for _ in range(4):
            a @ a
        seconds.append(time.perf_counter() - t)
    return seconds[1] < seconds[0]


def micro_steps(grad_accum, env):
    """Return the micro-steps of this rank. Which rows a micro-step holds does not depend on who computes it."""
    if grad_accum % env.world:
        raise SystemExit(f"error: grad_accum={grad_accum} must be a multiple of the {env.world} processes: it is the "
                         f"total of micro-steps, shared among them. Try --grad_accum={env.world}")
    return range(env.rank, grad_accum, env.world)


def compile_model(model, cfg, env):
    """Compile in place, so that names in the state dict stay plain. Falls back to eager where that cannot work."""
    if not cfg.compile or env.device.type == "mps":
        return
    if env.device.type == "cpu" and not shutil.which("g++") and not shutil.which("clang++"):
        print("note: no C++ compiler found, so the model runs uncompiled (slower; apt-get install g++)")
        return
    model.compile()


def catch_signals():
    """Return a list that gets the signal's name when SIGTERM or SIGINT arrives; a second one ends the program."""
    caught = []

    def handler(number, frame):
        caught.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    return caught


# ---------------------------------------------------------------------------- data


@dataclass
class Split:
    """One split of a data folder: memmaps, and its entry in meta.json. What a kind of data lacks is None."""
    tokens: np.ndarray
    mask: np.ndarray
    idx: np.ndarray
    group: np.ndarray
    meta: dict

    def __len__(self):
        return len(self.idx) - 1

    def document(self, i):
        """Return (ids, mask) of document i, int64 and uint8; mask is None for prompts."""
        a, b = self.idx[i], self.idx[i + 1]
        return self.tokens[a:b].astype(np.int64), None if self.mask is None else self.mask[a:b]


def open_data(folder, kind=None, fingerprint=None):
    """Open a folder made by prepare.py; return (train, val, meta), memory-mapped.

    Leaves with a message when the folder is missing, of another kind, cut short, or made with another tokenizer.
    """
    name = os.path.basename(os.path.normpath(folder))
    if not os.path.isfile(os.path.join(folder, "meta.json")):
        option = "" if kind in (None, "text") else f" --kind={kind}"
        hint = f"  of your own: python prepare.py {name} --input=FILE_OR_FOLDER{option}"
        if kind in (None, "text"):
            hint += "\n  the poems:   python prepare.py poems   and add --data_dir=data/poems here"
        else:
            hint += f"\n  the poems:   python prepare.py poems-{kind}"
        raise SystemExit(f"error: no data in '{folder}'. Make some with\n{hint}")
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
        meta = json.load(f)
    if kind and meta["kind"] != kind:
        raise SystemExit(f"error: '{folder}' holds data of kind {meta['kind']}, this stage reads {kind}")
    if fingerprint and fingerprint != meta["fingerprint"]:
        raise SystemExit(f"error: '{folder}' was made with tokenizer {meta['fingerprint'][:12]}, the checkpoint with "
                         f"{fingerprint[:12]}. Prepare the data with --tokenizer=<the run's folder>/tokenizer.model")

    def memmap(split, ending, dtype, length):
        path = os.path.join(folder, f"{split}.{ending}")
        if not os.path.exists(path):
            return None
        size, wanted = os.path.getsize(path), length * np.dtype(dtype).itemsize
        if size != wanted:
            raise SystemExit(f"error: {path} has {size:,} bytes, meta.json says {wanted:,}. Prepare the folder again")
        return np.memmap(path, dtype=dtype, mode="r") if size else np.zeros(0, dtype)

    splits = []
    for split in ("train", "val"):
        n, docs = meta[split]["tokens"], meta[split]["documents"]
        tokens = memmap(split, "bin", np.dtype(meta["dtype"]).newbyteorder("<"), n)
        if tokens is None:
            raise SystemExit(f"error: {folder}/{split}.bin is missing. Prepare the folder again")
        splits.append(Split(tokens, memmap(split, "mask", np.uint8, n), memmap(split, "idx", np.int64, docs + 1),
                            memmap(split, "group", np.int32, docs), meta[split]))
    return *splits, meta


def prompt_bounds(split):
    """Return offsets (prompts + 1): prompt p owns documents bounds[p] … bounds[p + 1] - 1, the best one first."""
    return np.append(np.flatnonzero(np.diff(split.group, prepend=-1)), len(split))


def open_pairs(folder, fingerprint, max_seq_len):
    """Open a folder of ranked answers; return (train, val, the prompt_bounds of both, meta)."""
    train, val, meta = open_data(folder, "pairs", fingerprint)
    bounds = [prompt_bounds(train), prompt_bounds(val)]
    fewest = min(np.diff(b).min(initial=len(train)) for b in bounds)
    longest = max(np.diff(s.idx).max(initial=0) for s in (train, val))
    if fewest < 2 or longest > max_seq_len:
        raise SystemExit(f"error: {folder} has a prompt with {fewest} answers (wanted: 2 or more) or a document of "
                         f"{longest} tokens (the model sees {max_seq_len}). Prepare it again with "
                         f"--max_length={max_seq_len}")
    return train, val, *bounds, meta


def shuffled(n, first, count, seed):
    """Return entries first … first+count-1 of an endless sequence that runs through 0 … n-1 in a new order each epoch.

    Stateless: epoch e visits (a·i + b) mod n with a coprime to n, and a, b drawn from (seed, e). So a run can go on
    from any step, and every row is seen once before any is seen twice.
    """
    out = np.empty(count, dtype=np.int64)
    for j in range(count):
        epoch, i = divmod(first + j, n)
        a, b = np.random.default_rng([seed, epoch]).integers(0, n, 2)
        a = max(int(a), 1)
        while math.gcd(a, n) > 1:
            a = a % n + 1
        out[j] = (a * i + int(b)) % n
    return out


def collate(documents, pad_id, device="cpu"):
    """Right-pad documents [(ids, mask), …] and shift them: what follows a token is its target.

    Return ids, targets, mask, each (B, T): mask[b, t] is 1 where targets[b, t] is a token to learn. Causal attention
    never looks at the padding behind a row, so it needs no attention mask.
    """
    T = max(len(ids) for ids, _ in documents)
    ids = np.full((len(documents), T), pad_id, dtype=np.int64)
    mask = np.zeros((len(documents), T), dtype=np.float32)
    for row, (document, learned) in enumerate(documents):
        ids[row, :len(document)], mask[row, :len(document)] = document, learned
    ids, mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
    return ids[:, :-1], ids[:, 1:], mask[:, 1:]


# ---------------------------------------------------------------------------- answers


def like_lengths(ends, most=4096):
    """Split rows (R), of which only the first `ends` (R) tokens count, into groups of like length, so that little
    padding is computed: at most `most` tokens a group, padding included, and at least one row."""
    order = ends.argsort(stable=True)
    sizes = [0]
    for length in ends[order].tolist():
        if sizes[-1] and (sizes[-1] + 1) * length > most:
            sizes.append(0)
        sizes[-1] += 1
    return order.split(sizes)


def answer_logps(model, batch, env, temperature=1.0):
    """Return the log-prob of each row's answer with its <|im_end|>, prompt left out, and the answer's length, (R) each.

    batch: ids, targets, mask, each (R, T), of collate().
    """
    ids, targets, mask = batch
    ends = (mask * torch.arange(1, ids.size(1) + 1, device=mask.device)).amax(dim=1).long()
    sums = torch.zeros(len(ids), device=ids.device)
    for rows in like_lengths(ends):
        T = ends[rows].max()
        with env.autocast():
            logps = model.logps(ids[rows, :T], targets[rows, :T], mask[rows, :T], temperature)  # (rows, T)
        sums = sums.index_put((rows,), logps.sum(dim=1))
    return sums, mask.sum(dim=1)


def score_answers(model, batch, env):
    """Return a reward model's score of each row (R), read at the answer's last token, the <|im_end|>.

    batch: of collate(). What stands behind a row's end cannot change its score: attention is causal.
    """
    ids, targets, mask = batch
    ids = torch.cat([ids[:, :1], targets], dim=1)  # undo the shift: the last token is the one that is scored
    ends = (mask * torch.arange(1, ids.size(1), device=mask.device)).amax(dim=1).long()
    scores = torch.zeros(len(ids), device=ids.device)
    for rows in like_lengths(ends):
        with env.autocast():
            part = model(ids[rows, :ends[rows].max() + 1])                         # (rows, T)
        scores = scores.index_put((rows,), part.gather(1, ends[rows, None]).squeeze(1))
    return scores


# ---------------------------------------------------------------------------- optimizer


def lr_at(step, cfg):
    """Learning rate of a step: linear warmup, then cosine down to min_lr, or flat and a linear fall at the end (wsd).

    cfg: lr, min_lr, warmup_steps, max_steps, schedule ("cosine" | "wsd"), decay_steps (wsd).
    """
    if cfg.schedule not in ("cosine", "wsd"):
        raise SystemExit(f"error: schedule={cfg.schedule!r}, known are cosine and wsd")
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "wsd":
        left = (cfg.max_steps - step) / max(1, cfg.decay_steps)
        return cfg.min_lr + (cfg.lr - cfg.min_lr) * min(1.0, left)
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizers(model, cfg):
    """Return a list of optimizers over the parameters that want gradients.

    adamw: weight decay on matrices, none on gains and biases. muon: the blocks' matrices go to Muon, with its step
    scaled to AdamW's size (arXiv 2502.16982) so that one learning rate serves both; the rest stays with AdamW.
    """
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in params if cfg.optimizer == "muon" and p.ndim == 2 and "blocks." in name]
    rest = [p for _, p in params if not any(p is q for q in muon)]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    if cfg.optimizer not in ("adamw", "muon"):
        raise SystemExit(f"error: optimizer={cfg.optimizer!r}, known are adamw and muon")
    groups = [g for g in groups if g["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=1e-8,
                                    fused=params[0][1].device.type in ("cuda", "cpu"))]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=cfg.lr, weight_decay=cfg.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def set_lr(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def average_gradients(model, env):
    """Replace gradients by their mean over the processes, in one all-reduce a step, after all micro-steps.

    A parameter that a rank did not use counts as zero, so ranks never wait for each other in vain.
    """
    if env.world == 1:
        return
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1) for p in params])
    dist.all_reduce(flat)
    flat /= env.world
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(part.view_as(p))


def all_sum(values, env):
    """Return the sums over the processes of a list of numbers, as floats (in double precision where there is one)."""
    dtype = torch.float32 if env.device.type == "mps" else torch.float64
    total = torch.stack([torch.as_tensor(v, dtype=dtype, device=env.device) for v in values])
    if env.world > 1:
        dist.all_reduce(total)
    return total.tolist()


def optimizer_step(model, optimizers, scaler, grad_clip):
    """Unscale, clip to norm grad_clip (0: no clipping), step; return the norm before clipping."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


# ---------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, checkpoint, tokenizer_file=None):
    """Write a dict to path, whole or not at all: to a temporary name, flushed to disk, then renamed.

    tokenizer_file: copied beside it as tokenizer.model, so the folder is all that sample.py needs.
    """
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    beside = os.path.join(folder, "tokenizer.model")
    if tokenizer_file and not (os.path.exists(beside) and filecmp.cmp(tokenizer_file, beside, shallow=False)):
        shutil.copyfile(tokenizer_file, os.path.join(folder, "tokenizer.tmp"))
        os.replace(os.path.join(folder, "tokenizer.tmp"), beside)
    with open(path + ".tmp", "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def load_checkpoint(path, device="cpu"):
    """Return the dict in path (a ckpt.pt or the folder that holds one), or leave with what to do when it is missing."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise SystemExit(f"error: no checkpoint at '{path}'. Train one first, or name another folder")
    return torch.load(path, map_location=device, weights_only=True)


def newest_run(root="out", stages=None):
    """Return the folder under root whose ckpt.pt is the newest, or leave with a message. stages: look only at these."""
    runs = [os.path.join(root, name) for name in (os.listdir(root) if os.path.isdir(root) else [])]
    runs = [r for r in runs if os.path.isfile(os.path.join(r, "ckpt.pt"))]
    for run in sorted(runs, key=lambda r: os.path.getmtime(os.path.join(r, "ckpt.pt")), reverse=True):
        if stages is None or load_checkpoint(run)["stage"] in stages:
            return run
    raise SystemExit(f"error: no {'/'.join(stages or ['trained'])} model under '{root}/'. "
                     "Train one first (bash runs/quickstart.sh), or name a folder with --out_dir=")


def model_from(checkpoint, Model=Transformer):
    """Build the model a checkpoint describes and fill it."""
    model = Model(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"], strict=True)
    return model


def load_model(folder, device="cpu"):
    """Return (model, tokenizer, checkpoint) of a run's folder, ready to generate; LoRA adapters are merged in."""
    checkpoint = load_checkpoint(folder)
    folder = folder if os.path.isdir(folder) else os.path.dirname(folder)
    tokenizer = load_tokenizer(os.path.join(folder, "tokenizer.model"))
    if tokenizer.fingerprint != checkpoint["fingerprint"]:
        raise SystemExit(f"error: {folder}/tokenizer.model is {tokenizer.fingerprint[:12]}, but the checkpoint was "
                         f"trained with {checkpoint['fingerprint'][:12]}")
    if "lora" not in checkpoint:
        return model_from(checkpoint).to(device).eval(), tokenizer, checkpoint
    path = os.path.normpath(os.path.join(folder, checkpoint["lora"]["base"]))
    model, _, base = load_model(path)
    if weights_hash(base["model"]) != checkpoint["lora"]["base_hash"]:
        raise SystemExit(f"error: {path} has other weights now than when the adapters in {folder} were trained: "
                         "train them again, or put the old base back")
    model = merge_lora(load_lora(add_lora(model, **checkpoint["lora"]), checkpoint["model"]))
    return model.to(device).eval(), tokenizer, checkpoint


def resume(cfg, env, models, optimizers, scaler):
    """If cfg.out_dir holds a checkpoint and cfg.resume is set, load it; return (step, best_val, checkpoint or None).

    models: {name in the checkpoint: module}, e.g. {"model": model} or {"model": actor, "critic": critic}.
    """
    path = os.path.join(cfg.out_dir, "ckpt.pt")
    if not (cfg.resume and os.path.exists(path)):
        if env.main:
            trim_log(cfg.out_dir, -1)
        return 0, math.inf, None
    checkpoint = load_checkpoint(path, env.device)
    theirs = {**checkpoint["model_config"], "lora": checkpoint.get("lora")}
    ours = {**dataclasses.asdict(models["model"].config), "lora": getattr(models["model"], "lora", None)}
    different = [f"{k} {theirs[k]} there, {v} here" for k, v in ours.items() if theirs[k] != v]
    if different:
        raise SystemExit(f"error: {path} holds another model ({'; '.join(different)}). "
                         "Choose another --out_dir, or start again with --resume=False")
    for key, model in models.items():
        load_lora(model, checkpoint[key]) if ours["lora"] else model.load_state_dict(checkpoint[key], strict=True)
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    scaler.load_state_dict(checkpoint["scaler"])
    if env.main:
        now = {k: v for k, v in dataclasses.asdict(cfg).items() if checkpoint["config"].get(k) != v}
        print(f"resuming {path} at step {checkpoint['step']} of {cfg.max_steps}"
              + (f", with other settings than before: {now}" if now else ""))
        if checkpoint["step"] >= cfg.max_steps:
            print("it is finished: raise --max_steps, choose another --out_dir, or start again with --resume=False")
        trim_log(cfg.out_dir, checkpoint["step"])
    return checkpoint["step"], checkpoint["best_val"], checkpoint


# ---------------------------------------------------------------------------- log


def log(cfg, env, step, record):
    """Print one line a step on rank 0 and append the same record to out_dir/log.jsonl. record: {name: number}."""
    if not env.main:
        return
    words = []
    for name, value in record.items():
        if name == "lr":
            value = f"{value:.2e}"
        elif name == "mfu" or name.endswith("share"):
            value = f"{100 * value:.0f}%"
        elif name == "left":
            value = f"{int(value) // 3600}h{int(value) // 60 % 60:02d}m{int(value) % 60:02d}s"
        elif isinstance(value, float):
            value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"
        words.append(f"{name} {value}")
    print(f"step {step}/{cfg.max_steps} | " + " | ".join(words), flush=True)
    os.makedirs(cfg.out_dir, exist_ok=True)
    with open(os.path.join(cfg.out_dir, "log.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps({"step": step, **record}, ensure_ascii=False) + "\n")


def trim_log(out_dir, step):
    """Drop what log.jsonl says of steps after the checkpoint that a run resumes from: they will be done again."""
    path = os.path.join(out_dir, "log.jsonl")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(lines)


def peak_flops(env):
    """Return the FLOP/s that MFU is a share of: a GPU's data sheet, or a matrix product measured here (0: unknown)."""
    if env.device.type == "cuda":
        name = torch.cuda.get_device_name()
        return next((1e12 * tflops for key, tflops in GPU_TFLOPS.items() if key in name), 0)
    a = torch.randn(1536, 1536, device=env.device, dtype=env.dtype)
    best = math.inf
    for _ in range(20):
        t = time.perf_counter()
        (a @ a.T)[0, 0].item()
        best = min(best, time.perf_counter() - t)
    return 2 * 1536 ** 3 / best


@contextlib.contextmanager
def no_grad_eval(model):
    """Context: evaluation mode and no gradients, then back to training mode."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def peak_memory(env):
    """Return the peak memory of this process in bytes: the GPU's, or resident memory on CPU."""
    if env.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
