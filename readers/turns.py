"""
Turns of a conversation to messages: lists of turns, transcripts, "Human: … Assistant: …".
"""
import re

from common.documents import clean
from readers.account import Skip
from readers.calls import ARGUMENTS, DESCRIBED, are_objects, as_json, call_tools, from_json, list_tools
from readers.fields import ANSWER, CALLS, CONTENT, NO, NUMBER, QUESTION, REASONING, ROLES, SPEAKER, TOOLS, WEIGHT, YES
from readers.fields import as_list, as_text, brief, check_marks, check_media, filled, first, is_parts, note_rest, there

# Those who speak in a transcript are of one of these groups: "A:" between "Human:" and "Assistant:" is a part of what
# they say, and "B:" after "Q:" and "A:" a choice.
SPEAKERS = ("Human|User|用户|Assistant|Bot|GPT|AI|助手|MOSS|System|Tool|Observation|Function Response", "Q|A|B", "问|答",
            "Instruction|Response")
# Who might speak, too, but as whom? Their words are not to be learned as another's.
STRANGERS = ("Narrator|Observer|Customer|Agent|Client|Doctor|Patient|Teacher|Student|Interviewer|Moderator|"
             "Speaker ?\\w|Person ?\\w|旁白|客服|顾客|客户|医生|患者|病人|老师|学生|律师|主持人|嘉宾|记者|系统|工具|机器人")


def line_of(names):
    """Finds where one of the names begins to speak: "Human:" at the beginning of a line, "### Human:", "<|Human|>:"."""
    return re.compile(rf"(?:^|\n|###|<eo[ham]>)[ \t]*(?:<\|?|\[)?({names})(?:\|?>|\])?[ \t]*[:：]", re.IGNORECASE)


TRANSCRIPTS = [line_of(names) for names in SPEAKERS]
STRANGER = line_of(STRANGERS)
ANY_NAME = re.compile(r"^[ \t#<|]*((?:[A-Z][A-Za-z]{2,14} ?){1,2}|[\u4e00-\u9fff]{2,4})[ \t|>]*[:：]", re.MULTILINE)
SPOKEN = re.compile(r"\s*([^\s\d:：,，。][^\s:：,，。]{0,11})\s*[:：]\s*(.*)", re.DOTALL)  # a text that says who speaks
SYSTEM_FIRST = line_of("System")
NAME = re.compile(r"^\s*<\|\w+\|>\s*[:：]\s*")  # "<|Human|>: " before what is Human's anyway


def message(role, text, weight=1):
    """One message as render_chat() takes it. weight 0: an answer that is not learned."""
    made = {"role": role, "content": clean(text).strip()}
    if weight == 0:
        made["weight"] = 0
    return made


def said(text, role, notes, is_whole=False, has_answer=False):
    """Messages of a text: one, or those of a transcript, "Human: … Assistant: …".

    is_whole: the text is all there is, so it may end with an answer. has_answer: an answer stands beside it, so it may
    not: then it is a question that quotes a dialogue.
    """
    for number, transcript in enumerate(TRANSCRIPTS):
        # split() gives what comes before the first speaker, a speaker, the words, a speaker, the words, …
        before, *parts = transcript.split(text)
        system = SYSTEM_FIRST.match(before.lstrip())
        speakers = [speaker_of(name.lower()) for name in parts[::2]]
        first_speaker = next((speaker for speaker in speakers[:2] if speaker != "system"), None)
        if before.strip() and not system or first_speaker != "user" or "assistant" not in speakers:
            continue
        messages = [message(speaker, words) for speaker, words in zip(speakers, parts[1::2])]
        if not messages[-1]["content"]:
            messages.pop()  # "Assistant:" at the end asks for the answer
        ends_with_answer = messages[-1]["role"] == "assistant"
        if ends_with_answer and (has_answer or number and not is_whole):
            continue
        # "Q:" and the like stand in many texts: only if they strictly take turns is it a transcript
        if number and (set(speakers[::2]) != {"user"} or set(speakers[1::2]) != {"assistant"}):
            continue
        stranger = STRANGER.search(text)
        if stranger and number == 0:
            raise Skip("unknown speaker", f"who is {stranger[1]!r} in {brief(text)}? Known are {SPEAKERS[0]}. Or write "
                       "messages: [{role: …, content: …}]")
        if number == 0:
            notes.names = {name for name in ANY_NAME.findall(text) if not speaker_of(name.lower())}
        if system:
            messages.insert(0, message("system", before.lstrip()[system.end():]))
        return messages
    return [message(role, text)]


def read_turns(value, name, notes, role=None):
    """Messages of a field that holds turns: a list, a single turn, a transcript, or JSON text of these.

    A turn is {role|from, content|value|text}; {human: …, assistant: …}; a pair [question, answer]; or a text: texts in
    a list of turns are said in turns, the user begins. role: who says what does not tell.
    """
    if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
        return said(value, role or "user", notes, is_whole=role is None)
    if isinstance(value, dict) and value and all(str(key).startswith("turn_") for key in value):
        value = list(value.values())  # MOSS: {"turn_1": {"Human": …, "MOSS": …}, …}
    messages = []
    turns = as_list(value, name)
    spoken = [SPOKEN.match(turn) if isinstance(turn, str) else None for turn in turns]
    if len(turns) > 1 and all(spoken) and any(speaker_of(part[1]) or STRANGER.match(part[0]) for part in spoken):
        turns = [{"role": part[1], "content": part[2]} for part in spoken]  # ["User: …", "Bot: …"]
    for turn in turns:
        if isinstance(turn, dict):
            messages += read_turn(turn, name, notes, role)
        elif isinstance(turn, list) and any(isinstance(part, dict) for part in turn):
            if len(turns) > 1:
                raise Skip("several conversations", f"{name} holds {len(turns)} lists of turns: write one record for "
                           "each")
            messages += read_turns(turn, name, notes, role)
        elif isinstance(turn, list):
            is_spoken = len(turn) == 2 and all(isinstance(text, str) for text in turn)
            if is_spoken and turn[0].lower() in ROLES:
                # ["user", "…"]
                messages += read_turn({"role": turn[0], "content": turn[1]}, name, notes)
                continue
            if len(turn) > 2:
                raise Skip("wrong type", f"{name} holds {len(turn)} texts together, wanted pairs of question and "
                           "answer")
            messages += [message(speaker, as_text(text, name)) for speaker, text in zip(("user", "assistant"), turn)]
        elif name == "history":
            raise Skip("wrong type", "history holds texts, wanted pairs of question and answer, or messages")
        else:
            asked = messages and messages[-1]["role"] == "user"
            messages.append(message("assistant" if asked else "user", as_text(turn, name)))
    return messages


def read_turn(turn, name, notes, role=None):
    """Messages of a turn that is a dict, as a rule one."""
    speaker = turn.get("role") or turn.get("from") or role
    if speaker is None:
        # {human: …, assistant: …}
        speakers = {key: speaker_of(key) for key in filled(turn, turn) if speaker_of(key)}
        if speakers:
            note_rest(turn, speakers, notes, f"{name}.")
            # tables sort their columns by name
            in_order = sorted(speakers, key=lambda key: {"system": 0, "user": 1}.get(speakers[key], 2))
            return [message(speakers[key], NAME.sub("", as_text(turn[key], name))) for key in in_order]
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise Skip("unknown role", f"{speaker!r} in {name}, {there(turn)}; wanted one of {', '.join(ROLES)}")
    content = first(turn, CONTENT)
    if not {*CONTENT, *CALLS, *REASONING} & set(turn):
        raise Skip("wrong type", f"{name} holds a turn without words, {there(turn)}; wanted {', '.join(CONTENT)}")
    if speaker in CALLS:
        content = call_tools(content)
    elif role == "tool" and isinstance(content, (dict, list)):
        content = content if is_parts(content) else as_json(content)
    elif role == "assistant" and isinstance(turn.get("metadata"), str) and isinstance(from_json(content), dict):
        content = call_tools([{"name": turn["metadata"], "arguments": content}])  # GLM-4 names the tool beside
        turn = {key: turn[key] for key in turn if key != "metadata"}
    if isinstance(content, list) and len(content) > 1 and all(isinstance(part, str) for part in content):
        raise Skip("several texts", f"{name} holds a turn of {len(content)} texts: parts of one? Join them. Answers to "
                   "choose from? Write one record for each")
    if not notes.named:
        check_media(turn, "turn")
    # what a model thinks, says and calls are one text to learn, in this order; a tool may be called by any other name
    calls = [key for key in turn if key in CALLS or role == "assistant" and key not in {*CONTENT, *SPEAKER}
             and are_objects(turn[key], ARGUMENTS)]
    tools = [key for key in turn if key in TOOLS or role == "system" and are_objects(turn[key], DESCRIBED)]
    words = as_text(content, name)
    parts = [think(first(turn, REASONING), words), words]
    parts += [call_tools(turn[key]) for key in filled(turn, calls)]
    parts += [list_tools(turn[key]) for key in filled(turn, tools)]
    text = "\n".join(part for part in parts if part)
    # there are answers to learn and answers to read, nothing between
    weights = [key for key in WEIGHT if str(turn.get(key)).lower() in YES | NO]
    is_learned = all(str(turn[key]).lower() in YES for key in weights)
    for key in filled(turn, WEIGHT):
        if key not in weights and not (NUMBER.fullmatch(str(turn[key])) and float(turn[key]) > 0):
            raise Skip("unclear mark", f"{name}.{key} is {turn[key]!r}: write 1 (learned) or 0 (not learned)")
    used = {*SPEAKER, *calls, *tools, *weights, *filled(turn, CONTENT)[:1], *filled(turn, REASONING)[:1]}
    if role == "assistant":
        check_marks({f"{name}.{key}": turn[key] for key in turn if key not in used}, (), "weight")
    note_rest(turn, used, notes, f"{name}.")
    return [message(role, text, weight=int(is_learned))]


def speaker_of(key):
    """Who says what a field of this name holds, or stands behind it: "user", "assistant", … or None."""
    if key in QUESTION:
        return "user"
    if key in ANSWER:
        return "assistant"
    return ROLES.get(key.lower())


def turns_of(value):
    """The turns that a text stands for as JSON or as Python writes them, in a .csv; any other value as it is."""
    turns = from_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    is_list = isinstance(turns, list) and all(isinstance(turn, dict) and filled(turn, SPEAKER) for turn in turns)
    return turns if is_list and turns else value


def without_names(messages):
    """Messages without the "User:" and "Assistant:" that all of them begin with."""
    spoken = [SPOKEN.match(m["content"]) if m["role"] in ("user", "assistant") else True for m in messages]
    for m, match in zip(messages, spoken):
        if match is not True and not (match and match[2] and speaker_of(match[1]) == m["role"]):
            return messages
    return [m if match is True else {**m, "content": match[2]} for m, match in zip(messages, spoken)]


def think(reasoning, text):
    """What a model thinks before it answers with a text, as it writes it; "" where it does not, or the text says it."""
    thought = as_text(reasoning, "reasoning").strip()
    is_said = f"<think>{thought}" in re.sub(r"<think>\s+", "<think>", text)
    return f"<think>\n{thought}\n</think>\n" if thought and not is_said else ""
