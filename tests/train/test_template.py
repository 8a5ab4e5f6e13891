"""What is learned is what the engine would have to generate: token by token, on templates of several families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from app.train.template import IGNORED, Template, Untrainable

LONG = [
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "I am Fern."},
    {"role": "user", "content": "Thanks\nand goodbye!"},
    {"role": "assistant", "content": "Warm greens,\n\nFern"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be kind."}, *LONG]
# SmolLM2's own template, with the marks that Transformers reads: the reference for the mask.
SMOLLM_MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)


def shipped(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


# How Llama 3's tokenizer cuts a text before it looks for tokens: line breaks stay together.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_3(smollm: Path) -> Template:
    template = family(smollm, shipped("llama3"), "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    words = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    template.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    return template


def family(smollm: Path, plain: str, stop: str, *tokens: str) -> Template:
    """Another family's template on SmolLM2's tokenizer, which learns the special tokens that it needs."""
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens, stop]})
    tokenizer.chat_template = plain
    return Template(tokenizer, frozenset([tokenizer.convert_tokens_to_ids(stop)]))


def marked(template: Template, copy: str, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """The reference: Transformers' own mask, from a copy of the template with `{% generation %}` marks."""
    found = template.tokenizer.apply_chat_template(
        messages, chat_template=copy, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    return found["input_ids"], [bool(each) for each in found["assistant_masks"]]


def test_chatml_masks_are_those_of_a_marked_copy_token_by_token(template: Template) -> None:
    for messages in (LONG, WITH_SYSTEM, LONG[:2]):
        rendered = template.chat(messages)
        assert (rendered.input_ids, rendered.is_learned) == marked(template, SMOLLM_MARKED, messages)


def test_llama_3_masks_are_those_of_trls_marked_copy_token_by_token(smollm: Path) -> None:
    llama = llama_3(smollm)
    for messages in (LONG, WITH_SYSTEM, LONG[:2]):
        rendered = llama.chat(messages)
        assert (rendered.input_ids, rendered.is_learned) == marked(llama, shipped("llama3_training"), messages)


def test_gemma_masks_are_those_of_trls_marked_copy_but_for_what_follows_the_stop(smollm: Path) -> None:
    """TRL's copy counts the line break after `<end_of_turn>` too, which the engine never generates."""
    gemma = family(smollm, shipped("gemma"), "<end_of_turn>", "<start_of_turn>")
    rendered = gemma.chat(LONG)
    ids, mask = marked(gemma, shipped("gemma_training"), LONG)
    stop = gemma.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    after_stop = [place > 0 and ids[place - 1] == stop for place in range(len(ids))]
    assert rendered.input_ids == ids
    assert rendered.is_learned == [learned and not after for learned, after in zip(mask, after_stop, strict=True)]


@pytest.mark.parametrize("name", ["smollm", "llama3", "gemma", "qwen2_5"])
def test_before_each_answer_stand_the_very_tokens_that_the_engine_is_prompted_with(smollm: Path, name: str) -> None:
    every = {
        "smollm": lambda: Template.of(smollm),
        "llama3": lambda: llama_3(smollm),
        "gemma": lambda: family(smollm, shipped("gemma"), "<end_of_turn>", "<start_of_turn>"),
        "qwen2_5": lambda: family(smollm, shipped("qwen2_5"), "<|im_end|>"),
    }
    template = every[name]()
    rendered = template.chat(LONG)
    starts = [at for at, on in enumerate(rendered.is_learned) if on and not rendered.is_learned[at - 1]]
    assert len(starts) == 2
    for start, asked in zip(starts, (LONG[:1], LONG[:3]), strict=True):
        prompt = template.tokenizer(template.prompt(asked), add_special_tokens=False)["input_ids"]
        assert rendered.input_ids[:start] == prompt


def test_an_answer_is_learned_to_its_stop_token_and_no_further(template: Template) -> None:
    rendered = template.chat(LONG[:2])
    learned = [token for token in rendered.labels if token != IGNORED]
    assert template.tokenizer.decode(learned) == "I am Fern.<|im_end|>"
    assert rendered.input_ids[-1] != learned[-1], "the line break after it is there, and masked"


def test_a_message_of_weight_0_is_not_learned(template: Template) -> None:
    messages = [LONG[0], LONG[1] | {"weight": 0}, *LONG[2:]]
    learned = [token for token in template.chat(messages).labels if token != IGNORED]
    assert template.tokenizer.decode(learned) == "Warm greens,\n\nFern<|im_end|>"


def test_a_row_of_which_nothing_is_learned_is_an_error(template: Template) -> None:
    with pytest.raises(Untrainable, match="every token is masked: give one"):
        template.chat([LONG[0], LONG[1] | {"weight": 0}])
    with pytest.raises(Untrainable, match="no assistant message"):
        template.chat(LONG[:1])


@pytest.mark.parametrize("answer", ["\n\nHello", " Hello", "Hello"])
def test_an_answer_never_changes_the_tokens_of_its_prompt(smollm: Path, template: Template, answer: str) -> None:
    """`\n` ends ChatML's prompt, and with an answer's line breaks it would be one token; GPT-2's tokenizer cuts the
    `\n\n` that ends Llama 3's prompt in two as soon as a letter follows. The engine never sees either."""
    gpt_2_like = family(smollm, shipped("llama3"), "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    for each in (template, gpt_2_like):
        rendered = each.chat([LONG[0], {"role": "assistant", "content": answer}])
        prompt = each.tokenizer(each.prompt(LONG[:1]), add_special_tokens=False)["input_ids"]
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.is_learned.index(True) == len(prompt)
        assert each.tokenizer.decode(rendered.input_ids) == rendered.text


def test_a_template_without_a_stop_token_is_an_error(smollm: Path) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    endless = family(smollm, plain + "{% if add_generation_prompt %}assistant: {% endif %}", "<|never|>")
    with pytest.raises(Untrainable, match="by no token at which the engine stops"):
        endless.chat(LONG[:2])


def test_a_conversation_that_the_template_refuses_is_an_error_that_says_so(smollm: Path) -> None:
    gemma = family(smollm, shipped("gemma"), "<end_of_turn>", "<start_of_turn>")
    with pytest.raises(Untrainable, match="System role not supported"):
        gemma.chat(WITH_SYSTEM)


def test_turns_that_a_longer_conversation_renders_otherwise_are_skipped_and_counted(smollm: Path) -> None:
    """Qwen3 drops the reasoning of earlier turns: they are never seen like that while they are generated."""
    qwen = family(smollm, shipped("qwen3"), "<|im_end|>")
    thinking = [LONG[0], {"role": "assistant", "content": "<think>\nWho?\n</think>\n\nFern."}, *LONG[2:]]
    rendered = qwen.chat(thinking)
    learned = qwen.tokenizer.decode([token for token in rendered.labels if token != IGNORED])
    assert rendered.skipped_turns == 1
    assert "Warm greens" in learned
    assert "Who?" not in learned


def test_tool_calls_are_rendered_with_their_arguments_as_the_engine_does(smollm: Path) -> None:
    qwen = family(smollm, shipped("qwen2_5"), "<|im_end|>")
    call = {"id": "1", "type": "function", "function": {"name": "stock", "arguments": '{"item": "Nook"}'}}
    tools = [{"type": "function", "function": {"name": "stock", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "user", "content": "Is the Nook in stock?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "Yes, three."},
    ]
    rendered = qwen.chat(messages, tools)
    learned = qwen.tokenizer.decode([token for token in rendered.labels if token != IGNORED])
    assert '{"name": "stock", "arguments": {"item": "Nook"}}' in learned
    assert "Yes, three.<|im_end|>" in learned
    assert "<tool_response>" not in learned


def test_a_pair_of_texts_is_learned_from_its_completion_to_the_end_of_text(template: Template) -> None:
    rendered = template.text("The sky is", " blue.")
    learned = [token for token in rendered.labels if token != IGNORED]
    assert learned[-1] == template.tokenizer.eos_token_id
    assert template.tokenizer.decode(learned[:-1]) == " blue."
