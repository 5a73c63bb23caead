"""
Where a process runs: its device, the dtype of its matmuls, the other processes.

    env = start(cfg)                      join the other processes, choose device and dtype, seed
    total, = all_sum([loss], env)         the sum over all processes, as a float

torchrun starts one process per GPU, and each runs the same script. Without torchrun there is one process, rank 0.
"""
import ctypes
import dataclasses
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configurator import changed, check


@dataclass
class Env:
    """This process: rank of world processes, its device, the dtype of its matmuls, signals that asked it to stop."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    signals: list = dataclasses.field(default_factory=list)
    lock: object = None  # the open file that keeps other processes out of out_dir

    def __post_init__(self):
        # keeps small fp16 gradients from vanishing; does nothing in bf16 and fp32
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        """Context in which matmuls are made in env.dtype, while weights and sums stay in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def start(cfg, dtype="", announce=True):
    """Join the other processes if torchrun started us, choose device and dtype, seed; return an Env.

    dtype: of matmuls, see choose_dtype().
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    device = choose_device(cfg.device)
    if device.type == "cuda":
        index = int(os.environ["LOCAL_RANK"]) if world > 1 else device.index or 0
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        # cuDNN's attention needs time to plan for each new shape: use it only where all rows have seq_len tokens
        torch.backends.cuda.enable_cudnn_sdp(hasattr(cfg, "seq_len"))
    if device.type == "cpu":
        keep_memory()
    if world > 1 and not dist.is_initialized():
        from torch.distributed.nn import functional  # noqa: F401 - imported later it would hold the group past its end
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    dtypes = [choose_dtype(dtype, device)]
    if world > 1:
        dist.broadcast_object_list(dtypes)  # all take rank 0's, as each may have measured otherwise
    torch.manual_seed(cfg.seed)
    env = Env(rank, world, device, dtypes[0])
    if env.is_main and announce:
        settings = " ".join(f"{key}={value}" for key, value in changed(cfg).items())
        print(f"settings changed: {settings or '(all defaults)'}")
        print(f"device {device}, {str(env.dtype).split('.')[1]}, {world} process{'es' * (world > 1)}", flush=True)
    cfg.dtype = str(env.dtype).split(".")[1]  # auto may choose otherwise when the run is resumed: find() says so
    return env


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
    count = {"cpu": 1, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.device_count()}[device.type]
    check((device.index or 0) < count, f"device={name}, but PyTorch sees {int(count)} such devices here. Use "
          "--device=cpu, or check the driver with nvidia-smi")
    return device


def choose_dtype(name, device):
    """Return the dtype of matmuls: that of the name, or "auto": bf16 where it is fast, fp16 on GPUs before Ampere
    (which needs a GradScaler), else fp32; "": bf16 on GPUs that have it, else fp32."""
    if name not in ("auto", ""):
        check(name == "float32" or device.type == "cuda", f"dtype={name} is for GPUs; on a CPU there are float32, and "
              "auto, which takes bfloat16 where it is measured to be faster")
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    if name == "auto" and device.type == "cuda":
        return torch.float16
    fast = name == "auto" and device.type == "cpu" and bf16_is_fast()
    return torch.bfloat16 if fast else torch.float32


def bf16_is_fast():
    """Measure: with native support (AMX, AVX512-BF16) bf16 matmuls are several times faster than fp32, without it
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


def keep_memory():
    """Make glibc keep freed memory and use it again. To give it back to the kernel and to get it again, page by page,
    takes a seventh of a training step on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD first: where it is refused, setting M_TRIM_THRESHOLD would only freeze it at a low value
        if libc.mallopt(-3, 2 ** 30):
            libc.mallopt(-1, 2 ** 30)


def can_compile(env):
    """Whether torch.compile has what it needs here; says what is missing."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
    triton = env.device.type == "cpu" or torch.utils._triton.has_triton()
    if (not compiler or not triton) and env.is_main:
        print(f"note: {'Triton' if compiler else 'a C++ compiler'} is missing, so the model runs uncompiled (slower)")
    # blocks are compiled one by one, so DDP can send gradients of one while another computes: it need not cut them
    torch._dynamo.config.optimize_ddp = False
    return bool(compiler and triton and env.device.type != "mps")


def check_finite(norm, cfg, env):
    """Exit where the gradient's norm is not finite, before it reaches the weights, and so before anything is saved.
    In fp16 it may be the scaler that made it too large: then this step is left out, and the next scale is smaller."""
    check(math.isfinite(norm) or env.scaler.is_enabled(), f"the gradient's norm is {norm}. {cfg.out_dir}/ckpt.pt is "
          f"the last good checkpoint, if it is there; lower --lr (now {cfg.lr}) or raise --warmup_steps")


def leave(env, stopped):
    """Leave the other processes. A run that was stopped exits with 3, so that `pretrain.py … && sft.py …` stops too."""
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still needs it
        dist.destroy_process_group()
        # taking DistributedDataParallel apart while gloo's threads end can wait for ever: leave without it
        sys.stdout.flush()
        os._exit(3 * stopped)
    if stopped:
        sys.exit(3)


# ---------------------------------------------------------------------------- sharing work, and sums


def micro_steps(grad_accum, env):
    """Return the micro-steps of this rank. Which rows a micro-step holds does not depend on who computes it."""
    check(grad_accum % env.world == 0, f"grad_accum={grad_accum} must be a multiple of the {env.world} processes: it "
          f"is the total of micro-steps, shared among them. Try --grad_accum={env.world}")
    return range(env.rank, grad_accum, env.world)


def batch_starts(n, batch_size, env, pad=False):
    """Return the first row of each batch that this rank evaluates; the n rows are divided among the processes.

    pad: the same number of batches on every rank, as a model in shards computes only if all ranks call it.
    """
    stride = env.world * batch_size
    if pad:
        n = math.ceil(n / stride) * stride
    return range(env.rank * batch_size, n, stride)


def all_sum(values, env):
    """Return the sums over the processes of a list of numbers, as floats (in double precision where there is one)."""
    dtype = torch.float32 if env.device.type == "mps" else torch.float64
    total = torch.stack([torch.as_tensor(v, dtype=dtype, device=env.device) for v in values])
    if env.world > 1:
        dist.all_reduce(total)
    return total.tolist()
