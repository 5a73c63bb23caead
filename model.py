"""
The model: a Llama-style decoder (RMSNorm, rotary positions, SwiGLU, grouped-query attention) in one file.

    hidden = Transformer(config)(ids)            ids (B, T) -> the last layer's vector of each token (B, T, C)
    logits = model.logits(hidden)                (B, T, C) -> a number for each token that may come next (B, T, V)
    scores = ScalarModel(config)(ids)            (B, T) -> one number a token: reward model and PPO critic

These are two steps, since the logits of a large vocabulary take much memory: loss.py computes them in chunks.
Switches cover Llama 1/2/3, Qwen (bias in q, k, v), Qwen3 (norm on q and k), and DeepSeek-style mixture of experts.
Shapes: B batch, T time, C channels (dim), H query heads, K key/value heads, D channels a head, V vocabulary.
"""
import functools
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
    max_seq_len: int = 1024       # tokens the model can see at once
    rope_theta: float = 10000.0
    rope_factor: float = 1.0      # YaRN: max_seq_len / rope_original_len; 1: plain RoPE
    rope_original_len: int = 0    # YaRN: tokens of the longest row that it was first trained on
    norm_eps: float = 1e-5
    tie_embeddings: bool = True   # input and output embedding are one matrix
    qkv_bias: bool = False        # Qwen, Qwen2
    qk_norm: bool = False         # Qwen3
    n_experts: int = 0            # routed experts; 0: a dense model
    n_active_experts: int = 2     # experts a token is sent to
    n_shared_experts: int = 1     # experts that every token passes
    expert_hidden_dim: int = 0    # width of one expert; 0: hidden_dim / (active + shared), as costly as a dense layer,
                                  # rounded up to a multiple of 8 (the grouped matmul needs rows of whole 16 bytes)
    first_dense: int = 1          # this many first layers stay dense
    route_scale: float = 1.0      # factor on the routed experts' sum

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if not self.hidden_dim:
            # SwiGLU has three matrices where a plain layer has two of width 4 dim: at 8/3 dim they cost as much
            self.hidden_dim = 64 * math.ceil(8 * self.dim / 3 / 64)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of channels")
        if self.rope_factor < 1 or self.rope_factor > 1 and not self.rope_original_len:
            raise ValueError(f"rope_factor={self.rope_factor} must be 1, or more with a rope_original_len above 0")
        if self.n_experts:
            if not self.expert_hidden_dim:
                together = self.n_active_experts + self.n_shared_experts
                self.expert_hidden_dim = 8 * math.ceil(self.hidden_dim / together / 8)
            if self.dim % 8 or self.expert_hidden_dim % 8:
                raise ValueError(f"dim={self.dim} and expert_hidden_dim={self.expert_hidden_dim} must be multiples of "
                                 "8 in a mixture of experts")
            if self.n_active_experts > self.n_experts:
                raise ValueError(f"n_active_experts={self.n_active_experts} of only n_experts={self.n_experts}")


def matmul_dtype(x):
    """Return the dtype in which matmuls with x are made: under autocast its own (bf16, fp16), else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# ---------------------------------------------------------------------------- positions


def rope_table(config):
    """Return cos and sin of every position's angles, each (max_seq_len, D/2): position * frequency_i, with
    frequency_i = theta^(-2i/D) (RoFormer, eq. 15). With rope_factor s > 1 it is YaRN's (arXiv 2309.00071, sec. 3):

        frequency_i = theta^(-2i/D) * (1 - ramp_i + ramp_i / s)        cos and sin grow by the factor 0.1 ln(s) + 1

    ramp_i rises from 0 for the pair that turns 32 times in rope_original_len tokens to 1 for the one that turns once.
    """
    # like the hands of a clock: pair 0 turns by 1 radian per token, each next pair slower, the last by about 1 / theta
    exponent = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim     # (D/2)
    frequency = config.rope_theta ** -exponent
    scale = 1.0
    if config.rope_factor > 1:
        # fast pairs have made full turns in training: they stay. Slow pairs would reach angles that training never had,
        # so they turn s times slower. With more keys softmax would get flatter: scale^2 makes all scores larger
        pairs_per_log = config.head_dim / 2 / math.log(config.rope_theta)
        low = max(0, math.floor(pairs_per_log * math.log(config.rope_original_len / (2 * math.pi * 32))))
        high = max(low + 0.001, math.ceil(pairs_per_log * math.log(config.rope_original_len / (2 * math.pi))))
        ramp = ((torch.arange(len(frequency), device="cpu") - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (1 - ramp + ramp / config.rope_factor)
        scale = 0.1 * math.log(config.rope_factor) + 1
    positions = torch.arange(config.max_seq_len, device="cpu").float()
    angle = torch.outer(positions, frequency)                                      # (max_seq_len, D/2)
    return scale * angle.cos(), scale * angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + D/2]) of x (B, T, heads, D) by their position's angle (layout of transformers)."""
    # (x1, x2) is a point in the plane; the rotation matrix of the angle turns it and keeps its length
    x1, x2 = x.chunk(2, dim=-1)
    turned = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    return turned.to(x.dtype)


def document_positions(docs):
    """Return each token's position inside its own document; docs (B, T) numbers the documents packed into a row."""
    index = torch.arange(docs.size(1), device=docs.device).expand_as(docs)
    # a document begins where the number changes, and at the start of the row
    changes = docs[:, 1:] != docs[:, :-1]
    begins = F.pad(changes, (1, 0), value=True)
    # the last beginning up to a token is that of its own document (cummax: the largest value so far)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def positions_and_mask(ids, docs=None, cache=None):
    """Return the tokens' positions, (B, T) or a slice, and the mask: True where a token sees a key, (B, 1, T, keys).
    A mask of None is the plain causal one."""
    T = ids.size(1)
    if cache is not None:
        if cache.filled:
            # decoding: one new token a row sees all keys before it, except the padding on its left
            positions = (cache.length - cache.pad).unsqueeze(1)                    # (B, 1)
            mask = cache.is_token(cache.length + 1)[:, None, None] if cache.ragged else None  # (B, 1, 1, keys)
            return positions, mask
        if cache.ragged:
            # prompts of different lengths: padding is document 0, the prompt document 1
            docs = cache.is_token(T).long()
    if docs is None:
        return slice(0, T), None
    # packed rows: a token sees tokens of the same document (compare all pairs) that do not come later (lower triangle)
    same_document = docs[:, :, None] == docs[:, None, :]                           # (B, T, T)
    return document_positions(docs), same_document.tril().unsqueeze(1)


class KVCache:
    """Keys and values of every layer, allocated once and written in place. Rows are left-padded by `pad` (B) tokens."""

    def __init__(self, config, pad, max_len, dtype):
        # keys and values of a token never change: they are kept, and only those of new tokens must be computed
        shape = (len(pad), config.n_kv_heads, max_len, config.head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=pad.device) for _ in range(config.n_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=pad.device) for _ in range(config.n_layers)]
        self.pad = pad
        self.ragged = bool(pad.any())  # prompts of different lengths: some rows begin with padding
        self.length = 0                # columns that are filled

    @property
    def filled(self):
        return self.length > 0

    def append(self, layer, k, v):
        """Write k, v (B, K, T, D) after the filled columns and return all of them. The model increases `length`."""
        end = self.length + k.size(2)
        keys = self.k[layer][:, :, :end]
        values = self.v[layer][:, :, :end]
        keys[:, :, self.length:] = k
        values[:, :, self.length:] = v
        return keys, values

    def is_token(self, length):
        """Of the first `length` columns: True where a token stands, False in the padding on its left, (B, length)."""
        return torch.arange(length, device=self.pad.device) >= self.pad[:, None]

    def select(self, rows):
        """Keep these rows (a tensor of their numbers, repeats allowed) and forget the others."""
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]
        self.pad = self.pad[rows]


# ---------------------------------------------------------------------------- layers


def attend(q, k, v, mask):
    """Attention of queries (B, H, T, D) over keys and values (B, K, S, D), return (B, H, T, D):

        scores = q @ k.mT / sqrt(D)                     how well each query fits each key, (B, H, T, S)
        scores = scores.masked_fill(~mask, -inf)        what may not be seen gets no weight
        return scores.softmax(-1) @ v                   a weighted mean of the values

    With K < H heads, each key head serves H / K query heads. mask (B, 1, T, S): True where a query sees a key; None:
    each sees the keys up to its own place. The fused kernel computes the same without storing all scores.
    """
    B, H, T, D = q.shape
    K = k.size(1)
    if q.device.type == "cpu":
        # on CPUs attention is three times as fast in fp32 as in bf16, forward and backward
        q = q.float()
        k = k.float()
        v = v.float()
    if T == 1:
        # decoding: the H / K query heads that share a key head become H / K queries of one head, so no key is copied
        queries = q.view(B, K, H // K, D)
        y = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask)
        return y.view(B, H, 1, D)
    if K != H and q.is_cuda and (mask is not None or torch.cuda.get_device_capability(q.device) < (8, 0)):
        # here no fused CUDA kernel takes shared key heads, and without one all T x S scores would lie in memory: so the
        # keys are copied instead, one copy for each query head
        k = k.repeat_interleave(H // K, dim=1)
        v = v.repeat_interleave(H // K, dim=1)
        K = H
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=K != H)


class Attention(nn.Module):
    """Each token makes a query (what it looks for), a key (what it is found by) and a value (what it gives)."""

    def __init__(self, config):
        super().__init__()
        H = config.n_heads
        K = config.n_kv_heads
        D = config.head_dim
        # one matmul makes q, k and v of all heads; with grouped queries (K < H), H / K heads share one k and one v
        self.head_counts = [H, K, K]  # of q, k and v
        self.head_dim = D
        self.qkv = nn.Linear(config.dim, (H + 2 * K) * D, config.qkv_bias)
        self.out = nn.Linear(H * D, config.dim, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, config.norm_eps)
            self.k_norm = nn.RMSNorm(D, config.norm_eps)

    def forward(self, x, cos, sin, mask=None, append=None):
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim)                          # (B, T, H + 2K, D)
        q, k, v = heads.split(self.head_counts, dim=2)
        if self.qk_norm:
            # q and k get a fixed length: scores cannot grow so large that softmax gives one key all the weight
            q = self.q_norm(q.float())
            k = self.k_norm(k.float())
        # positions enter here: after the rotation q @ k depends on the distance of the two tokens, not on their places
        q = rotate(q, cos, sin).to(v.dtype)
        k = rotate(k, cos, sin).to(v.dtype)
        # heads before time: each head is a batch of its own
        q = q.transpose(1, 2)                                                      # (B, H, T, D)
        k = k.transpose(1, 2)                                                      # (B, K, T, D)
        v = v.transpose(1, 2)
        if append is not None:
            k, v = append(k, v)  # the KV cache: returns the keys and values of all tokens so far
        with torch.autocast(x.device.type, enabled=False):  # attend knows better which dtype is fast
            y = attend(q, k, v, mask)                                              # (B, H, T, D)
        # put the heads' results side by side; `out` mixes them into C channels again
        y = y.transpose(1, 2).reshape(B, T, -1)                                    # (B, T, H * D)
        return self.out(y)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one matmul (Shazeer 2020, eq. 6)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x, real=None):
        # each token by itself, without looking at others. real (B, T), True where a token is no padding, is for MoE
        gate, up = self.gate_up(x).chunk(2, dim=-1)                                # (..., hidden_dim) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention, then feed-forward. Each reads x after a norm, and its result is added to x."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        if config.n_experts and layer >= config.first_dense:
            self.ffn = MoE(config)
        else:
            self.ffn = FeedForward(config.dim, config.hidden_dim)

    def forward(self, x, cos, sin, mask=None, append=None, real=None):
        # through "x +" gradients also reach the first layer directly, however many layers there are
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, append)
        return x + self.ffn(self.ffn_norm(x), real)


# ---------------------------------------------------------------------------- the whole


class Transformer(nn.Module):
    checkpoint_blocks = False  # True: keep only each block's input, and compute the rest again in the backward pass

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.seed = torch.randint(2 ** 62, (), device="cpu").item()  # of the weights it begins with
        self.trained_len = config.max_seq_len  # tokens of the longest row it has learned from; at first: all it sees
        # a vector for each token of the vocabulary; n_layers blocks; a matrix back to the vocabulary, or the same one
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        # buffers follow the model to its device; these two are not saved, as they can be computed again. They are made
        # on the CPU also when the rest is made on the meta device, that is, without memory (sharding.py)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if not self.embed.weight.is_meta:
            with torch.no_grad():
                for name, values in self.initial_weights():
                    self.get_parameter(name).copy_(values)

    def initial_weights(self):
        """Yield (name, values) of every parameter. Each is drawn from a generator of its own, so that processes which
        keep a shard of it, and have never seen the whole model, begin with the same numbers."""
        for number, (name, p) in enumerate(self.named_parameters()):
            values = torch.ones(p.shape)  # norm weights stay 1
            if name.endswith("bias"):
                values.zero_()
            elif p.dim() > 1:
                # results of 2 n_layers matmuls are added to x: they start smaller, so that the sum does not grow with
                # the number of layers (GPT-2, sec. 2.3)
                is_added = "attn.out" in name or "down" in name
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if is_added else 0.02
                values.normal_(std=std, generator=torch.Generator().manual_seed(self.seed + number))
            yield name, values

    def forward(self, ids, docs=None, cache=None):
        """ids (B, T) -> hidden states (B, T, C), normed.

        docs (B, T): the number of the document each token belongs to. Tokens see only their own document, and count
        positions from its start: packed rows, and padding (give pad tokens a number of their own), are both this.
        cache: a KVCache to read and extend; the first call fills it with the prompts, later calls bring one token each.
        """
        T = ids.size(1)
        assert cache is None or not cache.filled or T == 1, f"a filled cache takes one token at a time, got {T}"
        # the same for all layers: the position of each token, and which tokens it may see
        positions, mask = positions_and_mask(ids, docs, cache)
        cos = self.cos[positions].unsqueeze(-2)                                    # ([B,] T, 1, D/2)
        sin = self.sin[positions].unsqueeze(-2)
        real = None if docs is None else docs > 0  # document 0 is padding
        # the residual stream: one vector for each token, to which every layer adds its results
        x = self.embed(ids)                                                        # (B, T, C)
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                # not block(...): blocks compiled for training would be compiled anew for each new length
                append = functools.partial(cache.append, layer)
                x = block.forward(x, cos, sin, mask, append)
            elif self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, None, real, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, None, real)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    @property
    def head_weight(self):
        """The output embedding (V, C)."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden):
        """hidden states (..., C) -> logits (..., V) in fp32."""
        return F.linear(hidden, self.head_weight).float()

    def update_router_bias(self, rate, all_reduce=None):
        """After an optimizer step: raise the bias of experts that got too few tokens, lower that of the others."""
        for module in self.modules():
            if isinstance(module, MoE):
                if all_reduce:
                    all_reduce(module.load)  # the tokens of all processes
                missing = module.load.mean() - module.load                         # (E)
                module.bias += rate * missing.sign()
                module.load.zero_()


class ScalarModel(nn.Module):
    """A Transformer with one number per token instead of logits: scores of a reward model, values of a critic."""

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
        # attention is causal: the number at a token depends on the text up to it, at the last token on the whole text
        x = self.trunk(ids, docs)                                                  # (B, T, C)
        with torch.autocast(x.device.type, enabled=False):  # bf16 has only 8 bits of precision
            return self.head(x.float()).squeeze(-1)


# ---------------------------------------------------------------------------- optional: mixture of experts


class MoE(nn.Module):
    """Mixture of experts after DeepSeek-V3 (eq. 12-16): sigmoid scores, the best k by score + bias, weights from the
    score alone; the bias balances the load without touching the gradient (arXiv 2408.15664). Layout as Glm4Moe."""

    def __init__(self, config):
        super().__init__()
        E = config.n_experts
        W = config.expert_hidden_dim
        self.k = config.n_active_experts
        self.scale = config.route_scale
        self.router = nn.Linear(config.dim, E, bias=False)
        # all experts' matrices lie in one tensor; expert i is gate_up[i], down[i], a FeedForward of width W
        self.gate_up = nn.Parameter(torch.empty(E, config.dim, 2 * W))
        self.down = nn.Parameter(torch.empty(E, W, config.dim))
        # experts that every token passes are one wider FeedForward
        shared = config.n_shared_experts
        self.shared = FeedForward(config.dim, W * shared) if shared else None
        self.register_buffer("bias", torch.zeros(E, device="cpu"))
        # tokens an expert got since the last update
        self.register_buffer("load", torch.zeros(E, device="cpu"), persistent=False)

    def forward(self, x, real=None):
        shape = x.shape
        x = x.reshape(-1, shape[-1])                                               # (N, C)
        # route: k experts a token. In fp32, so that near-ties do not depend on how bf16 rounds
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.router.weight.float()).sigmoid()     # (N, E)
        # the bias decides which experts get a token, not how much their outputs weigh: no gradient goes through it
        chosen = (scores + self.bias).topk(self.k, dim=-1).indices                 # (N, k)
        weights = scores.gather(1, chosen)
        if self.k > 1:
            # of a single expert the weight would be w / w = 1, and the router would get no gradient
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.scale
        # sort the N*k (token, expert) pairs by expert, so that each expert's tokens are one block
        expert = chosen.view(-1)                                                   # (N*k); pair j is of token j // k
        order = expert.argsort(stable=True)
        experts = torch.arange(len(self.bias), device=x.device)
        is_sent = expert[:, None] == experts                                       # (N*k, E)
        block_ends = is_sent.sum(0).cumsum(0).to(torch.int32)                      # (E), padding counts as well
        if torch.is_grad_enabled():
            # the load to keep even is that of real tokens; padding, all alike, would fill an expert of its own
            if real is not None:
                is_sent = is_sent & real.reshape(-1, 1).repeat_interleave(self.k, dim=0)
            self.load += is_sent.sum(0)
        # one grouped matmul for all experts: block i of the rows times matrix i
        dtype = matmul_dtype(x)
        rows = x[order // self.k].to(dtype)                                        # (N*k, C)
        both = grouped_matmul(rows, self.gate_up.to(dtype), block_ends)           # (N*k, 2W)
        gate, up = both.chunk(2, dim=-1)
        y = grouped_matmul(F.silu(gate) * up, self.down.to(dtype), block_ends)    # (N*k, C)
        # back in the order of the tokens, and each token's k outputs added up
        y = torch.empty_like(y).index_copy_(0, order, y)
        y = y.view(-1, self.k, shape[-1])                                          # (N, k, C)
        y = (y * weights.unsqueeze(-1)).sum(1).to(x.dtype)                         # (N, C)
        if self.shared is not None:
            y = y + self.shared(x)
        return y.view(shape)


@torch.library.custom_op("mingyue::grouped_matmul", mutates_args=())
def grouped_matmul(x: torch.Tensor, weights: torch.Tensor, block_ends: torch.Tensor) -> torch.Tensor:
    """x (N, C), weights (E, C, W) -> (N, W): rows of block i, block_ends[i - 1] to block_ends[i] - 1, times weights[i].

    F.grouped_mm as a custom operation: torch.compile refuses the plain one in fp32 and fp16, which it can compute.
    """
    return F.grouped_mm(x, weights, offs=block_ends)


@torch.library.custom_op("mingyue::grouped_outer", mutates_args=())
def grouped_outer(x: torch.Tensor, grad: torch.Tensor, block_ends: torch.Tensor) -> torch.Tensor:
    """x (N, C), grad (N, W) -> (E, C, W): the gradient of each matrix, x.T @ grad over the rows of its block."""
    return F.grouped_mm(x.T, grad, offs=block_ends)


# What the compiler must know of a custom operation: the shape of its result, and its gradient.
@grouped_matmul.register_fake
def matmul_shape(x, weights, block_ends):
    return x.new_empty(x.size(0), weights.size(2))


@grouped_outer.register_fake
def outer_shape(x, grad, block_ends):
    return x.new_empty(block_ends.size(0), x.size(1), grad.size(1))


def save_for_grouped_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def grouped_backward(ctx, grad):
    # in each block y = x W, so dx = dy W' and dW = x' dy (' is transposed; grad is dy)
    x, weights, block_ends = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grouped_matmul(grad, weights.transpose(1, 2), block_ends)
    grad_weights = grouped_outer(x, grad, block_ends)
    return grad_x, grad_weights, None


grouped_matmul.register_autograd(grouped_backward, setup_context=save_for_grouped_backward)
