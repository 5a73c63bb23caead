"""
render_chat() of tokenizer.py as text: the chat template that transformers, vLLM, SGLang and llama.cpp fill in.

What they are given may hold tools on offer, calls of tools, a content that is null or comes in parts: it becomes the
text that prepare.py makes of the same in a data set (readers/calls.py). What would be lost, an image say, is refused.
"""
from readers.calls import ARGUMENTS

# Values as JSON, written as json.dumps(…, ensure_ascii=False) does. Each program has a filter tojson of its own, and
# they differ: in spaces, in the order of keys, in how Chinese is spelled. Fields that are null are left out.
JSON = (
    r"{%- macro json(value) -%}"
    r"{%- if value is string -%}"
    r"{{- '\"' + value | replace('\\', '\\\\') | replace('\"', '\\\"') | replace('\n', '\\n') | replace('\r', '\\r')"
    r" | replace('\t', '\\t') + '\"' -}}"
    r"{%- elif value is mapping -%}"
    r"{{- '{' -}}"
    r"{%- for key, item in value.items() if item is not none -%}"
    r"{%- if not loop.first -%}{{- ', ' -}}{%- endif -%}{{- json(key) + ': ' + json(item) -}}"
    r"{%- endfor -%}"
    r"{{- '}' -}}"
    r"{%- elif value is none or value is boolean or value is number -%}"
    r"{{- value | tojson -}}"
    r"{%- else -%}"
    r"{{- '[' -}}"
    r"{%- for item in value -%}"
    r"{%- if not loop.first -%}{{- ', ' -}}{%- endif -%}{{- json(item) -}}"
    r"{%- endfor -%}"
    r"{{- ']' -}}"
    r"{%- endif -%}"
    r"{%- endmacro -%}")

# a content is a text, null, a list of parts that are texts, or what a tool gave back
WORDS = (
    r"{%- macro words(content) -%}"
    r"{%- if content is string -%}{{- content -}}"
    r"{%- elif content is mapping -%}{{- json(content) -}}"
    r"{%- elif content -%}"
    r"{%- for part in content -%}"
    r"{%- if part is string -%}{{- part -}}"
    r"{%- elif part['text'] is string -%}{{- part['text'] -}}"
    r"{%- else -%}{{- raise_exception('a content is a text, or a list of parts that are texts') -}}"
    r"{%- endif -%}"
    r"{%- endfor -%}"
    r"{%- endif -%}"
    r"{%- endmacro -%}")

# tools stand below the system message: one JSON a line
TOOLS = (
    r"{%- macro offer(tools) -%}"
    r"{{- '<tools>\n' -}}"
    r"{%- for tool in tools -%}{{- json(tool['function'] or tool) + '\n' -}}{%- endfor -%}"
    r"{{- '</tools>' -}}"
    r"{%- endmacro -%}")

# calls stand behind what the model says; their arguments are JSON already, or a value
CALLS = (
    r"{%- macro calls(tool_calls) -%}"
    r"{%- for tool_call in tool_calls -%}"
    r"{%- set call = tool_call['function'] or tool_call -%}"
    r"{%- set arguments = " + " or ".join(f"call['{name}']" for name in ARGUMENTS) + r" or {} -%}"
    r"{%- if not loop.first -%}{{- '\n' -}}{%- endif -%}"
    r"{{- '<tool_call>\n{\"name\": ' + json(call['name']) + ', \"arguments\": ' -}}"
    r"{{- (arguments if arguments is string else json(arguments)) + '}\n</tool_call>' -}}"
    r"{%- endfor -%}"
    r"{%- endmacro -%}")

TURN_END = r"{{- '\n' }}"
# what stands between the generation marks is what the assistant learns
CHAT_TEMPLATE = (
    JSON + WORDS + TOOLS + CALLS +
    r"{%- if tools and messages[0]['role'] not in ['system', 'developer'] %}"
    r"{{- '<|im_start|>system\n' + offer(tools) + '<|im_end|>\n' }}"
    r"{%- endif %}"
    r"{%- for message in messages %}"
    r"{%- set text = words(message['content']) %}"
    r"{{- '<|im_start|>' + ('system' if message['role'] == 'developer' else message['role']) + '\n' }}"
    r"{%- if message['role'] == 'assistant' %}"
    r"{% generation %}"
    r"{{- text }}"
    r"{%- if message['function_call'] %}{{- raise_exception('function_call: write it as tool_calls') }}{%- endif %}"
    r"{%- if message['tool_calls'] %}"
    r"{{- ('\n' if text else '') + calls(message['tool_calls']) }}"
    r"{%- endif %}"
    r"{{- '<|im_end|>' }}"
    r"{% endgeneration %}"
    r"{%- else %}"
    r"{{- text }}"
    r"{%- if tools and loop.first and message['role'] in ['system', 'developer'] %}"
    r"{{- ('\n\n' if text else '') + offer(tools) }}"
    r"{%- endif %}"
    r"{{- '<|im_end|>' }}"
    r"{%- endif %}"
    + TURN_END +
    r"{%- endfor %}"
    r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
# a reward model is read at the last <|im_end|>, and transformers reads the last token: nothing may follow
REWARD_TEMPLATE = CHAT_TEMPLATE.replace(TURN_END, r"{%- if not loop.last %}" + TURN_END + r"{%- endif %}")
# llama.cpp and ollama know no generation marks
PLAIN_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
