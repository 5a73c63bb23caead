"""
Let a trained model speak: continue a text, or chat.

    python sample.py --start="床前明月光"
    python sample.py --start=FILE:prompt.txt --num_samples=5 --temperature=0.8 --top_p=0.9
    python sample.py --prompts=lines.txt > answers.txt       # one prompt a line, generated in batches
    python sample.py --chat=True             # /clear  /system TEXT  /save FILE  /exit; Ctrl-C stops an answer

in: out/<run>/ckpt.pt and tokenizer.model. Samples go to stdout, everything else to stderr.
"""
import json
import sys
from dataclasses import dataclass

from tqdm import tqdm

from common import load_model, newest_run, start
from configurator import load_config
from tokenizer import StreamDecoder, render_chat


@dataclass
class Config:
    out_dir: str = ""                # the run's folder; empty: the newest under out/
    # what to say
    start: str = ""                  # text to continue, or FILE:path for a file's whole text
    prompts: str = ""                # a file: one prompt a line; .jsonl: {"prompt": …} in, with "response" out
    chat: bool = False               # talk turn by turn; with start or prompts: answer those instead of continuing them
    system: str = ""                 # chat: a system message to begin with
    # how to say it
    num_samples: int = 1             # of each prompt
    batch_size: int = 64             # prompts at once
    max_new_tokens: int = 200
    temperature: float = 0.8         # 0: always the likeliest token
    top_k: int = 0                   # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 1234
    # machine
    device: str = "auto"


def sampling(cfg):
    """The settings that generate() takes, as a dict."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: getattr(cfg, name) for name in names}


def streamer(tokenizer, stop_ids, prompt=()):
    """Return (on_token, finish): on_token prints row 0 as it grows, whole characters only, and leaves out stop tokens.
    prompt: the ids that are continued, where the row does not begin a text of its own."""
    decoder = StreamDecoder(tokenizer)
    for i in prompt:
        decoder.push(i)

    def on_token(step, ids):
        if ids[0] is not None and ids[0] not in stop_ids:
            print(decoder.push(ids[0]), end="", flush=True)

    def finish():
        print(decoder.flush(), flush=True)

    return on_token, finish


def read_prompts(cfg):
    """Return the texts to continue: of --start, FILE:path, or a file of lines or of {"prompt": …} records."""
    try:
        if cfg.prompts:
            with open(cfg.prompts, encoding="utf-8") as f:
                lines = [line.rstrip("\n") for line in f if line.strip()]
            if not lines:
                raise ValueError(f"{cfg.prompts} is empty")
            return [json.loads(line)["prompt"] for line in lines] if cfg.prompts.endswith(".jsonl") else lines
        if cfg.start.startswith("FILE:"):
            with open(cfg.start[5:], encoding="utf-8") as f:
                return [f.read()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: cannot read prompts: {error!r}") from None
    return [cfg.start]


def complete(model, tokenizer, cfg, env):
    """Continue every prompt (with --chat: answer it) and print what comes; a single one is streamed."""
    texts = [text for text in read_prompts(cfg) for _ in range(cfg.num_samples)]
    room, prompts = model.config.max_seq_len, []
    for text in texts:
        if cfg.chat:
            system = [{"role": "system", "content": cfg.system}] if cfg.system else []
            ids, _ = render_chat(tokenizer, system + [{"role": "user", "content": text}], add_generation_prompt=True)
        else:  # the end-of-text token stands before every document, so it opens ours too
            ids = [tokenizer.eot_id] + tokenizer.encode(text)
        if len(ids) >= room:
            print(f"note: a prompt has {len(ids)} tokens; its last {room // 2} are kept", file=sys.stderr)
            ids = ids[-(room // 2):]
        prompts.append(ids)
    new_tokens = min(cfg.max_new_tokens, room - max(map(len, prompts)))
    if new_tokens < cfg.max_new_tokens:
        print(f"note: max_new_tokens={new_tokens}, since the model sees {room} tokens at most", file=sys.stderr)
    stop_ids = [tokenizer.eot_id, tokenizer.im_end_id]
    if len(prompts) == 1 and not cfg.prompts.endswith(".jsonl"):
        on_token, finish = streamer(tokenizer, stop_ids, () if cfg.chat else prompts[0])
        print("" if cfg.chat else texts[0], end="", flush=True)
        with env.autocast():
            model.generate(prompts, new_tokens, stop_ids=stop_ids, seed=cfg.seed, on_token=on_token, **sampling(cfg))
        finish()
        return
    batches = range(0, len(prompts), cfg.batch_size)
    for i in tqdm(batches, unit="batch", disable=len(batches) < 4 or not sys.stderr.isatty()):
        with env.autocast():
            rows = model.generate(prompts[i:i + cfg.batch_size], new_tokens, stop_ids=stop_ids, pad_id=tokenizer.pad_id,
                                  seed=cfg.seed + i, **sampling(cfg))
        for text, row in zip(texts[i:i + cfg.batch_size], rows):
            row = [t for t in row if t not in stop_ids]
            # a continuation keeps the space before its first word
            answer = tokenizer.decode(row) if cfg.chat else tokenizer.decode_bytes(row).decode("utf-8", "replace")
            if cfg.prompts.endswith(".jsonl"):
                print(json.dumps({"prompt": text, "response": answer}, ensure_ascii=False))
            else:
                print(f"{'' if cfg.chat else text}{answer}\n", flush=True)


def fit(messages, tokenizer, room):
    """Drop the oldest turns (a question with its answers) until the rendered chat has at most `room` tokens.

    Return (messages, ids, number of turns dropped). The system message and the newest question always stay.
    """
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns, dropped = messages[len(system):], 0
    while True:
        ids, _ = render_chat(tokenizer, system + turns, add_generation_prompt=True)
        later = [i for i, m in enumerate(turns) if m["role"] == "user" and i > 0]
        if len(ids) <= room or not later:
            return system + turns, ids, dropped
        turns, dropped = turns[later[0]:], dropped + 1


def chat(model, tokenizer, cfg, env):
    """Read questions from the terminal (or a pipe) and stream the answers."""
    history = [{"role": "system", "content": cfg.system}] if cfg.system else []
    new_tokens = min(cfg.max_new_tokens, model.config.max_seq_len // 2)
    room, stop_ids, turn = model.config.max_seq_len - new_tokens, [tokenizer.im_end_id, tokenizer.eot_id], 0
    print("/clear forgets, /system TEXT sets the role, /save FILE keeps the chat, /exit leaves", file=sys.stderr)
    while True:
        try:
            print("你: ", end="", file=sys.stderr, flush=True)
            text = input()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        command, _, rest = text.strip().partition(" ")
        if command in ("/exit", "/quit"):
            return
        if not text.strip():
            continue
        if command == "/clear":
            history = [m for m in history if m["role"] == "system"]
            print("(history cleared)", file=sys.stderr)
        elif command == "/system":
            history = [{"role": "system", "content": rest}] if rest else []
            print("(new chat with this system message)" if rest else "(no system message)", file=sys.stderr)
        elif command == "/save":
            path = rest or "chat.jsonl"
            try:
                with open(path, "a", encoding="utf-8") as f:
                    f.write(json.dumps({"messages": history}, ensure_ascii=False) + "\n")
                print(f"(appended to {path})", file=sys.stderr)
            except OSError as error:
                print(f"(not saved: {error})", file=sys.stderr)
        elif command.startswith("/"):
            print(f"(unknown command {command}: /clear /system /save /exit)", file=sys.stderr)
        else:
            kept, ids, dropped = fit(history + [{"role": "user", "content": text}], tokenizer, room)
            if len(ids) > room:
                print(f"(too long: {len(ids)} tokens, {room} fit; say it shorter)", file=sys.stderr)
                continue
            if dropped:
                print(f"({dropped} oldest turn{'s' * (dropped > 1)} forgotten: the model sees "
                      f"{model.config.max_seq_len} tokens)", file=sys.stderr)
            history = kept
            answer, turn = [], turn + 1
            on_token, finish = streamer(tokenizer, stop_ids)

            def keep(step, ids):
                answer.extend(i for i in ids if i not in stop_ids)
                on_token(step, ids)

            print("明月: ", end="", file=sys.stderr, flush=True)
            try:
                with env.autocast():
                    model.generate([ids], new_tokens, stop_ids=stop_ids, seed=cfg.seed + turn, on_token=keep,
                                   **sampling(cfg))
            except KeyboardInterrupt:
                print(" (stopped)", end="", file=sys.stderr)
            finish()
            history.append({"role": "assistant", "content": tokenizer.decode(answer)})


def main(cfg):
    env = start(cfg, announce=False)
    folder = cfg.out_dir or newest_run(stages=("sft", "ppo", "dpo") if cfg.chat else ("pretrain", "sft", "ppo", "dpo"))
    model, tokenizer, checkpoint = load_model(folder, env.device)
    print(f"{folder}: {checkpoint['stage']}, step {checkpoint['step']}, {model.count()[0]:,} parameters",
          file=sys.stderr)
    if cfg.chat and not (cfg.start or cfg.prompts):
        chat(model, tokenizer, cfg, env)
    else:
        complete(model, tokenizer, cfg, env)


if __name__ == "__main__":
    main(load_config(Config))
