"""
The model: a Llama-style decoder (RMSNorm, rotary positions, SwiGLU, grouped-query attention) in one file.

    Transformer(config)(ids)                     ids (B, T) -> logits (B, T, V)
    Transformer(config)(ids, targets)            -> mean cross entropy, without ever holding all the logits
    Transformer(config).generate([[ids], ...])   -> new tokens, with a KV cache
    ScalarModel(config)(ids)                     -> one number a token: reward model and PPO critic

Switches cover Llama 1/2/3, Qwen (bias in q, k, v), Qwen3 (norm on q and k), and DeepSeek-style mixture of experts.
Shapes: B batch, T time, C channels (dim), H query heads, K key/value heads, D channels a head, V vocabulary.
"""
import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class ModelConfig:
    vocab_size: int = 6400
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 0           # 0: as many as query heads; fewer: grouped-query attention
    head_dim: int = 0             # 0: dim / n_heads
    hidden_dim: int = 0           # width of the feed-forward layer; 0: 8/3 dim, rounded up to a multiple of 64
    max_seq_len: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True   # input and output embedding are one matrix
    qkv_bias: bool = False        # Qwen, Qwen2
    qk_norm: bool = False         # Qwen3
    n_experts: int = 0            # routed experts; 0: a dense model
    n_active_experts: int = 2     # experts a token is sent to
    n_shared_experts: int = 1     # experts that every token passes
    expert_hidden_dim: int = 0    # width of one expert; 0: hidden_dim / (active + shared), as costly as a dense layer,
                                  # rounded up to a multiple of 8 (the grouped product wants rows of whole 16 bytes)
    first_dense: int = 1          # this many first layers stay dense
    route_scale: float = 1.0      # factor on the routed experts' sum

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.dim // self.n_heads
        self.hidden_dim = self.hidden_dim or -(-8 * self.dim // 3 // 64) * 64
        if self.n_experts and not self.expert_hidden_dim:
            self.expert_hidden_dim = -(-self.hidden_dim // (self.n_active_experts + self.n_shared_experts) // 8) * 8
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of channels")
        if self.n_experts and (self.dim % 8 or self.expert_hidden_dim % 8):
            raise ValueError(f"dim={self.dim} and expert_hidden_dim={self.expert_hidden_dim} must be multiples of 8 in "
                             "a mixture of experts")
        if self.n_experts and self.n_active_experts > self.n_experts:
            raise ValueError(f"n_active_experts={self.n_active_experts} of only n_experts={self.n_experts}")


def rope_table(config):
    """Return cos and sin, each (max_seq_len, D): angle = position * theta^(-2i/D) (RoFormer, eq. 15), for both channels
    of a pair; the first one's sin is negated."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angle = torch.outer(torch.arange(config.max_seq_len).float(), freq)
    return torch.cat([angle.cos(), angle.cos()], dim=-1), torch.cat([-angle.sin(), angle.sin()], dim=-1)


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + D/2]) of x (B, T, heads, D) by their position's angle (layout of transformers)."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class Linear(nn.Linear):
    """nn.Linear; while generate() runs on a CPU, products for single tokens (B, 1, C) are made by packed_linear."""
    packed = None

    def forward(self, x):
        return super().forward(x) if self.packed is None or x.size(1) > 1 else packed_linear(x, self.packed, self.bias)


def pack(weight, B):
    """Return weight (N, C) in the layout that packed_linear reads fastest for B rows."""
    return weight.detach() if B == 1 else torch.ops.mkldnn._reorder_linear_weight(weight.detach(), B)


def packed_linear(x, packed, bias=None):
    """F.linear of single tokens x (B, 1, C) -> (B, 1, N).

    It takes as long as its weights take to arrive, and F.linear (MKL) fetches them at a quarter of the memory's speed
    (AMD EPYC, fp32). oneDNN does better with weights laid out for it; for one row so does MKL, if it is given two.
    """
    if len(x) > 1:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    y = torch.mm(packed, x[0].expand(2, -1).contiguous().t())[:, 0].view(1, 1, -1)
    return y if bias is None else y + bias


@contextlib.contextmanager
def packed_weights(model, B):
    """Context for generating B rows: on a CPU, weights are packed. Yields the output layer, (B, 1, C) -> (B, 1, V)."""
    on_cpu = model.head_weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not on_cpu or torch.is_autocast_enabled("cpu"):
        yield lambda x: F.linear(x, model.head_weight)
        return
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    try:
        for layer in layers:
            layer.packed = pack(layer.weight, B)
        head = pack(model.head_weight, B)
        yield lambda x: packed_linear(x, head)
    finally:  # training may go on, and change the weights
        for layer in layers:
            layer.packed = None


def document_positions(docs):
    """Return each token's position inside its own document; docs (B, T) numbers the documents packed into a row."""
    index = torch.arange(docs.size(1), device=docs.device).expand_as(docs)
    starts = F.pad(docs[:, 1:] != docs[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


class KVCache:
    """Keys and values of every layer, allocated once and written in place. Rows are left-padded by `pad` (B) tokens."""

    def __init__(self, config, pad, max_len, dtype):
        shape = (config.n_layers, len(pad), config.n_kv_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=pad.device).unbind()
        self.v = torch.zeros(shape, dtype=dtype, device=pad.device).unbind()
        self.pad, self.ragged, self.length = pad, bool(pad.any()), 0

    def append(self, layer, k, v):
        """Write k, v (B, K, T, D) behind what is there and return all of it. The caller moves `length` on."""
        T = k.size(2)
        self.k[layer].narrow(2, self.length, T).copy_(k)
        self.v[layer].narrow(2, self.length, T).copy_(v)
        return self.k[layer].narrow(2, 0, self.length + T), self.v[layer].narrow(2, 0, self.length + T)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        H, K, D = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = Linear(config.dim, (H + 2 * K) * D, bias=config.qkv_bias)
        self.out = Linear(H * D, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, config.norm_eps)
            self.k_norm = nn.RMSNorm(D, config.norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        H, K, D = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        qk, v = self.qkv(x).view(B, T, H + 2 * K, D).split([H + K, K], dim=2)
        if self.config.qk_norm:
            qk = torch.cat([self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])], dim=2)
        q, k = rotate(qk, cos, sin).to(v.dtype).split([H, K], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)         # (B, heads, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if x.device.type == "cpu":  # there, attention is three times as fast in fp32 as in bf16, forward and backward
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):
            if T == 1:  # decoding: the query heads that share a key head stand as its T queries, so nothing is copied
                y = F.scaled_dot_product_attention(q.view(B, K, H // K, D), k, v, attn_mask=mask).view(B, 1, H * D)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != K)
                y = y.transpose(1, 2).reshape(B, T, H * D)
        return self.out(y)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one product (Shazeer 2020, eq. 6)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim, bias=False)
        self.down = Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MoE(nn.Module):
    """Mixture of experts after DeepSeek-V3 (eq. 12-16): sigmoid scores, the best k by score + bias, weights from the
    score alone; the bias balances the load without touching the gradient (arXiv 2408.15664). Layout as Dots1."""

    def __init__(self, config):
        super().__init__()
        E, C, W = config.n_experts, config.dim, config.expert_hidden_dim
        self.k, self.scale = config.n_active_experts, config.route_scale
        self.router = nn.Linear(C, E, bias=False)
        self.gate_up = nn.Parameter(torch.empty(E, C, 2 * W))
        self.down = nn.Parameter(torch.empty(E, W, C))
        self.shared = FeedForward(C, W * config.n_shared_experts) if config.n_shared_experts else None
        self.register_buffer("bias", torch.zeros(E))
        self.register_buffer("load", torch.zeros(E), persistent=False)  # tokens an expert got since the last update

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, x.size(-1))                              # (N, C)
        with torch.autocast(x.device.type, enabled=False):  # near-ties must not depend on bf16 rounding
            scores = F.linear(x.float(), self.router.weight.float()).sigmoid()     # (N, E)
        chosen = (scores + self.bias).topk(self.k, dim=-1).indices                 # (N, k)
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale
        # sort the N*k (token, expert) pairs by expert, so that each expert's tokens are one block of a grouped product
        order = chosen.view(-1).argsort(stable=True)
        count = chosen.view(-1).bincount(minlength=len(self.bias))
        if self.training:
            self.load += count
        ends = count.cumsum(0).to(torch.int32)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        gate, up = F.grouped_mm(x[order // self.k].to(dtype), self.gate_up.to(dtype), offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, self.down.to(dtype), offs=ends)        # (N*k, C)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        y = (y[back].view(-1, self.k, shape[-1]) * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        if self.shared is not None:
            y = y + self.shared(x)
        return y.view(shape)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        moe = config.n_experts and layer >= config.first_dense
        self.ffn = MoE(config) if moe else FeedForward(config.dim, config.hidden_dim)

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() > 1:  # the products that write into the residual stream start smaller (GPT-2, sec. 2.3)
                residual = "attn.out" in name or "down" in name
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02)

    @property
    def head_weight(self):
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, ids, docs=None, cache=None):
        """ids (B, T) -> the last layer's normed output (B, T, C).

        docs (B, T): the number of the document each token belongs to. Tokens see only their own document, and count
        positions from its start: packed rows, and padding (give pad tokens a number of their own), are both this.
        cache: a KVCache to read and extend; the first call fills it with the prompts, later calls bring one token each.
        """
        B, T = ids.shape
        mask = positions = None
        if cache is not None and cache.length:
            assert T == 1, f"a filled cache is extended by one token at a time, got {T}"
            positions = (cache.length - cache.pad).unsqueeze(1)                    # (B, 1)
            if cache.ragged:
                mask = torch.arange(cache.length + 1, device=ids.device) >= cache.pad[:, None]
                mask = mask[:, None, None]                                         # (B, 1, 1, keys)
        else:
            if cache is not None and cache.ragged:
                docs = (torch.arange(T, device=ids.device) >= cache.pad[:, None]).long()
            if docs is not None:
                positions = document_positions(docs)
                mask = (docs[:, :, None] == docs[:, None, :]).tril().unsqueeze(1)  # (B, 1, T, T)
        x = self.embed(ids)
        cos = self.cos[:T] if positions is None else self.cos[positions]           # ([B,] T, D)
        sin = self.sin[:T] if positions is None else self.sin[positions]
        cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)    # broadcast over heads
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, ids, targets=None, weights=None, docs=None):
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> a scalar loss in nats.

        weights (B, T): the loss is sum(weights * nll), so the caller decides what it is a mean of; without weights it
        is the mean over targets that are not -1.
        """
        x = self.hidden(ids, docs)
        if targets is None:
            return F.linear(x, self.head_weight)
        x, targets = x.view(-1, x.size(-1)), targets.reshape(-1)                   # (N, C), (N)
        if weights is not None:
            return learned_cross_entropy(x, self.head_weight, targets, weights.reshape(-1))
        weights = (targets >= 0).float()
        return chunked_cross_entropy(x, self.head_weight, targets, weights / weights.sum().clamp(min=1))

    def logps(self, ids, targets, mask, temperature=1.0, docs=None):
        """Return log p(targets | ids), (B, T) in fp32, with gradients, where mask (B, T) is 1, and 0 elsewhere.

        The logits are made chunk by chunk and made again in the backward pass, so they never exist at once.
        """
        wanted = mask > 0
        x, chosen = self.hidden(ids, docs)[wanted], targets[wanted]                # (N, C), (N)
        size = chunk_size(self.config.vocab_size)
        parts = [checkpoint(token_logps, x[i:i + size], self.head_weight, chosen[i:i + size], temperature,
                            use_reentrant=False) for i in range(0, len(x), size)]
        logps = torch.zeros(targets.shape, device=x.device)
        return logps.masked_scatter(wanted, torch.cat(parts)) if parts else logps

    def update_router_bias(self, rate, all_reduce=None):
        """After an optimizer step: raise the bias of experts that got too few tokens, lower that of the others."""
        for module in self.modules():
            if isinstance(module, MoE):
                if all_reduce:
                    all_reduce(module.load)
                module.bias += rate * (module.load.mean() - module.load).sign()
                module.load.zero_()

    def count(self):
        """Return (all parameters, parameters that multiply a token): without the input embedding and idle experts."""
        total = sum(p.numel() for p in self.parameters())
        active = total - (0 if self.lm_head is None else self.embed.weight.numel())
        for module in self.modules():
            if isinstance(module, MoE):
                routed = module.gate_up.numel() + module.down.numel()
                active -= routed - routed * module.k // len(module.bias)
        return total, active

    def flops_per_token(self, T):
        """Training FLOPs a token: 6 a parameter, and causal attention's two products over T/2 keys on average."""
        c = self.config
        return 6 * self.count()[1] + 6 * c.n_layers * c.n_heads * c.head_dim * T

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
                 stop_ids=(), pad_id=0, seed=None, on_token=None, return_logps=False):
        """Continue each prompt (a list of ids) by up to max_new_tokens; return the new ids, a list a prompt.

        A row ends with (and includes) the first of stop_ids. temperature 0 is greedy. Filters apply in the order
        repetition penalty, temperature, top-k, top-p, min-p. Row i draws from its own generator, seeded seed + i, so
        what it says does not depend on the rest of the batch. on_token(step, ids) sees each step's tokens, a list of B
        ids (None in rows that have ended). return_logps adds each new token's log-prob at this temperature, unfiltered.
        """
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("generate needs at least one prompt, and one token in each; start an empty one with EOS")
        B, longest, device = len(prompts), max(map(len, prompts)), self.embed.weight.device
        if longest + max_new_tokens > self.config.max_seq_len:
            raise ValueError(f"prompt of {longest} tokens + max_new_tokens={max_new_tokens} exceed the model's "
                             f"max_seq_len={self.config.max_seq_len}")
        pad = torch.tensor([longest - len(p) for p in prompts], device=device)
        ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.embed.weight.dtype
        cache = KVCache(self.config, pad, longest + max_new_tokens, dtype)
        uniforms = torch.stack([torch.rand(max_new_tokens, generator=g) for g in row_generators(seed, B)]).to(device)
        seen = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=device)
        if repetition_penalty != 1.0:
            for i, prompt in enumerate(prompts):
                seen[i, list(prompt)] = True
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        new, logps = [], []
        with packed_weights(self, B) as head:
            for step in range(max_new_tokens):
                logits = head(self.hidden(ids, cache=cache)[:, -1:])[:, 0].float()       # (B, V)
                scaled = filter_logits(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty)
                ids = logits_to_ids(scaled, uniforms[:, step], temperature)
                if return_logps:
                    logps.append(F.log_softmax(logits / (temperature or 1.0), dim=-1).gather(1, ids[:, None])[:, 0])
                if repetition_penalty != 1.0:
                    seen.scatter_(1, ids[:, None], True)
                new.append(torch.where(done, -1, ids))
                if on_token:
                    on_token(step, [None if t < 0 else t for t in new[-1].tolist()])
                if len(stops):
                    done |= torch.isin(ids, stops)
                    if done.all():
                        break
                ids = ids[:, None]
        new = torch.stack(new, dim=1).tolist() if new else [[] for _ in prompts]
        new = [[t for t in row if t >= 0] for row in new]
        if not return_logps:
            return new
        logps = torch.stack(logps, dim=1).tolist() if logps else [[] for _ in prompts]
        return new, [row[:len(ids)] for row, ids in zip(logps, new)]


class ScalarModel(nn.Module):
    """The same trunk with a scalar a token instead of the vocabulary: scores of a reward model, values of a critic."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = Transformer(config)
        self.trunk.lm_head = None
        self.head = nn.Linear(config.dim, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.dim + 1))  # Stiennon et al. 2020, appendix B.1
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, docs=None):
        """ids (B, T) -> (B, T) in fp32."""
        x = self.trunk.hidden(ids, docs)
        with torch.autocast(x.device.type, enabled=False):  # a score in bf16 has but eight bits
            return self.head(x.float()).squeeze(-1)


# ---------------------------------------------------------------------------- loss


def chunk_size(vocab_size):
    """Rows of logits to hold at once: about 16 MB of fp32 for a small vocabulary, never fewer than 128 rows."""
    return max(128, 2 ** 22 // vocab_size)


def token_logps(x, weight, targets, temperature=1.0):
    """x (N, C), weight (V, C), targets (N) -> log-prob of each target, (N)."""
    logits = F.linear(x, weight).float() / temperature
    return -F.cross_entropy(logits, targets, reduction="none")


class ChunkedCrossEntropy(torch.autograd.Function):
    """sum(weights * cross entropy(x @ weight.T, targets)), chunk by chunk, the gradient made beside the loss.

    Per token d loss / d logits = weights * (softmax - onehot); making it in the forward pass saves the logits' memory
    (and on CPUs the time to fetch it) without computing them twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, weights, with_grad):
        loss = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x) if with_grad else None
        grad_weight = torch.zeros_like(weight) if with_grad else None
        for i in range(0, len(x), chunk_size(len(weight))):
            part = slice(i, i + chunk_size(len(weight)))
            logits = F.linear(x[part], weight).float()
            target = targets[part].clamp(min=0)[:, None]
            largest = logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, target) - largest
            probs = logits.sub_(largest).exp_()                                    # softmax, once divided by its sum
            total = probs.sum(-1, keepdim=True)
            loss += (weights[part] * (total.log() - chosen).squeeze(1)).sum()
            if with_grad:
                grad = probs.div_(total).scatter_add_(1, target, total.new_full((1, 1), -1.0).expand_as(target))
                grad = grad.to(x.dtype)  # not yet times weights: a row's weight is cheaper put on C numbers than on V
                grad_x[part] = (grad @ weight.to(x.dtype)) * weights[part, None]
                grad_weight += grad.T @ (x[part] * weights[part, None]).to(x.dtype)
        if with_grad:
            ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss.to(grad_x.dtype), grad_weight * grad_loss, None, None, None


def chunked_cross_entropy(x, weight, targets, weights):
    """x (N, C), weight (V, C), targets (N), weights (N) -> sum of weights * nll; weights of 0 ignore their target."""
    return ChunkedCrossEntropy.apply(x, weight, targets, weights.float(), torch.is_grad_enabled())


@torch.compiler.disable  # how many targets are learned changes with every batch: each number would be compiled anew
def learned_cross_entropy(x, weight, targets, weights):
    """chunked_cross_entropy without the rows of weight 0: what need not be learned needs no logits."""
    learned = weights != 0
    return chunked_cross_entropy(x[learned], weight, targets[learned], weights[learned])


# ---------------------------------------------------------------------------- sampling


def row_generators(seed, n):
    """One random generator a row, on the CPU so that every device draws the same numbers."""
    for i in range(n):
        g = torch.Generator()
        yield g.manual_seed(seed + i) if seed is not None else g.manual_seed(g.seed())


def filter_logits(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty):
    """Return logits (B, V) with -inf where a token is not allowed. seen (B, V): tokens already in the row."""
    if repetition_penalty != 1.0:  # Keskar et al. 2019: divide what is positive, multiply what is negative
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty),
                             logits)
    if temperature == 0:
        return logits
    logits = logits if temperature == 1 else logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:  # keep the fewest tokens whose probabilities reach top_p (Holtzman et al. 2020)
        ordered, index = logits.sort(descending=False)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, index, drop), -torch.inf)
    if min_p > 0:  # keep tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024)
        logits = logits.masked_fill(logits < logits.max(-1, keepdim=True).values + math.log(min_p), -torch.inf)
    return logits


def logits_to_ids(logits, uniforms, temperature):
    """Pick a token a row of logits (B, V): the likeliest, or by inverting the cdf at uniforms (B) in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = logits.softmax(-1).cumsum(-1)
    # right=True: the first token whose cdf exceeds the draw, which never is one of probability 0
    draw = torch.minimum(uniforms[:, None] * cdf[:, -1:], cdf[:, -1:].nextafter(cdf.new_zeros(())))
    return torch.searchsorted(cdf, draw, right=True).squeeze(1)
