"""
Generation: prompts of different lengths in, new tokens out, with a KV cache.

    generate(model, [[ids], ...], 100, temperature=0.8, top_p=0.95, stop_ids=[eot])

What is generated for a row depends on its prompt and on seed + its number, never on the rest of the batch.
"""
import math

import torch

from common.decode_graph import can_record, decode
from model import KVCache, matmul_dtype


@torch.no_grad()  # not inference_mode: there, autocast would cast every weight anew for every token
def generate(
        model,
        prompts,
        max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        stop_ids=(),
        pad_id=0,
        seed=None,
        on_token=None):
    """Continue each prompt (a list of ids) by up to max_new_tokens; return the new ids, a list a row.

    A row ends with (and includes) the first of stop_ids. temperature 0 is greedy. Filters apply in the order
    repetition penalty, temperature, top-k, top-p, min-p. Row i draws from its own generator, seeded seed + i (or
    seed[i]), so what it says does not depend on the rest of the batch. Equal prompts are read once. on_token(ids) sees
    each step's tokens, a list with one id a row (None in rows that have ended).
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("generate needs at least one prompt, and one token in each; start an empty one with EOS")
    if temperature < 1e-5:
        temperature = 0  # greedy: dividing by next to nothing would overflow
    longest = max(len(p) for p in prompts)
    room = model.config.max_seq_len
    if longest + max_new_tokens > room:
        raise ValueError(f"prompt of {longest} tokens + max_new_tokens={max_new_tokens} exceed the model's "
                         f"max_seq_len={room}")
    device = model.head_weight.device
    # equal prompts go through the model once: number the different ones, and note the number that each row has
    different = {}
    numbers = [different.setdefault(tuple(p), len(different)) for p in prompts]
    prompt_of = torch.tensor(numbers, device=device)                               # (rows)
    # padding goes to the left, so that all prompts end in the same column and new tokens follow directly
    pad = torch.tensor([longest - len(p) for p in different], device=device)
    padded = [[pad_id] * (longest - len(p)) + list(p) for p in different]
    ids = torch.tensor(padded, device=device)                                      # (prompts, longest)
    dtype = matmul_dtype(model.head_weight)
    columns = 16 * math.ceil((longest + max_new_tokens) / 16)  # masked attention on GPUs wants whole sixteens
    cache = KVCache(model.config, pad, columns, dtype)
    new = [[] for _ in prompts]
    uniforms = draw_uniforms(seed, len(new), max_new_tokens).to(device)            # (rows, steps)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)

    # read the prompts; then every row gets the keys and values of its own prompt
    hidden = model(ids, cache=cache)[:, -1]                                        # (prompts, C)
    alive = torch.arange(len(new), device=device)  # numbers of the rows that have not ended
    hidden = hidden[prompt_of]                                                     # (rows, C)
    if len(different) < len(prompts):
        cache.select(prompt_of)
    seen = torch.zeros(len(new), model.config.vocab_size, dtype=torch.bool, device=device)
    if repetition_penalty != 1.0:
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True

    def choose(hidden, seen, uniforms):
        """logits → filtered → one id a row."""
        logits = model.logits(hidden)                                              # (rows, V)
        logits = filter_logits(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty)
        return pick(logits, uniforms, temperature)                                 # (rows)

    if can_record(model):
        return decode(model, hidden, cache, choose, seen, uniforms, stops, on_token)
    for step in range(max_new_tokens):
        ids = choose(hidden, seen[alive], uniforms[alive, step])                   # (alive)
        shown = [None] * len(new)
        for row, token in zip(alive.tolist(), ids.tolist()):
            new[row].append(token)
            shown[row] = token
        if on_token:
            on_token(shown)
        if repetition_penalty != 1.0:
            seen[alive, ids] = True
        # take rows that have ended out of the batch and out of the cache
        ended = torch.isin(ids, stops)
        going = (~ended).nonzero().squeeze(1)
        if len(going) == 0 or step == max_new_tokens - 1:
            break
        if len(going) < len(ids):
            alive = alive[going]
            ids = ids[going]
            cache.select(going)
        # one token a row through the model: its keys and values join the cache
        hidden = model(ids[:, None], cache=cache)[:, 0]                            # (alive, C)
    return new


def draw_uniforms(seed, rows, steps):
    """Return (rows, steps) numbers in [0, 1): a generator a row, on the CPU so that every device draws the same."""
    uniforms = torch.empty(rows, steps)
    generator = torch.Generator()
    for row in range(rows):
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed[row] if isinstance(seed, list) else seed + row)
        uniforms[row].uniform_(generator=generator)
    return uniforms


def filter_logits(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty):
    """Return logits (B, V) with -inf where a token is not allowed. seen (B, V): tokens already in the row."""
    if repetition_penalty != 1.0:
        # Keskar et al. 2019: divide what is positive, multiply what is negative
        lowered = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, lowered, logits)
    if temperature == 0:
        return logits
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        # keep the fewest tokens whose probabilities add up to top_p (Holtzman et al. 2020): from the least likely on,
        # drop tokens while the sum of what is dropped stays within 1 - top_p. The likeliest always stays
        ordered, index = logits.sort(descending=False)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, index, drop), -torch.inf)
    if min_p > 0:
        # keep tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024)
        smallest = logits.max(-1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return logits


def pick(logits, uniforms, temperature):
    """Pick one token per row of logits (B, V): the likeliest, or a random one, by inverting the cdf at uniforms (B)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = logits.softmax(-1)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # a rounded cdf does not end at exactly 1: draws are scaled to where it ends, and stay below that
    below_total = total.nextafter(torch.zeros_like(total))
    draw = torch.minimum(uniforms[:, None] * total, below_total)
    # the first token whose cdf exceeds the draw
    ids = torch.searchsorted(cdf, draw, right=True)                                # (B, 1)
    # A sum made in parallel is not quite monotone: where the search lands on a token of probability 0, take the
    # likeliest
    allowed = probs.gather(1, ids) > 0
    likeliest = probs.argmax(-1, keepdim=True)
    return torch.where(allowed, ids, likeliest).squeeze(1)
