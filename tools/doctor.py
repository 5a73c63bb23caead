"""
What this machine has for training, what is missing, and what that costs.

    python -m tools.doctor

Lines that begin with ! name something to do; the exit status is 1 where nothing can be trained as it is.
"""
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys

# packages that some parts need: what is impossible without them
PACKAGES = {
    "numpy": "nothing runs",
    "sentencepiece": "nothing that reads a tokenizer.model runs",
    "tiktoken": "no vocabularies of Qwen or GPT",
    "tqdm": "prepare.py does not run",
    "opencc": "prepare.py poems does not run (traditional to simplified script)",
    "yaml": "prepare.py poems-sft does not run (pip install pyyaml)",
    "pypinyin": "no rhymes in evaluation and GRPO",
    "matplotlib": "no pictures (tools.plot)",
    "pyarrow": "prepare.py reads no .parquet",
    "zstandard": "prepare.py reads no .zst",
    "safetensors": "no export to transformers (optional)",
    "gguf": "no export to llama.cpp (optional)",
    "fastapi": "no tools.serve (optional)",
    "transformers": "no comparison in tools.bench (optional)"}


def line(name, value, problem=""):
    print(f"{name:<10} {value}")
    if problem:
        print(f"!          {problem}")


def describe_device(torch):
    """Print the device that device=auto takes, and the dtype of its matmuls; return its torch.device."""
    from common.distributed import choose_device, choose_dtype
    device = choose_device("auto")
    name = platform.processor() or platform.machine()
    problem = ""
    if device.type == "cuda":
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        name = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in found)
    elif device.type == "cpu" and shutil.which("nvidia-smi"):
        problem = f"nvidia-smi is here, but PyTorch sees no GPU: torch {torch.__version__} is built for " \
                  f"{'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPUs'}. Install the build that fits the driver"
    line("device", f"{device}: {name}", problem)
    dtype = choose_dtype("auto", device)
    why = {
        torch.bfloat16: "bf16 is fast here",
        torch.float16: "this GPU has no fast bf16; a scaler keeps small gradients",
        torch.float32: "bf16 is slow on this CPU (measured), or unknown on MPS"}
    line("matmuls", f"{str(dtype).removeprefix('torch.')}: {why[dtype]}")
    return device


def describe_compiler(torch, device):
    """Print whether torch.compile has what it needs."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")
    triton = importlib.util.find_spec("triton") is not None
    if device.type == "mps":
        line("compiler", "not used on MPS")
    elif device.type == "cuda" and not triton:
        line("compiler", "no Triton", "training runs uncompiled, about half as fast: pip install triton (Windows: triton-windows)")
    elif not compiler:
        line("compiler", "none", "training runs uncompiled, slower: install g++ (Debian: apt-get install g++), or use WSL")
    else:
        line("compiler", compiler)


def describe_room():
    """Print cores, memory and disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    line("cores", f"{cores} of {os.cpu_count()}")
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        problem = "under 4 GiB: take a smaller --batch_size and a larger --grad_accum" if total < 4 else ""
        line("memory", f"{total:.1f} GiB", problem)
    free = shutil.disk_usage(".").free / 2**30
    problem = "the quickstart writes about 1 GiB: make room" if free < 2 else ""
    line("disk", f"{free:.1f} GiB free in {os.getcwd()}", problem)


def describe_packages():
    """Print versions, and what each missing package costs."""
    found = []
    for name, cost in PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            line("missing", f"{name}: {cost}")
        else:
            package = "pyyaml" if name == "yaml" else name
            found.append(f"{name} {importlib.metadata.version(package)}")
    line("packages", ", ".join(found))


def main():
    line("system", f"{platform.platform()}, Python {platform.python_version()}")
    if importlib.util.find_spec("torch") is None:
        line("torch", "missing", "nothing runs without it: pip install -r requirements.txt")
        sys.exit(1)
    import torch
    recent = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
    line("torch", torch.__version__, "" if recent else "older than 2.10: pip install -r requirements.txt")
    if importlib.util.find_spec("numpy") is None:
        line("missing", "numpy: nothing runs", "pip install -r requirements.txt")
        sys.exit(1)
    device = describe_device(torch)
    describe_compiler(torch, device)
    describe_room()
    describe_packages()
    sys.exit(not recent)


if __name__ == "__main__":
    main()
