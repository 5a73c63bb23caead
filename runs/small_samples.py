"""
Small files in the formats of MiniMind's, made of a file of poems, a poem a line: for DRY=1 bash runs/small.sh.

    python runs/small_samples.py learn/poems.txt data/raw/small-dry
"""
import json
import os
import re
import sys


def write(path, records):
    with open(path, "w", encoding="utf-8") as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(poems, folder):
    os.makedirs(folder, exist_ok=True)
    with open(poems, encoding="utf-8") as f:
        texts = [line.strip() for line in f if line.strip()]
    couplets = []
    for text in texts:
        lines = re.findall("[^，。？！]+", text)
        couplets += zip(lines[0::2], lines[1::2])
    talks = []
    pairs = []
    for i, (first, second) in enumerate(couplets):
        question = {"role": "user", "content": f"“{first}”的下一句是什么？"}
        answer = {"role": "assistant", "content": f"{second}。"}
        other = {"role": "assistant", "content": f"{couplets[i - 7][1]}。"}
        talks.append({"conversations": [question, answer]})
        pairs.append({"chosen": [question, answer], "rejected": [question, other]})
    write(f"{folder}/pretrain.jsonl", [{"text": text} for text in texts])
    write(f"{folder}/sft.jsonl", talks)
    write(f"{folder}/dpo.jsonl", pairs)
    write(f"{folder}/rl.jsonl", talks)
    print(f"{folder}: {len(texts)} poems, {len(couplets)} questions and answers")


if __name__ == "__main__":
    main(*sys.argv[1:])
