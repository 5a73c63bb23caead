"""
Optimizers and the learning rate: AdamW, Muon, warmup and decay.

    optimizers = make_optimizers(model, cfg, env)
    set_lr(optimizers, lr_at(step, cfg) / cfg.lr)

Every parameter group knows its "peak_lr"; set_lr moves all of them by the same factor.
"""
import math
from collections import defaultdict

import torch
import torch.distributed as dist

from common.sharding import is_shard, shard_like


def lr_at(step, cfg, decay_steps=0):
    """Learning rate of a step: linear warmup, then cosine to min_lr, or (decay_steps > 0) flat and a linear fall.

    cfg: lr, min_lr, max_steps and warmup_steps (0: a tenth of the run, at most 100 steps).
    """
    warmup_steps = cfg.warmup_steps or min(100, math.ceil(cfg.max_steps / 10))
    if step < warmup_steps:
        return cfg.lr * (step + 1) / warmup_steps
    if decay_steps:
        # a short run may have fewer steps than that after its warmup
        decay_steps = max(1, min(decay_steps, cfg.max_steps - warmup_steps))
        share = min(1.0, (cfg.max_steps - step) / decay_steps)
    else:
        done = (step - warmup_steps) / max(1, cfg.max_steps - warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * share


def set_lr(optimizers, factor):
    """Set every learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def make_adamw(params, lr, weight_decay):
    """AdamW over the parameters that learn: weight decay on matrices, none on norm weights and biases."""
    learning = [p for p in params if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": weight_decay, "peak_lr": lr},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0, "peak_lr": lr}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def make_optimizers(model, cfg, env):
    """Return a list of optimizers over the parameters that learn.

    adamw: one AdamW. muon: the blocks' matrices go to Muon; embeddings, head, experts, norm weights and biases stay
    with AdamW, at cfg.adam_lr.
    """
    muon = defaultdict(list)  # {parts_of(…): parameters}
    rest = []                 # parameters that stay with AdamW
    for name, p in model.named_parameters():
        if cfg.optimizer == "muon" and p.ndim == 2 and "blocks." in name and "router" not in name and p.requires_grad:
            muon[parts_of(name, p, model.config)].append(p)
        else:
            rest.append(p)
    optimizers = []
    if any(p.requires_grad for p in rest):
        adam_lr = cfg.adam_lr if muon and cfg.adam_lr else cfg.lr
        optimizers.append(make_adamw(rest, adam_lr, cfg.weight_decay))
    if muon:
        groups = [{"params": params, "parts": parts, "peak_lr": cfg.lr} for parts, params in muon.items()]
        optimizers.append(Muon(groups, cfg.lr, cfg.weight_decay, cfg.momentum, env.dtype))
    return optimizers


# ---------------------------------------------------------------------------- Muon


# Five steps of X <- a X + (b X X' + c (X X')^2) X bring all singular values of a matrix of norm 1 close to 1.
# Coefficients: Polar Express (arXiv 2505.16932), which fits each step to the range that the one before has left.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalize(x):
    """x (matrices, rows, columns) -> about U V', where x = U S V' is its singular value decomposition."""
    if x.size(-2) > x.size(-1):
        return orthogonalize(x.mT).mT  # of a matrix that is wider than high, X X' is the smaller square
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (1.02 * norm + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)        # b square + c square @ square
        x = torch.baddbmm(x, polynomial, x, beta=a)                                # a x + polynomial @ x
    return x


def orthogonalize_batch(matrices, dtype):
    """List of matrices of one shape -> the orthogonalized ones. Each process computes a share of them, all get all."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    share = math.ceil(len(matrices) / world)
    mine = matrices[rank * share:(rank + 1) * share]
    mine += [torch.zeros_like(matrices[0])] * (share - len(mine))  # equal shares can be gathered in one call
    stack = torch.stack(mine)                                                      # (share, rows, columns)
    stack = orthogonalize(stack.to(dtype)).contiguous()
    if world > 1:
        whole = stack.new_empty(world * share, *stack.shape[1:])
        dist.all_gather_into_tensor(whole, stack)
        stack = whole                                                              # (world * share, rows, columns)
    return stack[:len(matrices)]


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix (Jordan et al. 2024): the step is equally long in all directions.

    The step is scaled to the size of AdamW's, 0.2 a weight (arXiv 2502.16982), so learning rates of both can be
    compared. A group's "parts" are the rows of the matrices that lie in one parameter, like q, k and v: each is a
    matrix of its own. Matrices of one shape are orthogonalized together, with matmuls in `dtype`.
    """

    def __init__(self, groups, lr, weight_decay=0.0, momentum=0.95, dtype=torch.float32):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, parts=None))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        updates = []                    # [(parameter, its update, its group)]
        same_shape = defaultdict(list)  # {shape: matrices, views of the updates}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                # Nesterov: first the gradient goes into the momentum (a running mean), then a mix of both is the update
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                if is_shard(update):
                    update = update.full_tensor()  # a shard of a matrix is not enough: each process gathers them all
                updates.append((p, update, group))
                for matrix in update.split(group["parts"] or [len(p)]):
                    same_shape[matrix.shape].append(matrix)
        for shape, matrices in same_shape.items():
            # write each result into its matrix: a view, so this changes `updates`
            for matrix, result in zip(matrices, orthogonalize_batch(matrices, self.dtype)):
                matrix.copy_(result)
                matrix.mul_(0.2 * math.sqrt(max(shape)))
        # step, each process its own shard where there are shards
        for p, update, group in updates:
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(shard_like(update, p), alpha=-group["lr"])


def parts_of(name, p, config):
    """Return how many rows of a parameter belong to each of its matrices: q, k and v; gate and up; else all to one."""
    if name.endswith("qkv.weight"):
        kv = config.n_kv_heads * config.head_dim
        return (config.n_heads * config.head_dim, kv, kv)
    if name.endswith("gate_up.weight"):
        return (len(p) // 2, len(p) // 2)
    return (len(p),)
