"""Chat templates as released models carry them, and small tokenizers to use them with."""

from dataclasses import dataclass

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Qwen2.5's: it puts a system turn in front where there is none.
CHATML = """{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

_TURN = "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
_ASKED = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"

# ChatML templates that write something of their own around an answer, one for each way to do it.

# As DeepSeek-R1's: it opens a thought where it is to be answered, and nowhere else.
OPENED_THOUGHT = f"""{{%- for message in messages -%}}
{_TURN}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n<think>\\n' -}}}}{{%- endif -%}}"""

# As Qwen3's: the last answer gets a thought, an empty one where it has none; earlier ones lose
# theirs. With enable_thinking=false, the generation prompt has the empty thought, too.
EMPTY_THOUGHT = """{%- for message in messages -%}
{%- set content = message['content'] -%}{%- set thought = message.reasoning_content or '' -%}
{%- if message['role'] == 'assistant' and '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' and loop.last -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}"""

# As gpt-oss': an answer goes to a channel, whose header the generation prompt leaves open.
CHANNEL = """{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- if message.thinking and loop.last -%}
{{- '<|im_start|>assistant:analysis\\n' + message.thinking + '\\n' -}}
{%- endif -%}
{{- '<|im_start|>assistant:final\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}"""

# The turn's role comes with the answer, as in templates made for training alone.
NO_GENERATION_PROMPT = f"{{%- for message in messages -%}}{_TURN}{{%- endfor -%}}"

# An answer that the template does not write.
VANISHING = f"""{{%- for message in messages -%}}
{{%- if message['role'] != 'assistant' -%}}{_TURN}{{%- endif -%}}
{{%- endfor -%}}
{_ASKED}"""

# Answers that the template changes where they have a certain text: all before a mark goes.
SHORTENING = f"""{{%- for message in messages -%}}
{{%- if message['role'] == 'assistant' -%}}
{{{{- '<|im_start|>assistant\\n' + message['content'].split('####')[-1] + '<|im_end|>\\n' -}}}}
{{%- else -%}}{_TURN}{{%- endif -%}}
{{%- endfor -%}}
{_ASKED}"""

# As those of vision models: contents are lists of parts, a plain text is lost.
PARTS = f"""{{%- for message in messages -%}}
{{{{- '<|im_start|>' + message['role'] + '\\n' -}}}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'text' -%}}{{{{- part['text'] -}}}}{{%- endif -%}}
{{%- endfor -%}}
{{{{- '<|im_end|>\\n' -}}}}
{{%- endfor -%}}
{_ASKED}"""

# As Llama 3.2's: it writes the day.
DATED = (
    "{{- '<|im_start|>system\\nToday is ' + strftime_now(\"%d %b %Y\") + '.<|im_end|>\\n' -}}"
    f"{{%- for message in messages -%}}{_TURN}{{%- endfor -%}}{_ASKED}"
)

# As Hermes': tools in a system turn, calls as JSON between tags.
TOOLS = f"""{{%- if tools -%}}
{{{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
{{{{- '<|im_start|>' + message['role'] + '\\n' + (message.content or '') -}}}}
{{%- for call in message.tool_calls or [] -%}}
{{{{- '<call>' + call['function'] | tojson + '</call>' -}}}}
{{%- endfor -%}}
{{{{- '<|im_end|>\\n' -}}}}
{{%- endfor -%}}
{_ASKED}"""


@dataclass(frozen=True)
class Family:
    """One family of chat models.

    Attributes:
        template: Its chat template.
        special: The special tokens that the template writes, `bos` and `eos` among them.
        bos: Its beginning of sequence, which its tokenizer adds; None without one.
        eos: Its end of sequence.
        end_of_turn: What ends an assistant turn.
        pieces: Whether its tokenizer is of the SentencePiece kind.
    """

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    end_of_turn: str
    pieces: bool = False


FAMILIES = {
    "zephyr": Family(ZEPHYR, ("<s>", "</s>"), "<s>", "</s>", "</s>", pieces=True),
    "chatml": Family(
        CHATML,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        "<|endoftext|>",
        "<|im_end|>",
    ),
    "llama3": Family(
        LLAMA3,
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "gemma": Family(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
    ),
}


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of this family, of single characters with a few merges."""
    family = FAMILIES[name]
    inner = _pieces() if family.pieces else byte_level()
    tokenizer = wrap(inner, family.special, bos=family.bos, eos=family.eos)
    tokenizer.chat_template = family.template
    return tokenizer


def wrap(
    inner: Tokenizer,
    special: tuple[str, ...],
    *,
    bos: str | None = None,
    eos: str | None = None,
    add_eos: bool = False,
) -> PreTrainedTokenizerFast:
    """Add special tokens to a tokenizer, which writes `bos` (and `eos`) around plain text."""
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    around = " ".join([bos or "", "$A", (eos or "") if add_eos else ""]).strip()
    template = processors.TemplateProcessing(
        single=around,
        special_tokens=[(token, inner.token_to_id(token)) for token in special],
    )
    inner.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos)


def byte_level() -> Tokenizer:
    """GPT-2's kind: bytes, with merges that cross from a newline into the next text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("t", "h"), ("Ġ", "th"), ("H", "e")]
    words = [*alphabet, *(first + second for first, second in merges)]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    return inner


def _pieces() -> Tokenizer:
    """Llama 2's kind: a space goes before a text that stands alone, bytes for what is unknown."""
    characters = "▁" + "".join(chr(i) for i in range(33, 127))
    words = [*(f"<0x{i:02X}>" for i in range(256)), *characters, "▁t", "▁th"]
    merges = [("▁", "t"), ("▁t", "h")]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return inner
