"""
What every stage must do alike: start (device, processes, seed), optimizers, gradients over several processes,
checkpoints, the log line, the end. Functions only; each stage shows its own loop.
"""
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from configurator import changed, check
from model import ModelConfig, ScalarModel, Transformer, product_dtype
from tokenizer import load_tokenizer

# dense bf16 TFLOP/s of common GPUs, from their data sheets (without sparsity)
GPU_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "A40": 150, "A10": 125,
    "A6000": 155, "L40S": 362, "L40": 181, "L20": 119, "L4": 121, "V100": 125, "T4": 65, "5090": 209, "5080": 113,
    "4090": 165, "4080": 97, "4070": 58, "4060": 30, "3090": 71, "3080": 60}


@dataclass
class Env:
    """Where this process runs: rank of world processes, its device, the dtype of products, signals that ask to stop."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    scaler: torch.amp.GradScaler = None  # does nothing, unless products are in fp16
    signals: list = dataclasses.field(default_factory=list)
    lock: object = None  # the open file that keeps other processes out of out_dir

    def __post_init__(self):
        if self.scaler is None:
            fp16 = self.dtype == torch.float16
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

    @property
    def main(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


# ---------------------------------------------------------------------------- start and end


def start(cfg, announce=True):
    """Join the other processes if torchrun started us, choose device and dtype, seed; return an Env.

    Products are made in bf16 on GPUs (fp16 on those before Ampere) and in fp32 on CPUs; where cfg has dtype="auto", in
    bf16 on CPUs that are fast at it.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    device = choose_device(cfg.device)
    if device.type == "cuda":
        index = int(os.environ["LOCAL_RANK"]) if world > 1 else device.index or 0
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        # cuDNN's attention makes a plan for each new shape: a stall for each length of a prompt, a group, an answer
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        keep_memory()
    if world > 1 and not dist.is_initialized():
        from torch.distributed.nn import functional  # noqa: F401 - imported later it would hold the group past its end
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    default = "float32" if device.type == "cpu" else "auto"
    dtype = choose_dtype(getattr(cfg, "dtype", default), device)
    if world > 1:
        dtypes = [dtype]
        dist.broadcast_object_list(dtypes)  # rank 0's: CPUs as fast as each other may measure otherwise
        dtype = dtypes[0]
    torch.manual_seed(cfg.seed)
    env = Env(rank, world, device, dtype)
    if env.main and announce:
        settings = " ".join(f"{key}={value}" for key, value in changed(cfg).items())
        print(f"settings changed: {settings or '(all defaults)'}")
        print(f"device {device}, {str(dtype).split('.')[1]}, {world} process{'es' * (world > 1)}", flush=True)
    return env


def keep_memory():
    """Have glibc keep freed memory for what comes next. To fetch it from the kernel again, page by page, would take a
    seventh of a training step on a CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2 ** 30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2 ** 30)  # M_MMAP_THRESHOLD


def choose_device(name):
    """Return the torch.device of "auto", "cpu", "cuda", "cuda:1", "mps"; exits when it is not there."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    check(re.fullmatch(r"cpu|mps|cuda(:\d+)?", name), f"device={name!r}: known are auto, cpu, mps, cuda and cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        check(torch.cuda.is_available(), f"device={name}, but PyTorch sees no GPU here. Use --device=cpu, or check the "
              "driver with nvidia-smi")
        count = torch.cuda.device_count()
        check((device.index or 0) < count, f"device={name}, but there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    if device.type == "mps":
        check(torch.backends.mps.is_available(), "device=mps, but PyTorch sees no Apple GPU here. Use --device=cpu")
    return device


def choose_dtype(name, device):
    """Return the dtype of products: "auto", "float32", "bfloat16" or "float16"."""
    if name != "auto":
        check(name == "float32" or device.type == "cuda", f"dtype={name} is for GPUs; on a CPU there are float32, and "
              "auto, which takes bfloat16 where it is measured to be faster")
        return getattr(torch, name)
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16
    fast = device.type == "cpu" and bf16_is_fast()
    return torch.bfloat16 if fast else torch.float32


def bf16_is_fast():
    """Measure: with native support (AMX, AVX512-BF16) bf16 products are several times faster than fp32, without it
    hundreds of times slower, and what a CPU says of itself does not tell."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a
        began = time.perf_counter()
        for _ in range(4):
            a @ a
        seconds.append(time.perf_counter() - began)
    return seconds[1] < seconds[0]


def catch_signals(env):
    """Put the names of signals that ask this process to stop into env.signals; a second one ends it at once."""

    def handler(number, frame):
        env.signals.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # what nohup has told us to ignore stays ignored
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def lock(folder, env):
    """Make this process the only one that writes to folder; the lock goes with the process, however it ends."""
    if not env.main:
        return
    os.makedirs(folder, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        return
    env.lock = open(os.path.join(folder, ".lock"), "w")
    try:
        fcntl.flock(env.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        check(False, f"another process is writing to {folder}. Wait for it, or choose another --out_dir")


def micro_steps(grad_accum, env):
    """Return the micro-steps of this rank. Which rows a micro-step holds does not depend on who computes it."""
    check(grad_accum % env.world == 0, f"grad_accum={grad_accum} must be a multiple of the {env.world} processes: it "
          f"is the total of micro-steps, shared among them. Try --grad_accum={env.world}")
    return range(env.rank, grad_accum, env.world)


def batch_starts(n, batch_size, env, even=False):
    """Return where this rank's batches begin, of n rows that the processes measure together, batch by batch.

    even: as many for each rank, the last perhaps behind the end. A model in shards computes only if all ranks call it.
    """
    stride = env.world * batch_size
    if even:
        n = math.ceil(n / stride) * stride
    return range(env.rank * batch_size, n, stride)


def compile_blocks(model, cfg, env):
    """Compile the model block by block: one block is compiled once and serves for all, and gradients can travel to
    the other processes while earlier blocks still compute theirs. Runs eagerly where there is no compiler."""
    cfg.compile = cfg.compile and env.device.type != "mps"
    if not cfg.compile:
        return
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
    triton = env.device.type == "cpu" or torch.utils._triton.has_triton()
    if not compiler or not triton:
        cfg.compile = False
        if env.main:
            print(f"note: {'Triton' if compiler else 'a C++ compiler'} is missing, so the model runs uncompiled "
                  "(slower)")
        return
    for block in model.blocks:
        block.compile()


def finish(cfg, env, step, hint=""):
    """Say how the run ended, and leave the other processes. A run that was stopped does not exit with 0, so that
    `pretrain.py … && sft.py …` stops as well."""
    stopped = step < cfg.max_steps
    if env.main:
        how = "done"
        if stopped:
            who = env.signals[0] if env.signals else "another process"
            how = f"stopped by {who}; the same command goes on from here"
        memory = peak_memory(env) / 2 ** 30
        print(f"{cfg.out_dir}/ckpt.pt: step {step}, {how}. Peak memory {memory:.2f} GiB. {hint}", flush=True)
    if env.lock:
        env.lock.close()
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still needs it
        dist.destroy_process_group()
        # taking DistributedDataParallel apart while gloo's threads end can wait for ever: leave without it
        sys.stdout.flush()
        os._exit(3 * stopped)
    if stopped:
        sys.exit(3)


@contextlib.contextmanager
def no_grad_eval(model):
    """Context: evaluation mode and no gradients, then back to the mode it was in."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)


# ---------------------------------------------------------------------------- optimizers


# Five steps of X <- a X + (b X X' + c (X X')^2) X drive all singular values of a matrix of norm 1 towards 1.
# Coefficients: Polar Express (arXiv 2505.16932), which fits each step to the range that the one before has left.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalise(x):
    """x (matrices, rows, columns) -> about U V', where x = U S V' is its singular value decomposition."""
    if x.size(-2) > x.size(-1):
        return orthogonalise(x.mT).mT  # of a matrix that lies down, X X' is the smaller square
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (1.02 * norm + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)        # b square + c square @ square
        x = torch.baddbmm(x, polynomial, x, beta=a)                                # a x + polynomial @ x
    return x


def orthogonalise_together(matrices):
    """List of matrices of one shape -> the orthogonalised ones. Each process makes a share of them for all."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    share = math.ceil(len(matrices) / world)
    mine = matrices[rank * share:(rank + 1) * share]
    mine += [torch.zeros_like(matrices[0])] * (share - len(mine))  # equal shares can be gathered in one call
    stack = torch.stack(mine)                                                      # (share, rows, columns)
    stack = orthogonalise(stack.to(product_dtype(stack))).contiguous()
    if world > 1:
        whole = stack.new_empty(world, *stack.shape)
        dist.all_gather(list(whole), stack)
        stack = whole.flatten(0, 1)                                                # (world * share, rows, columns)
    return stack[:len(matrices)]


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix (Jordan et al. 2024): all its directions are learned equally.

    The step is scaled to the size of AdamW's, 0.2 a weight (arXiv 2502.16982), so a learning rate means the same here
    and there. A group's "parts" are the rows of the matrices that lie in one parameter, like q, k and v: each is a
    matrix of its own. Matrices of one shape are orthogonalised together, under autocast in its dtype.
    """

    def __init__(self, groups, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, parts=None))

    @torch.no_grad()
    def step(self):
        updates = []                    # [(parameter, what to learn, its group)]
        same_shape = defaultdict(list)  # shape: [matrix, a view of what to learn]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                # Nesterov: look ahead by the momentum that this gradient has just moved
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                if hasattr(update, "full_tensor"):
                    update = update.full_tensor()  # a shard of a matrix is not enough: each process gathers them all
                updates.append((p, update, group))
                for matrix in update.split(group["parts"] or [len(p)]):
                    same_shape[matrix.shape].append(matrix)
        for shape, matrices in same_shape.items():
            # the results take the matrices' place in `updates`, of which they are views
            for matrix, result in zip(matrices, orthogonalise_together(matrices)):
                matrix.copy_(result)
                matrix.mul_(0.2 * math.sqrt(max(shape)))
        # step, each process its own shard where there are shards
        for p, update, group in updates:
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(shard_like(update, p), alpha=-group["lr"])


def make_optimizers(model, cfg, lr=None):
    """Return a list of optimizers over the parameters that want gradients.

    adamw: weight decay on matrices, none on gains and biases. muon: the blocks' matrices go to Muon; embeddings, head,
    experts, gains and biases stay with AdamW, at cfg.adam_lr.
    """
    lr = lr or cfg.lr
    use_muon = getattr(cfg, "optimizer", "adamw") == "muon"
    adam_lr = cfg.adam_lr or lr if use_muon else lr
    muon = defaultdict(list)  # rows of the matrices in a parameter: parameters
    matrices = []
    vectors = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if use_muon and p.ndim == 2 and "blocks." in name and "router" not in name:
            muon[parts_of(name, p, model.config)].append(p)
        elif p.ndim >= 2:
            matrices.append(p)
        else:
            vectors.append(p)
    optimizers = []
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if groups:
        adamw = torch.optim.AdamW(
            groups,
            lr=adam_lr,
            betas=(0.9, 0.95),
            fused=True)
        optimizers.append(adamw)
    if muon:
        groups = [{"params": params, "parts": parts} for parts, params in muon.items()]
        optimizers.append(Muon(groups, lr, cfg.weight_decay, cfg.momentum))
    # set_lr moves every rate in step with its own peak
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def parts_of(name, p, config):
    """Return the rows of the matrices that lie in one parameter: q, k and v; gate and up; else one."""
    if name.endswith("qkv.weight"):
        kv = config.n_kv_heads * config.head_dim
        return (config.n_heads * config.head_dim, kv, kv)
    if name.endswith("gate_up.weight"):
        return (len(p) // 2, len(p) // 2)
    return (len(p),)


def lr_at(step, cfg):
    """Learning rate of a step: linear warmup, then cosine to min_lr, or (decay_steps > 0) flat and a linear fall."""
    check(cfg.min_lr <= cfg.lr, f"min_lr={cfg.min_lr} exceeds lr={cfg.lr}: the rate would rise to it. Give both")
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    decay_steps = getattr(cfg, "decay_steps", 0)
    if decay_steps:
        share = min(1.0, (cfg.max_steps - step) / decay_steps)
    else:
        done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * share


def set_lr(optimizers, factor):
    """Set every learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def optimizer_step(model, optimizers, cfg, env):
    """Clip the gradient to norm cfg.grad_clip (0: no clipping) and step; return the norm before clipping.

    A gradient that is not finite ends the run before it reaches the weights, and so before anything is saved. Under
    fp16 the scaler has made it too large: no optimizer steps, and the scaler tries a smaller scale.
    """
    for optimizer in optimizers:
        env.scaler.unscale_(optimizer)
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf).item()
    finite = math.isfinite(norm)
    check(finite or env.scaler.is_enabled(), f"the gradient's norm is {norm}. {cfg.out_dir}/ckpt.pt is the last good "
          f"checkpoint, if it is there; lower --lr (now {cfg.lr}) or raise --warmup_steps")
    if finite:
        with env.autocast():  # for Muon's products
            for optimizer in optimizers:
                env.scaler.step(optimizer)
    env.scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------------------- several processes


class DataParallel(DistributedDataParallel):
    """DistributedDataParallel that also shows the model's own attributes, like model.config and model.head_weight."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def parallel(model, env, shard=False):
    """Return what to train, on its device: the model, or with several processes a wrapper that replaces gradients by
    their mean over them, bucket by bucket while the backward pass runs, wherever `require_backward_grad_sync` is set.

    shard: no wrapper, but a model of which each process holds a part. Its gradients, too large to lie anywhere as a
    whole, are replaced by parts of their mean in every backward pass.
    """
    if env.world > 1 and shard:
        return shard_model(model, env)
    model.to(env.device)
    if env.world == 1:
        return model
    net = DataParallel(model, gradient_as_bucket_view=True)
    # buffers stay equal by themselves, and ranks may need different numbers of forward passes
    net.broadcast_buffers = False
    return net


def shard_model(model, env):
    """Split weights, and with them gradients and optimizer state, among the processes (FSDP2; Zhao et al. 2023). A
    block's weights are gathered when it computes, and forgotten when it has."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # seconds to import
    mesh = dist.init_device_mesh(env.device.type, (env.world,))
    # in the dtype of its products a block travels in half the time; gradients are still averaged in fp32
    policy = MixedPrecisionPolicy(env.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # the rest (embedding, norm, head) stays whole from the forward pass to the backward: the loss uses head_weight
    return fully_shard(model, mesh=mesh)


def shard_like(whole, p):
    """Return this process's shard of a whole tensor where p is a shard, else the tensor as it is."""
    if not hasattr(p, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def gather_shards(tree, env):
    """Put whole tensors, in the memory of rank 0, in the place of all shards in nested dicts and lists."""

    def gather(leaf):
        if not hasattr(leaf, "full_tensor"):
            return leaf
        whole = leaf.full_tensor()  # all processes come here, to send their shards
        return whole.cpu() if env.main else None

    return tree_map(gather, tree)


def all_sum(values, env):
    """Return the sums over the processes of a list of numbers, as floats (in double precision where there is one)."""
    dtype = torch.float32 if env.device.type == "mps" else torch.float64
    total = torch.stack([torch.as_tensor(v, dtype=dtype, device=env.device) for v in values])
    if env.world > 1:
        dist.all_reduce(total)
    return total.tolist()


# ---------------------------------------------------------------------------- checkpoints


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


def save_tokenizer(path, tokenizer):
    """Write the vocabulary to path, unless it stands there already."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
        if f.read() == tokenizer.data:
            return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    tokenizer.save(path + ".tmp")
    os.replace(path + ".tmp", path)


def adapters_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


def save(name, cfg, env, step, model, optimizers, tokenizer, **extra):
    """Write out_dir/name with all that a run needs to go on, and the tokenizer beside it. extra: best_val, critic."""
    lora = getattr(model, "lora", None)
    weights = adapters_of(model) if lora else model.state_dict()
    states = [optimizer.state_dict() for optimizer in optimizers]
    weights, states = gather_shards([weights, states], env)
    if not env.main:
        return
    critic = extra.get("critic", {})
    finite = all(weight.isfinite().all() for weight in [*weights.values(), *critic.values()])
    check(finite, f"after step {step} not all weights are finite, so they are not saved. Lower --lr (now {cfg.lr})")
    save_tokenizer(os.path.join(cfg.out_dir, "tokenizer.model"), tokenizer)
    save_checkpoint(os.path.join(cfg.out_dir, name), {
        "stage": stage_of(cfg),
        "step": step,
        "model": weights,
        "model_config": dataclasses.asdict(model.config),
        "lora": lora,
        "config": dataclasses.asdict(cfg),
        "fingerprint": tokenizer.fingerprint,
        "data": data_size(cfg),
        "optimizers": states,
        "scaler": env.scaler.state_dict(),
        **extra})


def data_size(cfg):
    """What the training split of cfg.data_dir holds, as its meta.json says; None where there is none."""
    with contextlib.suppress(OSError), open(os.path.join(cfg.data_dir, "meta.json"), encoding="utf-8") as f:
        return json.load(f)["train"]


def stage_of(cfg):
    """The stage whose Config this is: "pretrain", "sft", …"""
    module = type(cfg).__module__
    if module == "__main__":
        import __main__
        module = os.path.splitext(os.path.basename(__main__.__file__))[0]
    return module


def load_checkpoint(path, device="cpu"):
    """Return the dict in path (a ckpt.pt or the folder that holds one); exits with what to do where there is none."""
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")
    check(os.path.isfile(path), f"no checkpoint at '{path}'. Train one first, or name another folder")
    try:
        # mmap: the processes of a machine share one copy of the file in its memory
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=dist.is_initialized())
    except Exception as error:  # cut short, another format, or code where weights should be
        check(False, f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or not one of "
              "ours. Move it away; best.pt beside it, where there is one, is whole and can take its place")
    wanted = {"stage", "model", "model_config", "fingerprint"}
    known = isinstance(checkpoint, dict) and wanted <= checkpoint.keys()
    check(known, f"{path} is not a checkpoint of this project")
    return checkpoint


def newest_run(stages, root="out"):
    """Return the folder under root whose ckpt.pt is the newest of these stages'; exits where there is none."""
    files = []
    if os.path.isdir(root):
        for entry in os.scandir(root):
            file = os.path.join(entry.path, "ckpt.pt")
            if os.path.isfile(file):
                files.append(file)
    for file in sorted(files, key=os.path.getmtime, reverse=True):
        if load_checkpoint(file)["stage"] in stages:
            return os.path.dirname(file)
    check(False, f"no {' or '.join(stages)} run under '{root}/'. Train one first (bash runs/quickstart.sh), or name a "
          "folder with --out_dir=")


def load_model(path, device="cpu"):
    """Return (model, tokenizer, checkpoint) of a run's folder or file, ready to generate; adapters are merged in."""
    checkpoint = load_checkpoint(path)
    check(checkpoint["stage"] != "reward", f"{path} is a reward model: it scores answers and writes none")
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    tokenizer = load_tokenizer(os.path.join(folder, "tokenizer.model"))
    check(tokenizer.fingerprint == checkpoint["fingerprint"], f"{folder}/tokenizer.model is "
          f"{tokenizer.fingerprint[:12]}, but the checkpoint was trained with {checkpoint['fingerprint'][:12]}")
    weights = checkpoint["model"]
    lora = checkpoint.get("lora")
    if lora:
        # the file holds adapters alone: what they are added to lies in another run
        base = os.path.normpath(os.path.join(folder, lora["base"]))
        weights = load_model(base)[0].state_dict()
        check(weights_hash(weights) == lora["base_hash"], f"{base} has other weights now than when the adapters in "
              f"{folder} were trained: train them again, or put the old base back")
        weights = merge_adapters(weights, checkpoint["model"], lora["alpha"] / lora["rank"])
    model = Transformer(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(weights, strict=True)
    return model.to(device).eval(), tokenizer, checkpoint


def load_reward_model(path, device="cpu", fingerprint=None):
    """Return the ScalarModel of a run of reward.py; exits when it was trained with another tokenizer."""
    checkpoint = load_checkpoint(path)
    check(checkpoint["stage"] == "reward", f"{path} is a run of {checkpoint['stage']}.py, wanted one of reward.py")
    check(fingerprint in (None, checkpoint["fingerprint"]), f"{path} was trained with another tokenizer "
          f"({checkpoint['fingerprint'][:12]}) than the model it is to score ({str(fingerprint)[:12]})")
    model = ScalarModel(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"], strict=True)
    return model.to(device).eval()


def merge_adapters(weights, adapters, scale):
    """Return weights with each adapter's product added: W + scale * B A (LoRA, sec. 4.1)."""
    merged = dict(weights)
    for name in adapters:
        if name.endswith("lora_a"):
            layer = name.removesuffix("lora_a")
            product = adapters[layer + "lora_b"] @ adapters[layer + "lora_a"]
            merged[layer + "weight"] = weights[layer + "weight"] + scale * product
    return merged


def weights_hash(weights):
    """sha256 of a state dict: adapters are worth nothing over another base, even one of the same shape."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        numbers = weights[name].cpu().contiguous().reshape(-1)
        digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def resume(cfg, env, model, optimizers, tokenizer, critic=None):
    """Go on from cfg.out_dir/ckpt.pt where it is there and cfg.resume is set.

    Return (step, lowest validation loss, checkpoint or None). Only a run of the same stage, model and batches goes on;
    the folder that a stage starts from is never written to.
    """
    base = getattr(cfg, "init_from", "")
    base = base if os.path.isdir(base) else os.path.dirname(base)
    check(not base or os.path.realpath(base) != os.path.realpath(cfg.out_dir), f"out_dir={cfg.out_dir} is the run that "
          "this one starts from, and would be overwritten. Choose another --out_dir")
    lock(cfg.out_dir, env)
    catch_signals(env)
    path = os.path.join(cfg.out_dir, "ckpt.pt")
    checkpoint = None
    if os.path.exists(path):
        checkpoint = load_checkpoint(path)
        stage = stage_of(cfg)
        check(checkpoint["stage"] == stage, f"{cfg.out_dir} holds a run of {checkpoint['stage']}.py, and {stage}.py "
              "would overwrite it. Choose another --out_dir")
    if not checkpoint or not cfg.resume:
        # a run from its beginning: an older log would go on where this one has not been
        if env.main:
            trim_log(cfg.out_dir, -1)
        return 0, math.inf, None
    # the same weights, optimizers and step: the rows follow from the step, so nothing else need be known
    check_same_run(path, checkpoint, cfg, model, tokenizer)
    ours = model.state_dict()
    weights = {name: shard_like(value, ours.get(name)) for name, value in checkpoint["model"].items()}
    model.load_state_dict(weights, strict=not checkpoint.get("lora"))
    if critic:
        critic.load_state_dict(checkpoint["critic"], strict=True)
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        params = sum([group["params"] for group in optimizer.param_groups], [])
        for number, values in state["state"].items():
            for name, value in values.items():
                if value.ndim:  # of the shape of its parameter; the count of steps is a single number
                    values[name] = shard_like(value, params[number])
        # averages are the checkpoint's; rates, decay and momentum are what the settings say now
        state["param_groups"] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(state)
    if checkpoint["scaler"]:  # empty where products were in bf16 or fp32
        env.scaler.load_state_dict(checkpoint["scaler"])
    step = checkpoint["step"]
    if env.main:
        then = checkpoint["config"]
        now = {key: value for key, value in dataclasses.asdict(cfg).items() if then.get(key) != value}
        size = data_size(cfg)
        if checkpoint.get("data", size) != size:
            now["the data itself"] = size  # it was prepared anew: rows come in another order from here on
        print(f"resuming {path} at step {step} of {cfg.max_steps}; settings changed since: {now or 'none'}")
        if step >= cfg.max_steps:
            print("it is finished: raise --max_steps, choose another --out_dir, or start again with --resume=False")
        trim_log(cfg.out_dir, step)
    return step, checkpoint["best_val"], checkpoint


def check_same_run(path, checkpoint, cfg, model, tokenizer):
    """Exit where the checkpoint is not an earlier state of this very run."""
    then = checkpoint["config"]
    check(then and checkpoint["optimizers"], f"{path} holds weights alone (imported or merged): no run that could go "
          "on. Choose another --out_dir")
    theirs = {
        **checkpoint["model_config"],
        "lora": checkpoint.get("lora"),
        "tokenizer": checkpoint["fingerprint"][:12]}
    ours = {
        **dataclasses.asdict(model.config),
        "lora": getattr(model, "lora", None),
        "tokenizer": tokenizer.fingerprint[:12]}
    # which rows a step holds follows from its number: with other batches, rows would be left out or learned twice
    for key in ("batch_size", "grad_accum", "seq_len", "optimizer", "seed", "data_dir", "init_from", "advantage",
                "loss"):
        if hasattr(cfg, key):
            theirs[key] = then.get(key)
            ours[key] = getattr(cfg, key)
    for key in ("data_dir", "init_from"):
        if os.path.realpath(str(theirs.get(key))) == os.path.realpath(str(ours.get(key))):  # only spelled otherwise
            ours[key] = theirs.get(key)
    if hasattr(cfg, "centre"):  # at 0 the head's bias does not learn
        theirs["centre > 0"] = then["centre"] > 0
        ours["centre > 0"] = cfg.centre > 0
    rows_then = then["batch_size"] * then["grad_accum"]
    if rows_then == cfg.batch_size * cfg.grad_accum:  # only shared out otherwise
        for key in ("batch_size", "grad_accum"):
            ours[key] = theirs[key]
    different = []
    for key, value in ours.items():
        if theirs.get(key) != value:
            different.append(f"{key}={theirs.get(key)} there, {value} here")
    check(not different, f"{path} is of another run: {'; '.join(different)}. Use its settings, choose another "
          "--out_dir, or start again with --resume=False")


# ---------------------------------------------------------------------------- log


FORMATS = {"lr": "{:.2e}", "mfu": "{:.0%}", "tok/s": "{:,.0f}"}  # all other numbers: {:.4f}


def log(cfg, env, step, record):
    """Print one line a step on rank 0 and append the same record to out_dir/log.jsonl. record: {name: number}."""
    if not env.main:
        return
    words = []
    for name, value in record.items():
        pattern = FORMATS.get(name, "{:.4f}")
        words.append(f"{name} {pattern.format(value)}")
    left = int(record.get("seconds", 0) * (cfg.max_steps - step))
    words.append(f"left {left // 3600}h{left // 60 % 60:02d}m{left % 60:02d}s")
    print(f"step {step}/{cfg.max_steps} | " + " | ".join(words), flush=True)
    path = os.path.join(cfg.out_dir, "log.jsonl")
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps({"step": step, **record}) + "\n")


def trim_log(out_dir, step):
    """Drop what log.jsonl says of steps after the checkpoint that a run resumes from: they will be done again."""
    path = os.path.join(out_dir, "log.jsonl")
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line torn by a kill goes, too
                if json.loads(line)["step"] <= step:
                    kept.append(line.rstrip("\n") + "\n")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)


def peak_flops(env):
    """Return the bf16 FLOP/s of the GPU's data sheet, which MFU is a share of; 0 where it is unknown."""
    if env.device.type != "cuda":
        return 0
    words = re.split(r"[^A-Z0-9]+", torch.cuda.get_device_name(env.device).upper())
    return max(1e12 * GPU_TFLOPS.get(word, 0) for word in words)


def peak_memory(env):
    """Return the peak memory of this process in bytes: the GPU's, or resident memory on a CPU (0 where unknown)."""
    if env.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024
