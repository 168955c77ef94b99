"""Prompts and examples as the text that the model reads: by the tokenizer's chat template, or plain."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jinja2

from spd_dist.config import Data
from spd_dist.data.conversation import Conversation, tools_of, turns_of
from spd_dist.data.scoring.thoughts import closings, opened_by
from spd_dist.data.spans import Span, merged
from spd_dist.errors import ConfigError, DataError

SWITCH = "enable_thinking"
"""What the templates of Qwen3, SmolLM3 and others call it."""
_PROMPT, _ANSWER = "<<the prompt>>", "<<the answer>>"


class Tokenizer(Protocol):
    """The part of a transformers fast tokenizer that this package uses."""

    chat_template: Any
    is_fast: bool

    def __call__(
        self, text: Any, *, add_special_tokens: bool, return_offsets_mapping: bool = False
    ) -> Mapping[str, Any]:
        """`input_ids`, and `offset_mapping` if asked for."""

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """The conversation as text."""


@dataclass(frozen=True)
class Rendered:
    """An example as text, and where the characters of prompt + answer went."""

    text: str
    pieces: tuple[tuple[Span, int], ...]
    """A span of prompt + answer, and how far it moved; what the template dropped is in none."""

    def spans(self, spans: Sequence[Span]) -> list[Span]:
        """Spans of prompt + answer as spans of `text`."""
        return merged(
            [
                (max(start, first) + shift, min(stop, last) + shift)
                for (first, last), shift in self.pieces
                for start, stop in spans
                if max(start, first) < min(stop, last)
            ]
        )


def adds_special_tokens(config: Data) -> bool:
    """Whether the tokenizer adds the tokens that open a text; a chat template has them already."""
    return config.template == "plain"


def render_prompt(prompt: str, tokenizer: Tokenizer, config: Data) -> str:
    """The text after which the policy answers."""
    if config.template == "plain":
        return prompt
    return _chat(tokenizer, config, prompt, None)


def render_example(prompt: str, answer: str, tokenizer: Tokenizer, config: Data) -> Rendered:
    """The text of a prompt and its reference answer (an answer of "" leaves the prompt alone).

    Raises:
        ConfigError: data.template=chat, and the tokenizer has no chat template.
        DataError: the chat template changes the texts themselves, so that spans cannot be followed.
    """
    whole = (0, len(prompt)), (len(prompt), len(prompt) + len(answer))
    if config.template == "plain":
        return Rendered(prompt + answer, tuple((span, 0) for span in whole))
    content = answer.strip()
    if closings(content) or isinstance(prompt, Conversation):
        return _behind_its_prompt(prompt, answer, tokenizer, config)
    text = _chat(tokenizer, config, prompt, content or None)
    frame = _chat(tokenizer, config, _PROMPT, _ANSWER if content else None)
    before, _, rest = frame.partition(_PROMPT)
    between, _, after = rest.partition(_ANSWER)
    for shown in (prompt, prompt.strip(), prompt.rstrip(), prompt.lstrip()):
        if text == before + shown + between + content + after:
            first = prompt.index(shown)
            first_of_answer = len(prompt) + answer.index(content)
            start_of_answer = len(before) + len(shown) + len(between)
            return Rendered(
                text,
                (
                    ((first, first + len(shown)), len(before) - first),
                    ((first_of_answer, first_of_answer + len(content)), start_of_answer - first_of_answer),
                ),
            )
    raise DataError(
        f"data.template=chat: the chat template changes the text of {prompt[:60]!r} or of its answer, so target spans "
        "cannot be found in it; set data.template=plain"
    )


def _behind_its_prompt(prompt: str, answer: str, tokenizer: Tokenizer, config: Data) -> Rendered:
    """A reference as the policy itself writes it: behind its prompt.

    Templates rewrite the thoughts of turns, or leave them out. A mark that the prompt has opened is not opened again.
    """
    asked, content = _chat(tokenizer, config, prompt, None), answer.strip()
    opened = opened_by(asked, config.thinking_marks)
    if opened and content.startswith(opened):
        content = content.removeprefix(opened).lstrip()
    frame = _chat(tokenizer, config, prompt, _ANSWER)
    if isinstance(prompt, Conversation):
        start = len(prompt) + answer.index(content)
        moved = (start, start + len(content)), len(asked) - start
        return Rendered(asked + content + frame.partition(_ANSWER)[2], (*prompt.located(asked), moved))
    place = asked.find(prompt.strip())
    if place < 0:
        raise DataError(
            f"data.template=chat: the chat template changes the text of {prompt[:60]!r}, so target spans cannot be "
            "found in it; set data.template=plain"
        )
    first, start = prompt.index(prompt.strip()), len(prompt) + answer.index(content)
    pieces = (
        ((first, first + len(prompt.strip())), place - first),
        ((start, start + len(content)), len(asked) - start),
    )
    return Rendered(asked + content + frame.partition(_ANSWER)[2], pieces)


def check_thinking(tokenizer: Tokenizer, config: Data) -> None:
    """See that the chat template does what `data.thinking` asks of it.

    Raises:
        ConfigError: it knows no way to ask for no thought, or opens one in the prompt, which `drop` would leave open.
    """
    if config.thinking == "off" and config.template == "chat":
        bare = dataclasses.replace(config, thinking="keep")
        if _chat(tokenizer, config, _PROMPT, None) == _chat(tokenizer, bare, _PROMPT, None):
            raise ConfigError(
                f"data.thinking: off is not valid with this tokenizer, whose chat template does not know {SWITCH}; set "
                "data.thinking=drop, or data.template_options for its own switch"
            )
    if config.thinking == "drop" and opened_by(render_prompt(_PROMPT, tokenizer, config), config.thinking_marks):
        raise ConfigError(
            "data.thinking: drop is not valid with this tokenizer, whose chat template opens a thought in the prompt: "
            "what follows would stand inside of it; set data.thinking=keep and finetune.loss_on=after_thought"
        )


def _chat(tokenizer: Tokenizer, config: Data, prompt: str, answer: str | None) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            "data.template: 'chat' is not valid, as this tokenizer has no chat template; set data.template=plain"
        )
    turns, tools = list(turns_of(prompt)), tools_of(prompt)
    if config.system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": config.system})
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    switch = {SWITCH: False} if config.thinking == "off" else {}
    options = {"tokenize": False, "add_generation_prompt": answer is None, **switch, **config.template_options}
    try:
        rendered = tokenizer.apply_chat_template(turns, **options, **({"tools": list(tools)} if tools else {}))
        if tools and rendered == tokenizer.apply_chat_template(turns, **options):
            raise ConfigError(
                "data.template: 'chat' is not valid for rows with tools, as this tokenizer's chat template has none; "
                "remove `tools` from the rows, or take a model whose template knows them"
            )
    except jinja2.TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ConfigError(
            f"data.template: the chat template refuses the turns {roles} ({error}); set data.system=null, change the "
            "rows, or set data.template=plain"
        ) from error
    return rendered
