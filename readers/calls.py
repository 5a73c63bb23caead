"""
Tools, and calls of them, as the text that a model reads and writes.
"""
import json


def as_json(value):
    return json.dumps(value, ensure_ascii=False)


def from_json(value):
    """The value that a text stands for as JSON, or the text itself."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def call_tools(calls):
    """Calls of tools as the text a model writes, each as <tool_call>, JSON, </tool_call> on three lines."""
    calls = from_json(calls)
    lines = []
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, dict):
            call = call.get("function", call)
        if isinstance(call, dict) and "name" in call:
            call = as_json({"name": call["name"], "arguments": from_json(call.get("arguments", {}))})
        lines += ["<tool_call>", call if isinstance(call, str) else as_json(call), "</tool_call>"]
    return "\n".join(lines)


def list_tools(tools):
    """The tools a model may call, as text for the system message: one JSON a line."""
    tools = from_json(tools)
    lines = []
    for tool in tools if isinstance(tools, list) else [tools]:
        if isinstance(tool, dict):
            tool = tool.get("function", tool)  # {"type": "function", "function": …} says no more than what is in it
        lines.append(tool if isinstance(tool, str) else as_json(tool))
    return "\n".join(["<tools>", *lines, "</tools>"])
