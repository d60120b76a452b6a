#!/usr/bin/env python3
"""Writes tests/data/templates: a tiny byte-level BPE tokenizer, and for several chat templates what transformers renders
and encodes, with the loss mask that specforge must find.

    python scripts/golden/chat_templates.py [FOLDER]         (transformers 5.8.1, jinja2 3.1.6, tokenizers 0.22.2)

The mask is found here in another way than in specforge: each template's turns are located by the strings that open and
close them, the text is cut there, the pieces are encoded one by one, and the pieces' ids must add up to the whole's.
"""

import json
import pathlib
import sys

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? The capital of France is Paris.",
    "system user assistant tool You are a helpful assistant. Please write a short story about the sea and the wind.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n", '{"name": "get_weather", "arguments": {"city": "Paris"}}',
    "Once upon a time there was a little girl who loved to play in the sun. She would often go to the beach.",
] * 4

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)

# Rewrites history as Qwen3 does: thoughts before the last question are dropped.
THINKING = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- set date = strftime_now("%d %b %Y") if strftime_now is defined and false else "26 Jul 2024" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content']|trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

# Rewrites history and says itself what is generated.
MARKED = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
{{ '<|im_start|>assistant\\n' }}
        {%- generation %}
            {%- if loop.last %}{{ '<think>\\n' ~ (message.reasoning_content or '') ~ '\\n</think>\\n' }}{% endif %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "It's the <weather> & \"more\" of a city: é 你",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                           "required": ["city"], "ratio": 0.5, "tiny": 1e-7, "flag": True, "nothing": None, "empty": {}},
        },
    }
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SINGLE = [user("What is the capital of France?"), assistant("The capital of France is Paris.")]
SYSTEM = [{"role": "system", "content": "You are a helpful assistant. é"}, *SINGLE]
LONG = [
    user("  Write\ta story\n\n"), assistant("\n Once upon a time 12345 … 你好 😀 café\r\n\n"),
    user("naïve <b>&'\"</b> ½"), assistant("def f():\n\n\n    return 1  "), user("?"), assistant("!"),
]
THOUGHTS = [
    user("add 1 and 2"), assistant("It is 3.", reasoning_content="one and two"),
    user("and 3?"), assistant("<think>\nthree more\n</think>\n\nIt is 6."), user("thanks"), assistant("Bye."),
]
CALLS = [
    user("Weather in Paris?"),
    assistant("Let me look.", tool_calls=[{"type": "function", "function": {
        "name": "get_weather", "arguments": {"city": "Paris é", "days": 2}}}]),
    {"role": "tool", "content": "{\"sunny\": true}"},
    assistant("It is sunny in Paris."),
]


def case(messages, tools=None):
    return {"messages": messages, "tools": tools}


def between(opening, closing):
    """Turns by the strings around them; the closing one is trained."""

    def find(tokenizer, sample):
        text = render(tokenizer, sample)
        cuts, at = [], 0
        while (start := text.find(opening, at)) >= 0:
            start += len(opening)
            at = text.index(closing, start) + len(closing)
            cuts.append((start, at))
        return [document(tokenizer, text, cuts)]

    return find


def turn_by_turn(opening, closing):
    """One document for each assistant turn, the last of it trained."""

    def find(tokenizer, sample):
        documents = []
        for index, message in enumerate(sample["messages"]):
            if message["role"] == "assistant":
                text = render(tokenizer, {**sample, "messages": sample["messages"][: index + 1]})
                start = text.rindex(opening) + len(opening)
                documents.append(document(tokenizer, text, [(start, text.index(closing, start) + len(closing))]))
        return documents

    return find


def by_transformers(tokenizer, sample):
    encoded = tokenizer.apply_chat_template(
        sample["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
    return [{"text": render(tokenizer, sample), "ids": encoded["input_ids"], "mask": encoded["assistant_masks"]}]


def render(tokenizer, sample, prompt=False):
    return tokenizer.apply_chat_template(
        sample["messages"], tools=sample["tools"], tokenize=False, add_generation_prompt=prompt)


def document(tokenizer, text, cuts):
    def encode(part):
        return tokenizer(part, add_special_tokens=False)["input_ids"] if part else []

    ids, mask, at = [], [], 0
    for start, end in cuts:
        for piece, flag in ((text[at:start], 0), (text[start:end], 1)):
            new = encode(piece)
            ids += new
            mask += [flag] * len(new)
        at = end
    rest = encode(text[at:])
    ids, mask = ids + rest, mask + [0] * len(rest)
    assert ids == encode(text), f"the cuts change the tokens of {text!r}"
    return {"text": text, "ids": ids, "mask": mask}


CHATML_TURN = ("<|im_start|>assistant\n", "<|im_end|>")
TEMPLATES = {
    "chatml": (CHATML, between(*CHATML_TURN), [case(SINGLE), case(SYSTEM), case(LONG)]),
    "thinking": (THINKING, turn_by_turn(*CHATML_TURN), [case(THOUGHTS), case(LONG)]),
    "thinking_tools": (THINKING, between("<|im_start|>assistant\n", "<|im_end|>"), [case(CALLS[:2], TOOLS)]),
    "headers": (HEADERS, between("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
                [case(SINGLE), case(SYSTEM), case(LONG), case(CALLS, TOOLS)]),
    "instruct": (INSTRUCT, between("[/INST]", "</s>"), [case(SINGLE), case(LONG)]),
    "marked": (MARKED, by_transformers, [case(THOUGHTS), case(LONG)]),
}


def tiny_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    # Trims offsets, as the tokenizers of GPT-2's family do.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    return tokenizer


def golden(name, fast, tokenizer_folder):
    template, find, samples = TEMPLATES[name]
    fast.chat_template = template
    cases = []
    for sample in samples:
        cases.append({**sample, "text": render(fast, sample), "prompt": render(fast, sample, prompt=True),
                      "documents": find(fast, sample)})
    return {"tokenizer": tokenizer_folder, "template": template, "cases": cases}


def main():
    here = pathlib.Path(__file__).resolve()
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here.parents[2] / "tests" / "data" / "templates"
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer" / "tokenizer.json"
    tiny_tokenizer().save(str(path), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>",
              "pad_token": {"content": "<|endoftext|>"}, "chat_template": CHATML}
    write(folder / "tokenizer" / "tokenizer_config.json", config)
    for name in TEMPLATES:
        # The instruct template closes turns with eos_token.
        fast = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", pad_token="<|endoftext|>",
                                       eos_token="</s>" if name == "instruct" else "<|im_end|>")
        data = golden(name, fast, "tokenizer")
        data["eos_token"] = fast.eos_token
        write(folder / f"{name}.json", data)


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
