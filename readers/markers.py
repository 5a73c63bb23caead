"""
Control tokens of other tokenizers that stand in a text, letter by letter: <|im_end|>, </s>, [INST]. A text never makes
a control token here, so a model would learn to spell them. They are counted, shown by --show, and cut at with
--markers=cut.
"""
import collections
import re

MARKERS = re.compile(
    r"<\|/?[^|<>\n]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<\[[^\[\]<>\n]{1,40}\]>|\[\|\w{1,20}\|\]|</?s>|<</?SYS>>|"
    r"<0x[0-9A-F]{2}>|</?(?i:(?:start|begin|end)_?of_?\w{1,20})>|<\w{1,12}:[be]os>|<(?i:image|video|audio)>|"
    r"<fim_\w{1,10}>|\[e~\[|\]~b\]|"
    r"<(?i:n|sop|bos|eos|eot|eod|eop|eoa|eoh|eom|eoc|eor|sos|pad|unk|sep|cls|mask)(?:_TOKEN)?>|"
    r"[<\[](?i:(?:extra_id|(?:tokens?_)?unused|reserved|special|ctrl)_?(?:token_)?)\d+[>\]]|"
    r"\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|SYSTEM_PROMPT)\]|"
    r"\[(?:[gs]MASK|MASK|CLS|SEP|PAD|UNK|BOS|EOS|EOT|EOD|SOS|eos|eot|eod)\]|"
    r"\{\{[A-Z_]+\}\}")  # the last: a name that is to be filled in


def find_markers(content):
    """Counter of the markers in what convert() returns."""
    found = collections.Counter()
    for text in texts_of(content):
        found.update(set(MARKERS.findall(text)))
    return found


def cut_at_markers(content, counts):
    """Yield what is left of a content: the texts between the markers; or a conversation, each message up to the first
    marker behind its words."""
    if isinstance(content, str):
        yield from filter(None, map(str.strip, MARKERS.split(content)))
        return

    def cut(text):
        parts = [part.strip() for part in MARKERS.split(text) if part.strip()]
        counts["cut", "words behind a marker"] += len(parts) > 1
        return parts[0] if parts else ""

    messages = [{**m, "content": cut(m["content"])} for m in messages_of(content)]
    answers = [cut(answer) for answer in answers_of(content)]
    if all(m["content"] or m["role"] == "tool" for m in messages) and all(answers):
        yield {"prompt": messages, "answers": answers} if answers else messages


def texts_of(content):
    """The text, or those of all messages and answers, in what convert() returns."""
    if isinstance(content, str):
        return [content]
    return [m["content"] for m in messages_of(content)] + answers_of(content)


def messages_of(content):
    return content["prompt"] if isinstance(content, dict) else content


def answers_of(content):
    return content["answers"] if isinstance(content, dict) else []
