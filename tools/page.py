"""
One HTML file with your own models inside: tokens and surprise, next token, attention, layers, stages side by side.

    python -m tools.page                          # the quickstart's runs, as many as are there
    python -m tools.page out/poems,out/poems-sft,out/poems-ppo,out/poems-dpo --reward_from=out/poems-reward

in:  runs of dense models with one vocabulary, split at commas
out: an HTML file that opens in a browser from a disk: no server, no network. tools/page.html is its template, and
     computes in JavaScript what model.py and tokenizer.py compute
"""
import base64
import json
import os
import zlib
from dataclasses import dataclass

# first, as it says how to install what is missing
from configurator import check, run

import numpy as np

from common.checkpoint import load_checkpoint, load_model, load_reward_model
from tools.vocabulary import (BYTE, NORMAL, UNUSED, USER_DEFINED, is_library, is_tiktoken, sentencepieces,
                              vocabulary)

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
PLACE = "<!-- the data of tools/page.py -->"
QUICKSTART = ("out/poems", "out/poems-sft", "out/poems-ppo", "out/poems-grpo", "out/poems-dpo")
LARGEST = 50e6                  # parameters: a browser would take a minute to open the file, and seconds a token


@dataclass
class Config:
    runs: str = ""               # folders, split at commas (the bare word); empty: those of the quickstart
    reward_from: str = ""        # a run of reward.py, which scores the answers; empty: none, or the quickstart's
    out: str = "out/page.html"   # the file to write


# ---------------------------------------------------------------------------- vocabulary

# Rust's \s, which tiktoken's patterns mean: JavaScript's own \s has U+FEFF besides, and lacks U+0085
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def javascript_pattern(pattern):
    """Return one of tokenizer.py's patterns as a regular expression of JavaScript with the flags "gu"."""
    # few browsers know (?i:…). Rust's "s" without case is also the long s
    endings = "(?:[sSſ]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
    pattern = pattern.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'" + endings)
    known = pattern.replace("(?:", "").replace("(?!", "")
    check("(?" not in known, f"the page cannot cut text with this vocabulary, whose rule is {pattern}")
    pattern = pattern.replace(r"[^\s", f"[^{SPACE}")        # inside a class
    return pattern.replace(r"\s", f"[{SPACE}]").replace(r"\S", f"[^{SPACE}]")


def describe_vocabulary(tok):
    """Return what the page needs to cut text as `tok` does; vocabularies that it cannot follow exactly are refused."""
    check(not is_library(tok), "the page cannot cut text with this vocabulary: it is a tokenizer.json that is neither "
          "sentencepiece nor of a family of tiktoken's that tokenizer.py knows")
    pieces = vocabulary(tok)
    words = list(tok.words.values())
    normal = [i for i, piece in enumerate(pieces) if piece.kind == NORMAL]
    user = [i for i, piece in enumerate(pieces) if piece.kind == USER_DEFINED and i not in words]
    in_bytes = [i for i, piece in enumerate(pieces) if piece.kind == BYTE]
    described = {
        "pieces": [piece.text for piece in pieces],
        "words": words,                                     # cut out of a text before all else
        "user": user,                                       # then these, which sentencepiece cuts out
        "bytes": in_bytes,
        "control": sorted(set(range(len(pieces))) - {*normal, *words, *user, *in_bytes}),  # no text becomes these
        "rank": None,                                       # None: pieces merge in the order of their ids
        "split": None,                                      # None: sentencepiece
        "nfc": bool(tok.settings.get("nfc")),
        "prefix": tok.dummy_prefix,
        "start": tok.start_ids,
        "eot": tok.eot_id,
        "im_start": tok.im_start_id,
        "im_end": tok.im_end_id,
        "pad": tok.pad_id}
    if is_tiktoken(tok):
        described["split"] = javascript_pattern(tok.rule)
        for i in normal:
            described["pieces"][i] = tok.pieces[i].decode("latin-1")    # a byte is the letter of its number
        return described
    unused = any(piece.kind == UNUSED for piece in sentencepieces(tok))
    check(not unused, "the page cannot cut text with this vocabulary: it holds pieces that it never uses")
    scores = [pieces[i].score for i in normal]
    falling = all(a > b for a, b in zip(scores, scores[1:]))
    if not falling:
        # of two pairs the one of the better score is merged first, of equals the left one
        place = {score: i for i, score in enumerate(sorted(set(scores), reverse=True))}
        described["rank"] = [place.get(piece.score, 0) for piece in pieces]
    return described


# ---------------------------------------------------------------------------- weights


def read_run(path, fingerprint):
    """Return (what the page says of a run, its weights by name, its Tokenizer or None for a reward model)."""
    checkpoint = load_checkpoint(path)
    config = checkpoint["model_config"]
    check(not config["n_experts"], f"{path} is a mixture of experts: the page computes dense models")
    tok = None
    if checkpoint["stage"] == "reward":
        model = load_reward_model(path, fingerprint=fingerprint)
    else:
        model, tok, _ = load_model(path)                    # adapters merged in
        check(fingerprint in (None, tok.fingerprint), f"{path} has another vocabulary than the first run")
        config = {**config, "max_seq_len": model.trained_len}  # the page goes no further than it has learned
    n_parameters = sum(p.numel() for p in model.parameters())
    check(n_parameters <= LARGEST, f"{path} has {n_parameters / 1e6:,.0f} M parameters: the page is for models of up "
          f"to {LARGEST / 1e6:.0f} M, which a browser can compute")
    meta = {
        "name": os.path.basename(os.path.normpath(path)),
        "stage": checkpoint["stage"],
        "config": config,
        "parameters": n_parameters}
    weights = {}
    for name, weight in model.state_dict().items():
        # the trunk of a reward model has the names of the model it came from
        weights[name.removeprefix("trunk.")] = weight.float().numpy()
    return meta, weights, tok


def is_matrix(weight):
    """Matrices become int8. Vectors, and the one row of a reward model's head, stay fp32."""
    return weight.ndim == 2 and len(weight) > 1


def row_scales(weights_of, base):
    """Return {name: (rows,) fp32} for the matrices of the run `base`: w ~ scale * q with q in -127 … 127.

    One scale serves all runs that have a matrix of the same name and shape, so that they differ by small integers.
    """
    scales = {}
    for name, weight in weights_of[base].items():
        if is_matrix(weight):
            most = np.abs(weight).max(1)
            for other in weights_of:
                if name in other and other[name].shape == weight.shape:
                    most = np.maximum(most, np.abs(other[name]).max(1))
            most[most == 0] = 1
            scales[name] = (most / 127).astype("<f4")
    return scales


def quantise(weight, scale):
    """Return the int8 matrix q whose scale[:, None] * q is nearest to the weight (rows, columns)."""
    return np.rint(weight / scale[:, None]).clip(-127, 127).astype(np.int8)


def pack(weights, base, base_scales):
    """Return ([name, rows, columns, whether it is a difference] a tensor, bytes).

    The bytes: vectors and the rows' scales of all tensors in fp32, then all matrices in int8, deflated together. A
    matrix that the run `base` has as well, and of the same shape, has its scales, and is stored as q - base's q, modulo
    256: after little training most of that is 0, and deflate makes it small.
    """
    tensors = []
    floats = []
    integers = []
    for name, weight in weights.items():
        if not is_matrix(weight):
            tensors.append([name, weight.size])
            floats.append(weight.astype("<f4"))
            continue
        of_base = base.get(name)
        is_difference = of_base is not None and of_base is not weight and of_base.shape == weight.shape
        if is_difference:
            q = quantise(weight, base_scales[name])
            integers.append(q - quantise(of_base, base_scales[name]))       # int8 wraps round
        else:
            scale = base_scales[name] if of_base is weight else row_scales([{name: weight}], 0)[name]
            floats.append(scale)
            integers.append(quantise(weight, scale))
        tensors.append([name, *weight.shape, is_difference])
    together = b"".join(array.tobytes() for array in floats + integers)
    return tensors, zlib.compress(together, 9)


# ---------------------------------------------------------------------------- page


def as_json(value):
    """Return JSON that may stand in a <script>: without a "<" that could end it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def script(kind, name, text):
    return f'<script type="{kind}" id="{name}">{text}</script>\n'


def build(paths, reward_from=""):
    """Return the page's HTML with the runs inside."""
    metas = []
    weights_of = []
    tok = None
    for path in paths + [reward_from] * bool(reward_from):
        meta, weights, own = read_run(path, tok.fingerprint if tok else None)
        is_judge = path == reward_from
        wanted = "one of reward.py" if is_judge else "a model that writes (a reward model goes to --reward_from)"
        check((own is None) == is_judge, f"{path} is a run of {meta['stage']}.py, wanted {wanted}")
        tok = tok or own
        metas.append(meta)
        weights_of.append(weights)
    # the later stages began from the SFT run: all others are stored as differences from it
    stages = [meta["stage"] for meta in metas]
    base = stages.index("sft") if "sft" in stages else 0
    scales = row_scales(weights_of, base)
    blocks = []
    for number, (meta, weights) in enumerate(zip(metas, weights_of)):
        meta["tensors"], packed = pack(weights, weights_of[base], scales)
        blocks.append(script("text/plain", f"weights-{number}", base64.b64encode(packed).decode()))
    about = {"runs": metas, "base": base, "vocabulary": describe_vocabulary(tok)}
    data = script("application/json", "about-runs", as_json(about)) + "".join(blocks)
    with open(TEMPLATE, encoding="utf-8") as f:
        html = f.read()
    assert html.count(PLACE) == 1, f"{TEMPLATE} must say once where the data goes"
    return html.replace(PLACE, data)


def choose_runs(cfg):
    """Return (folders of the runs, folder of the reward model or "")."""
    paths = [path for path in cfg.runs.split(",") if path]
    reward_from = cfg.reward_from
    if not paths:
        paths = [path for path in QUICKSTART if os.path.isdir(path)]
        check(paths, "there is no run of the quickstart: bash runs/quickstart.sh, or name your own: "
              "python -m tools.page out/a,out/b --reward_from=out/c")
        if not reward_from and os.path.isdir("out/poems-reward"):
            reward_from = "out/poems-reward"
    missing = [path for path in paths + [reward_from] if path and not os.path.exists(path)]
    check(not missing, f"no run at {', '.join(missing)}")
    return paths, reward_from


def main(cfg):
    paths, reward_from = choose_runs(cfg)
    html = build(paths, reward_from)
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    with open(cfg.out, "w", encoding="utf-8", newline="\n") as f:
        f.write(html)
    size = os.path.getsize(cfg.out) / 1e6
    print(f"{cfg.out}: {len(paths)} models, {size:.1f} MB. Open it in a browser; it needs no network")


if __name__ == "__main__":
    run(main, Config, positional="runs")
