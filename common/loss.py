"""
From hidden states to losses, in chunks: all logits at once, N tokens times a vocabulary of 150,000, would be gigabytes.

    cross_entropy(x, head_weight, targets, weights)          the loss of pretraining and SFT
    distillation_loss(x, head_weight, teacher_x, …)          KL from a teacher's probabilities
    text_loss(model, split, …)                               nats per token and bits per byte of a text
    token_logps(x, head_weight, targets, mask)               log-prob of each token, (B, T), with gradients: PPO, GRPO
    answer_logps(net, head_weight, ids, mask)                their sums over each row's answer: DPO
    score_answers(net, ids, mask)                            a reward model's score of each row's answer

Each docstring begins with the plain formula that the function equals; tests/test_loss.py holds it to that.
"""
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.data import shift
from common.distributed import all_sum, batch_starts
from model import matmul_dtype


def chunk_size(vocab_size, device):
    """Rows of logits to hold at once: on a GPU enough to keep it busy, on a CPU what stays in its cache (16 MB)."""
    return 4096 if device.type == "cuda" else max(128, 2 ** 22 // vocab_size)


# ---------------------------------------------------------------------------- cross entropy


def cross_entropy(x, head_weight, targets, weights=None, compiled=False):
    """F.cross_entropy(F.linear(x, head_weight), targets, ignore_index=-1), a scalar in nats; with weights
    sum(weights * F.cross_entropy(F.linear(x, head_weight), targets, reduction="none")).

    Hidden states x (..., C), head_weight (V, C), targets and weights (...): the caller's weights decide what the loss
    is a mean of. compiled: fuse what happens between the matmuls (torch.compile).
    """
    x = x.reshape(-1, x.size(-1))                                                  # (N, C)
    targets = targets.reshape(-1)                                                  # (N)
    if weights is None:
        weights = (targets >= 0).float()
        weights = weights / weights.sum().clamp(min=1)
    else:
        # compute logits only of the tokens that are learned
        weights = weights.reshape(-1).float()
        learned = weights != 0
        x = x[learned]
        targets = targets[learned]
        weights = weights[learned]
    if len(x) == 0:
        return x.sum() * 0.0 + head_weight.sum() * 0.0  # 0, with a gradient of 0 for each parameter (DDP waits for all)
    with_grad = torch.is_grad_enabled()
    return ChunkedCrossEntropy.apply(x, head_weight, targets, weights, with_grad, compiled)


def chunk_divergence(x, head_weight, teacher_x, teacher_head):
    """KL(teacher || student) of each token, (N)."""
    student = F.linear(x, head_weight).float()                                     # (N, V)
    teacher = F.linear(teacher_x, teacher_head).float()
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    return divergence.sum(-1)


def distillation_loss(x, head_weight, teacher_x, teacher_head, weights):
    """sum(weights * KL(teacher || student)), the KL over the vocabulary of each token (Hinton et al. 2015, sec. 2).

    x, teacher_x: hidden states (..., C) of both models; weights (...): 0 where nothing is learned.
    """
    learned = weights > 0
    x = x[learned]                                                                 # (N, C)
    teacher_x = teacher_x[learned]
    weights = weights[learned]
    loss = x.sum() * 0.0
    size = chunk_size(len(head_weight), x.device)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        # both models' logits of a chunk are not kept: the backward pass computes them again
        divergence = checkpoint(chunk_divergence, x[part], head_weight, teacher_x[part], teacher_head,
                                use_reentrant=False)
        loss = loss + (weights[part] * divergence).sum()
    return loss


@torch.no_grad()
def text_loss(model, split, seq_len, batch_size, max_tokens, env):
    """Nats per token, and bits per byte = sum of nats / ln 2 / UTF-8 bytes (comparable between tokenizers), on the
    first max_tokens of a split; rows are shared among the processes."""
    n_tokens = min(max_tokens, len(split.tokens) - 1)
    n_rows = math.ceil(n_tokens / seq_len)
    nats = torch.zeros((), device=env.device)
    for first in batch_starts(n_rows, batch_size, env, pad=True):
        # always whole batches, so that there is one shape to compile; -1 marks targets that do not count
        ids = np.zeros((batch_size, seq_len), dtype=np.int64)
        targets = np.full((batch_size, seq_len), -1, dtype=np.int64)
        start = first * seq_len
        n = max(0, min(batch_size * seq_len, n_tokens - start))
        ids.flat[:n] = split.tokens[start:start + n]
        targets.flat[:n] = split.tokens[start + 1:start + n + 1]
        x = torch.from_numpy(ids).to(env.device)                                   # (B, T)
        y = torch.from_numpy(targets).to(env.device)
        # weights of 1 make this a sum. Sums of all batches can be added, means of batches of different sizes cannot
        with env.autocast():
            nats += cross_entropy(model(x), model.head_weight, y, (y >= 0).float())
    total = all_sum([nats], env)[0]
    n_bytes = split.meta["bytes"] * n_tokens / len(split.tokens)
    return total / n_tokens, total / math.log(2) / n_bytes


# ---------------------------------------------------------------------------- log-probs and scores of answers


def chunk_logps(x, head_weight, targets, temperature):
    """x (N, C), head_weight (V, C), targets (N) -> log-prob of each target, (N), in fp32."""
    logits = F.linear(x, head_weight).float() / temperature
    return -F.cross_entropy(logits, targets, reduction="none")


def token_logps(x, head_weight, targets, mask, temperature=1.0):
    """log_softmax(F.linear(x, head_weight) / temperature) at the targets, (B, T) in fp32, with gradients, where mask
    (B, T) is 1, and 0 elsewhere. x: hidden states (B, T, C)."""
    learned = mask > 0
    x = x[learned]                                                                 # (N, C)
    chosen = targets[learned]
    logps = torch.zeros(targets.shape, device=x.device)
    if len(x) == 0:
        return logps + x.sum() * 0.0 + head_weight.sum() * 0.0
    # a chunk's logits are not kept: the backward pass computes them again
    size = chunk_size(len(head_weight), x.device)
    parts = []
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        parts.append(checkpoint(chunk_logps, x[part], head_weight, chosen[part], temperature, use_reentrant=False))
    # put them back to their places in the rows
    return logps.masked_scatter(learned, torch.cat(parts))


def last_learned(mask):
    """Return the column of each row's last 1, (R); mask (R, T)."""
    column = torch.arange(mask.size(1), device=mask.device)
    return (mask * column).amax(dim=1).long()


def length_buckets(lengths):
    """Split rows, of which only the first `lengths` (R) tokens count, into groups of like length, so that little
    padding is computed: a limited number of tokens a group, padding included, and at least one row."""
    limit = 65_536 if lengths.is_cuda else 4_096
    order = lengths.argsort(stable=True)
    sizes = [0]
    for length in lengths[order].tolist():
        # sorted: this row is the longest so far, and all others of its group would be padded to it
        tokens = (sizes[-1] + 1) * length
        if sizes[-1] and tokens > limit:
            sizes.append(0)
        sizes[-1] += 1
    return order.split(sizes)


def answer_logps(net, head_weight, ids, mask, temperature=1.0):
    """token_logps(net(inputs), head_weight, targets, mask, temperature).sum(1) of shift(ids, mask): the log-prob of
    each row's answer with its <|im_end|>, prompt left out; and the answers' lengths, (R) each. ids, mask: of pad()."""
    sums = torch.zeros(len(ids), device=ids.device)
    lengths = last_learned(mask) + 1
    for rows in length_buckets(lengths):
        T = lengths[rows].max()
        inputs, targets, learned = shift(ids[rows, :T], mask[rows, :T])
        logps = token_logps(net(inputs), head_weight, targets, learned, temperature)        # (rows, T - 1)
        sums = sums.index_put((rows,), logps.sum(dim=1))
    return sums, mask[:, 1:].sum(dim=1)


def score_answers(net, ids, mask):
    """net(ids)[row, last token of its answer], the <|im_end|>: a reward model's score of each row, (R).

    ids, mask (R, T): of pad(). What stands behind a row's end cannot change its score: attention is causal.
    """
    scores = torch.zeros(len(ids), device=ids.device)
    last = last_learned(mask)
    for rows in length_buckets(last + 1):
        T = last[rows].max() + 1
        values = net(ids[rows, :T])                                                # (rows, T)
        at_end = values.gather(1, last[rows, None]).squeeze(1)                     # (rows)
        scores = scores.index_put((rows,), at_end)
    return scores


# ---------------------------------------------------------------------------- how cross_entropy saves memory


def softmax_nll(logits, target):
    """logits (N, V), target (N, 1) -> nll (N), -log softmax at the target; its gradient (N, V), softmax - onehot."""
    logps = logits.float().log_softmax(-1)
    nll = -logps.gather(1, target).squeeze(1)
    column = torch.arange(logits.size(1), device=logits.device)
    onehot = (column == target).float()                                            # (N, V)
    gradient = logps.exp() - onehot
    return nll, gradient.to(logits.dtype)


@functools.cache  # made when it is first asked for: torch's compiler takes seconds to import
def compiled_softmax_nll():
    """softmax_nll, compiled: it reads the logits from memory once instead of six times."""
    return torch.compile(softmax_nll, dynamic=True)


class ChunkedCrossEntropy(torch.autograd.Function):
    """sum(weights * cross entropy(x @ head.T, targets)), chunk by chunk; x (N, C), head (V, C), targets, weights (N).

    With g = d loss / d logits = weights * (softmax - onehot), (N, V), the gradients are dx = g @ head, dhead = g.T @ x.
    forward() computes them beside the loss: so the logits are not kept for backward(), and not computed twice.
    """

    @staticmethod
    def forward(ctx, x, head, targets, weights, with_grad, compiled):
        nll_and_gradient = compiled_softmax_nll() if compiled else softmax_nll
        dtype = matmul_dtype(x)
        rounded_head = head.to(dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if with_grad else None
        grad_head = torch.zeros_like(head) if with_grad else None
        # weights, such as 1/N, are too small for fp16: use weights / largest in the matmul, then multiply in fp32
        scale = weights.amax().clamp(min=1e-30)
        relative = weights / scale
        size = chunk_size(len(head), x.device)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            inputs = x[part].to(dtype)                                             # (rows, C)
            # the logits get no name here: a name would keep their memory while the next chunk's are computed
            nll, grad = nll_and_gradient(                                          # (rows), (rows, V)
                F.linear(inputs, rounded_head),
                targets[part].clamp(min=0)[:, None])
            loss += (weights[part] * nll).sum()
            if with_grad:
                # grad lacks the weights: multiply rows of C numbers by them, which is cheaper than rows of V numbers
                grad_x[part] = (grad @ rounded_head) * weights[part, None]
                weighted = (inputs * relative[part, None]).to(dtype)
                grad_head += (grad.T @ weighted).float() * scale
        if with_grad:
            ctx.save_for_backward(grad_x, grad_head)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        # both are computed already; grad_loss is one number: by what the caller has multiplied the loss
        grad_x, grad_head = ctx.saved_tensors
        grad_x = grad_x * grad_loss.to(grad_x.dtype)
        return grad_x, grad_head * grad_loss, None, None, None, None
