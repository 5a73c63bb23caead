"""
Somebody else's reward model as the reward: any sequence classifier of transformers that gives one number, from a folder.

    pip install transformers
    CLASSIFIER=../reward-model-deberta-v3-large-v2 python grpo.py --reward=recipes/classifier.py:score
    python -m tools.export out/poems-reward --to=hf --out=exported         # ours can be asked this way, too
    CLASSIFIER=exported python grpo.py config/poems_grpo.py --reward=recipes/classifier.py:score

It reads texts, so its vocabulary may be another one. A model with a chat template reads the conversation laid out by it,
others (OpenAssistant's deberta) read question and answer as a pair. For an answer that was cut it sees no difference:
keep --no_eos_penalty above 0.
"""
import functools
import os
import re

import torch

from configurator import check

ROWS = 16  # answers that it reads at once


@functools.cache
def load(folder):
    """Return (tokenizer, model) of a local folder; nothing is fetched from anywhere."""
    import transformers  # seconds to import
    check(os.path.isdir(folder), f"CLASSIFIER={folder!r} is no folder: give the one that holds the classifier's config.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    labels = model.config.num_labels
    check(labels == 1, f"{folder} tells {labels} classes apart: a reward is one number")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tokenizer, model.float().eval().to(device)


def messages_of(prompt):
    """The messages of a prompt as text, "user\\n…\\nassistant\\n": a role alone in its line begins each of them."""
    parts = re.split(r"(?:^|\n)(system|user|assistant)\n", prompt)
    turns = list(zip(parts[1::2], parts[2::2]))
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()  # the turn that the answer is
    return [{"role": role, "content": content} for role, content in turns]


def lay_out(tokenizer, prompts, answers):
    """Return a batch of the classifier's ids, padded."""
    if not tokenizer.chat_template:
        questions = [messages_of(prompt)[-1]["content"] for prompt in prompts]
        return tokenizer(questions, answers, padding=True, truncation=True, return_tensors="pt")
    texts = []
    for prompt, answer in zip(prompts, answers):
        messages = messages_of(prompt) + [{"role": "assistant", "content": answer}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    # the template has written what begins and ends a text
    return tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")


@torch.no_grad()
def score(prompts, answers):
    """The classifier's number for each answer."""
    tokenizer, model = load(os.environ.get("CLASSIFIER", ""))
    bias = getattr(model.config, "score_bias", 0.0)  # of our own models; transformers' head has none
    scores = []
    for first in range(0, len(answers), ROWS):
        batch = lay_out(tokenizer, prompts[first:first + ROWS], answers[first:first + ROWS])
        logits = model(**batch.to(model.device)).logits                            # (rows, 1)
        scores += (logits[:, 0] + bias).tolist()
    return scores
