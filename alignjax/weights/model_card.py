"""README.md of an export: what the model is, and how to call it from transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignjax.data import chat
from alignjax.data.chat_format import format_of

CARD_FILE = "README.md"
KINDS = {
    ("lm", "model"): "A language model",
    ("ranking", "model"): "A reward model, which scores the last reply of a conversation,",
    ("dpo", "policy"): "A language model, trained by DPO,",
    ("ppo", "policy"): "A language model, trained by PPO,",
    ("ppo", "value"): "The value model of PPO, which predicts returns,",
}
CARD = """\
---
{header}
tags:
- alignjax
---
# {name}

{kind} as alignjax trained it: `{item}` of the run `{name}` (stage `{stage}`) after step {step}, \
in {dtype}.{origin}

{use}"""
GENERATE = """\
```python
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

directory = "."  # of this file, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(directory)
{load}
{prompt}
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
response = model.generate({arguments})[0, ids.shape[1] :]
print(tokenizer.decode(response, skip_special_tokens=True))
```

A response ends at any of the tokens {ends}, which {place} lists.
"""
LOAD = "model = {loader}.from_pretrained(directory{options})"
LOAD_ADAPTED = """\
base = {loader}.from_pretrained({base!r}{options})
model = PeftModel.from_pretrained(base, directory)"""
IMPORT_PEFT = "from peft import PeftModel\n"
ADAPTER = """\
It is a LoRA adapter in PEFT's format, of the base `{base}`, which must be loaded with it.

"""
CHAT_PROMPT = """\
messages = [{"role": "user", "content": "..."}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"""
TEXT_PROMPT = 'text = "..."'
VALUE = """\
Its output at a token is the expected return of the tokens after it. It is exported as a sequence \
classifier, whose one label is the output at the last token{bias}.
"""
SCORE = """\
A score is the output at the token that ends the reply, {end}. transformers reads a classifier at \
the last token instead, which may be what the template writes after the reply, so cut the text \
there:

```python
import torch
{imports}from transformers import AutoModelForSequenceClassification, AutoTokenizer

directory = "."  # of this file, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(directory)
{load}
model.eval()
messages = [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]
end = {end!r}
{tokenise}
score = model(torch.tensor([ids])).logits.item(){bias}
```

{bias_note}In a batch, pad on the right with `{pad}`. alignjax reads text in a message that looks \
like a control token as text; these lines read it as the control token.
"""
# Training makes tokens of a prompt, and then of the reply as the template writes it after the
# prompt. With a tokenizer that encodes a continuation as it encodes a beginning, these are two
# texts; with others, such as SentencePiece's, they are one.
PROMPT = """\
prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
"""
CHAT = "chat = tokenizer.apply_chat_template(messages, tokenize=False)\n"
PARTS = 'ids = sum(tokenizer(parts, add_special_tokens=False)["input_ids"], [])'
TOKENISE_PARTS = f"""\
{PROMPT}{CHAT}parts = [prompt, chat[len(prompt) : chat.rindex(end)] + end]
{PARTS}"""
TOKENISE_WHOLE = f"""\
{CHAT}ids = tokenizer(chat[: chat.rindex(end)] + end, add_special_tokens=False)["input_ids"]"""
# For a template whose prompt opens what a conversation with a reply does not have.
TOKENISE_REPLY = f"""\
{PROMPT}parts = [prompt, messages[-1]["content"] + end]
{PARTS}"""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What a card tells of an export."""

    config: Mapping[str, Any]  # of the run
    item: str  # of the checkpoint: model, policy or value
    step: str
    dtype: str
    ends: tuple[int, ...]  # of a response; empty for a scalar head
    bias: float  # of a scalar head, which transformers does not read
    base: str  # name of the checkpoint that the run's models came from; "" if there is none
    adapted: str = ""  # the base of an adapter; "" if the export is a whole model
    revision: str = ""  # of that base on the hub
    pad: int | None = None  # of a sequence classifier


def model_card(exported: ExportedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of README.md."""
    config = exported.config
    kind = (config["stage"], exported.item)
    origin = f" The run's models began with `{exported.base}`." if exported.base else ""
    uses = {
        ("ranking", "model"): score_use,
        ("ppo", "value"): value_use,
    }
    use = uses.get(kind, generation_use)
    header = "library_name: transformers"
    about = ""
    if exported.adapted:
        header = f"library_name: peft\nbase_model: {exported.adapted}"
        about = ADAPTER.format(base=exported.adapted)
    return CARD.format(
        header=header,
        name=config["name"],
        kind=KINDS[kind],
        item=exported.item,
        stage=config["stage"],
        step=exported.step,
        dtype=exported.dtype,
        origin=origin,
        use=about + use(exported, tokenizer),
    )


def loading_lines(exported: ExportedModel, loader: str, options: str = "") -> str:
    """Return the lines of Python that load the model; `options` are of an adapter's base."""
    if exported.adapted:
        if exported.revision:
            options += f", revision={exported.revision!r}"
        return LOAD_ADAPTED.format(loader=loader, base=exported.adapted, options=options)
    return LOAD.format(loader=loader, options="")


def generation_use(exported: ExportedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return how to let a language model respond."""
    reads_text = exported.config.get("data.kind") == "text" or not tokenizer.chat_template
    ends = ", ".join(f"`{tokenizer.decode([token])}`" for token in exported.ends)
    arguments = "ids, max_new_tokens=256"
    place = "`generation_config.json`"
    if exported.adapted:
        arguments += f", eos_token_id={list(exported.ends)}"
        place = "`eos_token_id`"
    return GENERATE.format(
        imports=IMPORT_PEFT if exported.adapted else "",
        load=loading_lines(exported, "AutoModelForCausalLM"),
        arguments=arguments,
        prompt=TEXT_PROMPT if reads_text else CHAT_PROMPT,
        ends=ends,
        place=place,
    )


def value_use(exported: ExportedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the output of a value model is."""
    bias = f", less {exported.bias!r}, which transformers does not read" if exported.bias else ""
    return VALUE.format(bias=bias)


def score_use(exported: ExportedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the lines of Python that give a reward model's score."""
    bias = ""
    bias_note = ""
    if exported.bias:
        bias = f" + {exported.bias!r}"
        bias_note = (
            "The number that is added is `score.bias` of the file, which transformers does not "
            "read: it brings the mean score of the run's demonstrations to 0. "
        )
    options = f", num_labels=1, pad_token_id={exported.pad}"
    return SCORE.format(
        imports=IMPORT_PEFT if exported.adapted else "",
        load=loading_lines(exported, "AutoModelForSequenceClassification", options),
        end=tokenizer.decode([chat.end_token(tokenizer)]),
        tokenise=tokenising_lines(tokenizer),
        bias=bias,
        bias_note=bias_note,
        pad=tokenizer.pad_token,
    )


def tokenising_lines(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the lines of Python that make the tokens of a conversation, through its end token."""
    chat_format = format_of(tokenizer)
    if chat_format.opened:
        return TOKENISE_REPLY
    return TOKENISE_PARTS if chat_format.encodes_alone else TOKENISE_WHOLE
