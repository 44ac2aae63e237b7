"""Published chat templates, a family or a shape each, for the translation to Ollama's.

Data of the models they come with, as llama.cpp's tests/test-chat-template.cpp and models/templates and
Ollama's template/testdata have them, or typed in from their model cards; tool calls are cut out, and long
system messages cut short.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A chat template, its tokens and the family that it should be known as."""

    name: str
    template: str
    bos: str
    eos: str
    family: str | None


PUBLISHED = (
    Published(
        "Hermes",
        "{{bos_token}}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n"
        "' + message['content'] + '<|im_end|>' + '\n"
        "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
        "' }}{% endif %}",
        "<s>",
        "<|im_end|>",
        "ChatML",
    ),
    Published(
        "Qwen2",
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '"
        "<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n"
        "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
        "' + message['content'] + '<|im_end|>' + '\n"
        "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
        "' }}{% endif %}",
        "",
        "<|im_end|>",
        "ChatML",
    ),
    Published(
        "Qwen2.5",
        "    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
        "    {%- else %}\n"
        "        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpf"
        "ul assistant.<|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- for message in messages %}\n"
        '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
        '(message.role == "assistant" and not message.tool_calls) %}\n'
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n'"
        " }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n"
        "{%- endif %}",
        "",
        "<|im_end|>",
        "ChatML",
    ),
    Published(
        "Qwen3",
        "{%- if messages[0].role == 'system' %}\n"
        "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
        "{%- endif %}\n"
        "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n"
        "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        '    {%- if ns.multi_step_tool and message.role == "user" %}\n'
        "        {%- set ns.multi_step_tool = false %}\n"
        "        {%- set ns.last_query_index = index %}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- for message in messages %}\n"
        '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}\n'
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n'"
        " }}\n"
        '    {%- elif message.role == "assistant" %}\n'
        "        {%- set content = message.content %}\n"
        "        {%- set reasoning_content = '' %}\n"
        "        {%- if message.reasoning_content is defined and message.reasoning_content is not"
        " none %}\n"
        "            {%- set reasoning_content = message.reasoning_content %}\n"
        "        {%- elif '</think>' in message.content %}\n"
        "            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}\n"
        "            {%- set reasoning_content = message.content.split('</think>')[0].split('<thi"
        "nk>')[-1] %}\n"
        "        {%- endif %}\n"
        "        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}"
        "\n"
        "            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip("
        "'\\n') }}\n"
        "            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
        "        {%- else %}\n"
        "            {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
        "        {%- endif %}\n"
        "        {{- '<|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endif %}",
        "",
        "<|im_end|>",
        "ChatML",
    ),
    Published(
        "SmolLM2",
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '"
        "<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'"
        "] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assis"
        "tant\\n' }}{% endif %}",
        "<|im_start|>",
        "<|im_end|>",
        "ChatML",
    ),
    Published(
        "DBRX",
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set sys"
        "tem_message = messages[0]['content'] %}{% elif 'system' not in messages[0]['role'] %}{% "
        "set loop_messages = messages %}{% set system_message = 'You are DBRX.' %}{% else %}{% se"
        "t loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message i"
        "n loop_messages %}{% if loop.index0 == 0 %}{% if system_message != false %}{{ '<|im_star"
        "t|>system\n"
        "' + system_message | trim + '<|im_end|>\n"
        "'}}{% endif %}{{ '<|im_start|>' + message['role'] + '\n"
        "' + message['content'] + '<|im_end|>' }}{% else %}{{ '\n"
        "' + '<|im_start|>' + message['role'] + '\n"
        "' + message['content'] + '<|im_end|>' }}{% endif %}{% if (add_generation_prompt == true "
        "and loop.last) %}{{ '\n"
        "' + '<|im_start|>' + 'assistant' + '\n"
        "' }}{% endif %}{% endfor %}",
        "",
        "<|endoftext|>",
        "ChatML",
    ),
    Published(
        "ChatML, EOS at the end",
        "{% if messages[0]['role'] == 'user' or messages[0]['role'] == 'system' %}{{ bos_token }}"
        "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n"
        "' + message['content'] + '<|im_end|>' + '\n"
        "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
        "' }}{% elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}",
        "<s>",
        "</s>",
        "ChatML",
    ),
    Published(
        "Phi-4",
        "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system"
        "<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{"
        "{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|><|im_start|>assistant<|i"
        "m_sep|>'}}{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|im_end|>'"
        "}}{% endif %}{% endfor %}",
        "<|endoftext|>",
        "<|im_end|>",
        "Phi-4",
    ),
    Published(
        "Llama 2",
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set sys"
        "tem_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% se"
        "t system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['"
        "role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles mus"
        "t alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and "
        "system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\"
        "n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% "
        "if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' '  + content | trim + ' ' + eos_token }}{%"
        " endif %}{% endfor %}",
        "<s>",
        "</s>",
        "Llama 2",
    ),
    Published(
        "Vigogne 2",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1"
        ":] %}{% set system_message = messages[0]['content'] %}{% elif true == true and not '<<SY"
        "S>>' in messages[0]['content'] %}{% set loop_messages = messages %}{% set system_message"
        " = 'Vous êtes Vigogne, un assistant IA créé par Zaion Lab. Vous suivez extrêmement bien "
        "les instructions. Aidez autant que vous le pouvez.' %}{% else %}{% set loop_messages = m"
        "essages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{"
        "% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Convers"
        "ation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.i"
        "ndex0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message +"
        " '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %"
        "}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + content.strip() + ' [/INST]"
        "' }}{% elif message['role'] == 'system' %}{{ '<<SYS>>\\n' + content.strip() + '\\n<</SYS>>"
        "\\n\\n' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_t"
        "oken }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        "Llama 2",
    ),
    Published(
        "Llama 3",
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|"
        "start_header_id|>' + message['role'] + '<|end_header_id|>\n"
        "\n"
        "'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = "
        "bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n"
        "\n"
        "' }}{% endif %}",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "Llama 3",
    ),
    Published(
        "Llama 3, always asking",
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|"
        "start_header_id|>' + message['role'] + '<|end_header_id|>\n"
        "\n"
        "'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = "
        "bos_token + content %}{% endif %}{{ content }}{% endfor %}{{ '<|start_header_id|>assista"
        "nt<|end_header_id|>\n"
        "\n"
        "' }}",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "Llama 3",
    ),
    Published(
        "Llama 3.1",
        "{{- bos_token }}\n"
        "{%- if not date_string is defined %}\n"
        '    {%- set date_string = "26 Jul 2024" %}\n'
        "{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n"
        '    {%- set system_message = "" %}\n'
        "{%- endif %}\n"
        "\n"
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
        "{{- system_message }}\n"
        '{{- "<|eot_id|>" }}\n'
        "\n"
        "{%- for message in messages %}\n"
        "    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in m"
        "essage) %}\n"
        "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['"
        "content'] | trim + '<|eot_id|>' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
        "{%- endif %}",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "Llama 3.1",
    ),
    Published(
        "Llama 3.2",
        "{{- bos_token }}\n"
        "{%- if not date_string is defined %}\n"
        "    {%- if strftime_now is defined %}\n"
        '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
        "    {%- else %}\n"
        '        {%- set date_string = "26 Jul 2024" %}\n'
        "    {%- endif %}\n"
        "{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n"
        "{%- else %}\n"
        '    {%- set system_message = "" %}\n'
        "{%- endif %}\n"
        "\n"
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
        '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
        "{{- system_message }}\n"
        '{{- "<|eot_id|>" }}\n'
        "\n"
        "{%- for message in messages %}\n"
        "    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in m"
        "essage) %}\n"
        "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['"
        "content'] | trim + '<|eot_id|>' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
        "{%- endif %}",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "Llama 3.1",
    ),
    Published(
        "Mistral 0.2",
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.i"
        "ndex0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/u"
        "ser/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + messag"
        "e['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content"
        "'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supporte"
        "d!') }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        "Mistral v1",
    ),
    Published(
        "Mixtral",
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.i"
        "ndex0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/u"
        "ser/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + messag"
        "e['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content"
        "'] + eos_token + ' ' }}{% else %}{{ raise_exception('Only user and assistant roles are s"
        "upported!') }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        "Mistral v1",
    ),
    Published(
        "Mistral v1 with system",
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content'] %}\n"
        "    {%- set loop_messages = messages[1:] %}\n"
        "{%- else %}\n"
        "    {%- set loop_messages = messages %}\n"
        "{%- endif %}\n"
        "\n"
        "{{- bos_token }}\n"
        "{%- for message in loop_messages %}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
        "        {{- raise_exception('After the optional system message, conversation roles must "
        "alternate user/assistant/user/assistant/...') }}\n"
        "    {%- endif %}\n"
        "    {%- if message['role'] == 'user' %}\n"
        "        {%- if loop.first and system_message is defined %}\n"
        "            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }"
        "}\n"
        "        {%- else %}\n"
        "            {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n"
        "        {%- endif %}\n"
        "    {%- elif message['role'] == 'assistant' %}\n"
        "        {{- ' ' + message['content'] + eos_token}}\n"
        "    {%- else %}\n"
        "        {{- raise_exception('Only user and assistant roles are supported, with the excep"
        "tion of an initial optional system message!') }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n",
        "<s>",
        "</s>",
        "Mistral v1",
    ),
    Published(
        "Mistral Nemo",
        '{%- if messages[0]["role"] == "system" %}\n'
        '    {%- set system_message = messages[0]["content"] %}\n'
        "    {%- set loop_messages = messages[1:] %}\n"
        "{%- else %}\n"
        "    {%- set loop_messages = messages %}\n"
        "{%- endif %}\n"
        '{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}\n'
        "\n"
        "{{- bos_token }}\n"
        "{%- for message in loop_messages %}\n"
        '    {%- if message["role"] == "user" %}\n'
        "        {%- if loop.last and system_message is defined %}\n"
        '            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}\n'
        "        {%- else %}\n"
        '            {{- "[INST]" + message["content"] + "[/INST]" }}\n'
        "        {%- endif %}\n"
        '    {%- elif message["role"] == "assistant" %}\n'
        '        {{- message["content"] + eos_token}}\n'
        "    {%- else %}\n"
        '        {{- raise_exception("Only user and assistant roles are supported, with the excep'
        'tion of an initial optional system message!") }}\n'
        "    {%- endif %}\n"
        "{%- endfor %}",
        "<s>",
        "</s>",
        "Mistral v3",
    ),
    Published(
        "Mistral 0.3",
        '{%- if messages[0]["role"] == "system" %}\n'
        '    {%- set system_message = messages[0]["content"] %}\n'
        "    {%- set loop_messages = messages[1:] %}\n"
        "{%- else %}\n"
        "    {%- set loop_messages = messages %}\n"
        "{%- endif %}\n"
        '{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}\n'
        "\n"
        "{{- bos_token }}\n"
        "{%- for message in loop_messages %}\n"
        '    {%- if message["role"] == "user" %}\n'
        "        {%- if loop.last and system_message is defined %}\n"
        '            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST] " }}'
        "\n"
        "        {%- else %}\n"
        '            {{- "[INST] " + message["content"] + "[/INST] " }}\n'
        "        {%- endif %}\n"
        '    {%- elif message["role"] == "assistant" %}\n'
        '        {{- message["content"]|trim + eos_token}}\n'
        "    {%- else %}\n"
        '        {{- raise_exception("Only user and assistant roles are supported, with the excep'
        'tion of an initial optional system message!") }}\n'
        "    {%- endif %}\n"
        "{%- endfor %}",
        "<s>",
        "</s>",
        "Mistral v3",
    ),
    Published(
        "Mistral Large 2411",
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]"
        " ' + message['content'] + '[/INST]' }}{% elif message['role'] == 'system' %}{{ '[SYSTEM_"
        "PROMPT] ' + message['content'] + '[/SYSTEM_PROMPT]' }}{% elif message['role'] == 'assist"
        "ant' %}{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user"
        ", system and assistant roles are supported!') }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        "Mistral v7",
    ),
    Published(
        "Mistral Small 3",
        '{%- set today = strftime_now("%Y-%m-%d") %}\n'
        '{%- set default_system_message = "You are Mistral Small 3.\\nThe current date is " + toda'
        'y + ".\\n\\nBe brief." %}\n'
        "{{- bos_token }}\n"
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content'] %}\n"
        "    {%- set loop_messages = messages[1:] %}\n"
        "{%- else %}\n"
        "    {%- set system_message = default_system_message %}\n"
        "    {%- set loop_messages = messages %}\n"
        "{%- endif %}\n"
        "{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}\n"
        "{%- for message in loop_messages %}\n"
        "    {%- if message['role'] == 'user' %}\n"
        "        {{- '[INST]' + message['content'] + '[/INST]' }}\n"
        "    {%- elif message['role'] == 'system' %}\n"
        "        {{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}\n"
        "    {%- elif message['role'] == 'assistant' %}\n"
        "        {{- message['content'] + eos_token }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}",
        "<s>",
        "</s>",
        "Mistral v7",
    ),
    Published(
        "Gemma",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role n"
        "ot supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user"
        "') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate use"
        "r/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{"
        "% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_o"
        "f_turn>' + role + '\n"
        "' + message['content'] | trim + '<end_of_turn>\n"
        "' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n"
        "'}}{% endif %}",
        "<bos>",
        "<eos>",
        "Gemma",
    ),
    Published(
        "Gemma 3",
        "{{ bos_token }}\n"
        "{%- if messages[0]['role'] == 'system' -%}\n"
        "    {%- if messages[0]['content'] is string -%}\n"
        "        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}\n"
        "    {%- else -%}\n"
        "        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}\n"
        "    {%- endif -%}\n"
        "    {%- set loop_messages = messages[1:] -%}\n"
        "{%- else -%}\n"
        '    {%- set first_user_prefix = "" -%}\n'
        "    {%- set loop_messages = messages -%}\n"
        "{%- endif -%}\n"
        "{%- for message in loop_messages -%}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n"
        '        {{ raise_exception("Conversation roles must alternate user/assistant/user/assist'
        'ant/...") }}\n'
        "    {%- endif -%}\n"
        "    {%- set role = \"model\" if message['role'] == 'assistant' else message['role'] -%}\n"
        "    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else \"\") }}\n"
        "    {%- if message['content'] is string -%}\n"
        "        {{ message['content'] | trim }}\n"
        "    {%- endif -%}\n"
        "    {{ '<end_of_turn>\\n' }}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        "    {{'<start_of_turn>model\\n'}}\n"
        "{%- endif -%}",
        "<bos>",
        "<eos>",
        "Gemma",
    ),
    Published(
        "Phi-3",
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|use"
        "r|>' + '\n"
        "' + message['content'] + '<|end|>' + '\n"
        "' + '<|assistant|>' + '\n"
        "'}}{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n"
        "'}}{% endif %}{% endfor %}",
        "<s>",
        "<|endoftext|>",
        "Phi-3",
    ),
    Published(
        "Phi-3.5",
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        "{{'<|system|>\n"
        "' + message['content'] + '<|end|>\n"
        "'}}{% elif message['role'] == 'user' %}{{'<|user|>\n"
        "' + message['content'] + '<|end|>\n"
        "'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n"
        "' + message['content'] + '<|end|>\n"
        "'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n"
        "' }}{% else %}{{ eos_token }}{% endif %}",
        "<s>",
        "<|endoftext|>",
        "Phi-3",
    ),
    Published(
        "Zephyr",
        "{% for message in messages %}\n"
        "{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n"
        "' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n"
        "' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n"
        "'  + message['content'] + eos_token }}\n"
        "{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n"
        "{{ '<|assistant|>' }}\n"
        "{% endif %}\n"
        "{% endfor %}",
        "<s>",
        "</s>",
        "Zephyr",
    ),
    Published(
        "Vicuna",
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set sys"
        "tem_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% se"
        't system_message = "A chat between a curious user and an artificial intelligence assista'
        "nt.\" %}{% endif %}{{ bos_token + system_message + ' ' }}{% for message in loop_messages "
        "%}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}{% else %}{"
        "{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}{% if add_gene"
        "ration_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "<s>",
        "</s>",
        "Vicuna",
    ),
    Published(
        "Orca-Vicuna",
        "{%- for message in messages %}{%- if message['role'] == 'system' -%}{{-'SYSTEM: ' + mess"
        "age['content'] + '\n"
        "' -}}{%- else -%}{%- if message['role'] == 'user' -%}{{-'USER: ' + message['content'] + "
        "'\n"
        "'-}}{%- else -%}{{-'ASSISTANT: ' + message['content'] + '</s>\n"
        "' -}}{%- endif -%}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{-'ASSISTA"
        "NT:'-}}{%- endif -%}",
        "<s>",
        "</s>",
        "Vicuna",
    ),
    Published(
        "Alpaca",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1"
        ":] %}{{ messages[0]['content'] + '\\n\\n' }}{% else %}{% set loop_messages = messages %}{{"
        " 'Below is an instruction that describes a task. Write a response that appropriately com"
        "pletes the request.\\n\\n' }}{% endif %}{% for message in loop_messages %}{% if message['r"
        "ole'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }"
        "}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + '\\n\\n' }}{"
        "% endif %}{% endfor %}",
        "<s>",
        "</s>",
        "Alpaca",
    ),
    Published(
        "DeepSeek Coder",
        "{% if not add_generation_prompt is defined %}\n"
        "{% set add_generation_prompt = false %}\n"
        "{% endif %}\n"
        "{%- set ns = namespace(found=false) -%}\n"
        "{%- for message in messages -%}\n"
        "    {%- if message['role'] == 'system' -%}\n"
        "        {%- set ns.found = true -%}\n"
        "    {%- endif -%}\n"
        "{%- endfor -%}\n"
        "{{bos_token}}{%- if not ns.found -%}\n"
        "{{'You are DeepSeek Coder.\\n'}}\n"
        "{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message['role'] == 'system' %}\n"
        "{{ message['content'] }}\n"
        "    {%- else %}\n"
        "        {%- if message['role'] == 'user' %}\n"
        "{{'### Instruction:\\n' + message['content'] + '\\n'}}\n"
        "        {%- else %}\n"
        "{{'### Response:\\n' + message['content'] + '\\n<|EOT|>\\n'}}\n"
        "        {%- endif %}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{% if add_generation_prompt %}\n"
        "{{'### Response:'}}\n"
        "{% endif %}",
        "<｜begin▁of▁sentence｜>",
        "<|EOT|>",
        "Alpaca",
    ),
    Published(
        "DeepSeek V2",
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% e"
        "ndif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ "
        "'User: ' + message['content'] + '\n"
        "\n"
        "' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos"
        "_token }}{% elif message['role'] == 'system' %}{{ message['content'] + '\n"
        "\n"
        "' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "DeepSeek V2",
    ),
    Published(
        "DeepSeek R1",
        "{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['"
        "role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endf"
        "or %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role"
        "'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == "
        "'assistant' and message['content'] is not none %}{% set content = message['content'] %}{"
        "% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %"
        "}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}{% if ad"
        "d_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "DeepSeek R1",
    ),
    Published(
        "Command-R",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1"
        ":] %}{% set system_message = messages[0]['content'] %}{% elif false == true %}{% set loo"
        "p_messages = messages %}{% set system_message = 'You are Command-R, a brilliant, sophist"
        "icated, AI-assistant trained to assist human users by providing thorough responses. You "
        "are trained by Cohere.' %}{% else %}{% set loop_messages = messages %}{% set system_mess"
        "age = false %}{% endif %}{% if system_message != false %}{{ '<|START_OF_TURN_TOKEN|><|SY"
        "STEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% for message in "
        "loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_e"
        "xception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% end"
        "if %}{% set content = message['content'] %}{% if message['role'] == 'user' %}{{ '<|START"
        "_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% elif me"
        "ssage['role'] == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content."
        "strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %"
        "}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        "Command-R",
    ),
    Published(
        "ChatGLM3",
        "{% for message in messages %}{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|>\n"
        " {{ message['content'] }}{% else %}<|{{ message['role'] }}|>\n"
        " {{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistan"
        "t|>{% endif %}",
        "",
        "</s>",
        "GLM-4",
    ),
    Published(
        "GLM-4",
        "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}<|{{ item['role'] }}|>{{ i"
        "tem['metadata'] }}\n"
        "{{ item['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{"
        "% endif %}",
        "",
        "<|endoftext|>",
        "GLM-4",
    ),
    Published(
        "OpenChat",
        "{{ bos_token }}{% for message in messages %}{{ 'GPT4 Correct ' + message['role'].title()"
        " + ': ' + message['content'] + '<|end_of_turn|>'}}{% endfor %}{% if add_generation_promp"
        "t %}{{ 'GPT4 Correct Assistant:' }}{% endif %}",
        "<s>",
        "<|end_of_turn|>",
        "OpenChat",
    ),
    Published(
        "Granite 3.0",
        "{%- for message in messages %}\n"
        "    {%- if message['role'] == 'system' %}\n"
        "    {{- '<|start_of_role|>system<|end_of_role|>' + message['content'] + '<|end_of_text|>"
        "\n"
        "' }}\n"
        "    {%- elif message['role'] == 'user' %}\n"
        "    {{- '<|start_of_role|>user<|end_of_role|>' + message['content'] + '<|end_of_text|>\n"
        "' }}\n"
        "    {%- elif message['role'] == 'assistant' %}\n"
        "    {{- '<|start_of_role|>assistant<|end_of_role|>'  + message['content'] + '<|end_of_te"
        "xt|>\n"
        "' }}\n"
        "    {%- elif message['role'] == 'assistant_tool_call' %}\n"
        "    {{- '<|start_of_role|>assistant<|end_of_role|><|tool_call|>' + message['content'] + "
        "'<|end_of_text|>\n"
        "' }}\n"
        "    {%- elif message['role'] == 'tool_response' %}\n"
        "    {{- '<|start_of_role|>tool_response<|end_of_role|>' + message['content'] + '<|end_of"
        "_text|>\n"
        "' }}\n"
        "    {%- endif %}\n"
        "    {%- if loop.last and add_generation_prompt %}\n"
        "    {{- '<|start_of_role|>assistant<|end_of_role|>' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}",
        "<|end_of_text|>",
        "<|end_of_text|>",
        "Granite 3",
    ),
    Published(
        "Granite 3.1",
        "{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content'] %}\n"
        "    {%- set loop_messages = messages[1:] %}\n"
        "{%- else %}\n"
        '    {%- set system_message = "Knowledge Cutoff Date: April 2024.\\nToday\'s Date: " + strf'
        "time_now('%B %d, %Y') + \".\\nYou are Granite, developed by IBM.\" %}\n"
        "    {%- set loop_messages = messages %}\n"
        "{%- endif %}\n"
        "{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}\n"
        "{%- for message in loop_messages %}\n"
        "    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] +"
        " '<|end_of_text|>\\n' }}\n"
        "    {%- if loop.last and add_generation_prompt %}\n"
        "        {{- '<|start_of_role|>assistant<|end_of_role|>' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}",
        "<|end_of_text|>",
        "<|end_of_text|>",
        "Granite 3",
    ),
    Published(
        "Falcon 3",
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + mes"
        "sage['content'] + '\\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['"
        "content'] + '\\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|"
        "assistant|>\\n'  + message['content'] + eos_token + '\\n' }}{% else %}{{ '<|assistant|>\\n'"
        "  + message['content'] + eos_token }}{% endif %}{% endif %}{% if loop.last and add_gener"
        "ation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}",
        "",
        "<|endoftext|>",
        "Falcon 3",
    ),
    Published(
        "Solar",
        "{% for message in messages %}{% if message['role'] == 'system' %}{% if message['content'"
        "]%}{{'### System:\n"
        "' + message['content']+'\n"
        "\n"
        "'}}{% endif %}{% elif message['role'] == 'user' %}{{'### User:\n"
        "' + message['content']+'\n"
        "\n"
        "'}}{% elif message['role'] == 'assistant' %}{{'### Assistant:\n"
        "'  + message['content']}}{% endif %}{% if loop.last and add_generation_prompt %}{{ '### "
        "Assistant:\n"
        "' }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        "Solar",
    ),
    Published(
        "CodeLlama 70B",
        "{% if messages[0]['role'] == 'system' %}{% set user_index = 1 %}{% else %}{% set user_in"
        "dex = 0 %}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != ("
        "(loop.index0 + user_index) % 2 == 0) %}{{ raise_exception('Conversation roles must alter"
        "nate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 %}{{ '<s>' "
        "}}{% endif %}{% set content = 'Source: ' + message['role'] + '\n"
        "\n"
        " ' + message['content'] | trim %}{{ content + ' <step> ' }}{% endfor %}{{'Source: assist"
        "ant\n"
        "Destination: user\n"
        "\n"
        " '}}",
        "<s>",
        "</s>",
        "CodeLlama 70B",
    ),
    Published(
        "Megrez",
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '"
        "<|role_start|>system<|role_end|>你是Megrez-3B-Instruct，将针对用户的问题给出详细的、积极的回答"
        "。<|turn_end|>' }}{% endif %}{{ '<|role_start|>' + message['role'] + '<|role_end|>' + mes"
        "sage['content'] + '<|turn_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|role_"
        "start|>assistant<|role_end|>' }}{% endif %}",
        "",
        "<|turn_end|>",
        "Megrez",
    ),
    Published(
        "MiniCPM",
        "{% for message in messages %}{% if message['role'] == 'user' %}{{'<用户>' + message['conte"
        "nt'].strip() + '<AI>'}}{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        "MiniCPM",
    ),
    Published(
        "AlphaMonarch",
        "{% for message in messages %}{{bos_token + message['role'] + '\\n' + message['content'] +"
        " eos_token + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\\n"
        "' }}{% endif %}",
        "<s>",
        "</s>",
        None,
    ),
    Published(
        "Alfred",
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<start_user>' + messa"
        "ge['content'].strip() + '<end_message>' }}{% elif message['role'] == 'system' %}{{ '<sta"
        "rt_system>' + message['content'].strip() + '<end_message>' }}{% elif message['role'] == "
        "'assistant' %}{{ '<start_assistant>'  + message['content'] + '<end_message>' }}{% else %"
        "}{{ raise_exception('Only system, user and assistant roles are supported.') }}{% endif %"
        "}{% if loop.last and add_generation_prompt %}{{ '<start_assistant>' }}{% endif %}{% endf"
        "or %}",
        "",
        "<|endoftext|>",
        None,
    ),
)
