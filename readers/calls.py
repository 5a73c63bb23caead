"""
Tools, and calls of them, as the text that a model reads and writes.
"""
import ast
import json
import re

DESCRIBED = ("description", "parameters", "input_schema")
ARGUMENTS = ("arguments", "parameters", "args", "input", "params", "kwargs")
WRAPPER = {"id", "type", "index"}  # what stands beside a call and says nothing of it


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


def from_json(value):
    """The value that a text stands for as JSON, or as Python writes lists and objects into a .csv; or the text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        # between the objects of an array numpy writes a line break alone
        is_literal = re.match(r"\s*[\[{]", value)
        return ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "},{", value).strip()) if is_literal else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def without_nulls(value):
    """An object without its nulls: Arrow fills them in where the records of a file do not have the same fields."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def unwrapped(items):
    """What is in each {"type": "function", "function": {…}} of a list, of one object, or of their JSON text."""
    items = from_json(items) if isinstance(items, str) else without_nulls(items)
    for item in items if isinstance(items, list) else [items]:
        inside = item.get("function") if isinstance(item, dict) else None
        yield inside if isinstance(inside, dict) and set(item) <= {"function", *WRAPPER} else item


def are_objects(value, names):
    """Whether a value is an object with a name and one of these fields, or a list of such, also as JSON text: a call of
    a tool has arguments, a tool a description."""
    items = list(unwrapped(value)) if isinstance(value, (dict, list)) or str(value).lstrip()[:1] in ("[", "{") else []
    return bool(items) and all(isinstance(item, dict) and "name" in item and {*names} & {*item} for item in items)


def call_tools(calls):
    """Calls of tools as the text a model writes, each as <tool_call>, JSON, </tool_call> on three lines. A call that
    is not a name with arguments stays as it is."""
    lines = []
    for call in unwrapped(calls):
        if isinstance(call, dict) and "name" in call:
            rest = {name: value for name, value in call.items() if name not in WRAPPER}
            given = [name for name in ARGUMENTS if name in rest]
            if len(given) == 1 or len(rest) == 1:
                name = rest.pop("name")
                arguments = from_json(rest.pop(given[0])) if given else {}
                call = {"name": name, "arguments": {} if arguments == "" else arguments, **rest}
        lines += ["<tool_call>", call if isinstance(call, str) else as_json(call), "</tool_call>"]
    return "\n".join(lines)


def list_tools(tools):
    """The tools a model may call, as text for the system message: one JSON a line."""
    lines = [tool if isinstance(tool, str) else as_json(tool) for tool in unwrapped(tools)]
    return "\n".join(["<tools>", *lines, "</tools>"])
