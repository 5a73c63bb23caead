"""What a model costs and what a machine can do: parameters, FLOPs, data sheets of GPUs, peak memory."""
import os
import re

import torch

from model import MoE

# dense bf16 TFLOP/s of common GPUs, from their data sheets (without sparsity)
GPU_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "A40": 150, "A10": 125,
    "A6000": 155, "L40S": 362, "L40": 181, "L20": 119, "L4": 121, "V100": 125, "T4": 65, "5090": 209, "5080": 113,
    "4090": 165, "4080": 97, "4070": 58, "4060": 30, "3090": 71, "3080": 60}


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


def count(model):
    """Return (all parameters, parameters that multiply a token): without the input embedding and idle experts."""
    total = sum(p.numel() for p in model.parameters())
    active = total
    if model.lm_head is not None:
        # an embedding is looked up; only where it is the head as well does it multiply
        active -= model.embed.weight.numel()
    for module in model.modules():
        if isinstance(module, MoE):
            # a token goes through k of its E experts
            routed = module.gate_up.numel() + module.down.numel()
            active -= routed - routed * module.k // len(module.bias)
    return total, active


def flops_per_token(model, T):
    """Training FLOPs a token: 6 a parameter, and causal attention's two matmuls over T/2 keys on average."""
    # a parameter costs a multiplication and an addition forward, and twice as much backward (PaLM, appendix B)
    c = model.config
    attention = c.n_layers * c.n_heads * c.head_dim * T
    return 6 * (count(model)[1] + attention)
