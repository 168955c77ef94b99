"""Prompts and examples as the text that the model reads: by the tokenizer's chat template, or plain.

What a policy is asked and what it answered are one text: an example that does not begin with its own prompt, as a
template writes past turns in another way, is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spd_dist.config import Data
from spd_dist.data.conversations import SWITCH, Conversation, apply_template, plain_text
from spd_dist.data.scoring.thoughts import closings, opened_by
from spd_dist.data.spans import Span, merged
from spd_dist.errors import ConfigError, DataError

_PROMPT, _ANSWER = "<<the prompt>>", "<<the answer>>"
_OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")
"""A prompt that begins the answer's thought."""


class Tokenizer(Protocol):
    """The part of a transformers fast tokenizer that this package uses."""

    chat_template: Any

    @property
    def is_fast(self) -> bool:
        """Whether it can say where in the text its tokens stand."""
        ...

    @property
    def all_special_tokens(self) -> list[str]:
        """Marks that are no text."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids, in the same order."""
        ...

    def __call__(
        self, text: Any, *, add_special_tokens: bool, return_offsets_mapping: bool = False
    ) -> Mapping[str, Any]:
        """`input_ids`, and `offset_mapping` if asked for."""
        ...

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> Any:
        """The text of one list of tokens: a string."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The conversation as text."""
        ...


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


@dataclass(frozen=True)
class RenderedTurns:
    """A conversation as text, and where the supervised turns of the assistant stand in it."""

    text: str
    turns: tuple[Span, ...]
    contents: tuple[Span, ...] = ()
    """What was said, by whomever: not what the template writes between."""


def adds_special_tokens(config: Data) -> bool:
    """Whether the tokenizer adds the tokens that open a text; a chat template has them already."""
    return config.template == "plain"


def asking(prompt: str) -> Conversation:
    """A prompt alone as a conversation."""
    return Conversation(({"role": "user", "content": prompt},))


def render_prompt(prompt: str | Conversation, tokenizer: Tokenizer, config: Data) -> str:
    """The text after which the policy answers.

    Raises:
        ConfigError: there is no chat template, or it refuses the conversation.
    """
    if isinstance(prompt, Conversation):
        return plain_text(prompt) if config.template == "plain" else _chat(tokenizer, config, prompt)
    return prompt if config.template == "plain" else _chat(tokenizer, config, asking(prompt))


def rendered_again(asked: str | Conversation, turn: str, tokenizer: Tokenizer, config: Data) -> str:
    """A sampled turn as the chat template writes it once it is past; empty if it refuses it."""
    conversation = asking(asked) if isinstance(asked, str) else asked
    try:
        return _chat(tokenizer, config, conversation.and_then(turn))
    except ConfigError:
        return ""


def render_example(prompt: str, answer: str, tokenizer: Tokenizer, config: Data) -> Rendered:
    """The text of a prompt and its reference answer (an answer of "" leaves the prompt alone).

    It begins with the prompt as the policy is asked it; a thought that the prompt opens is closed before the answer.

    Raises:
        ConfigError: data.template=chat, and the tokenizer has no chat template, or one that refuses the turns.
        DataError: the chat template changes the texts themselves, so that spans cannot be followed.
    """
    whole = (0, len(prompt)), (len(prompt), len(prompt) + len(answer))
    if config.template == "plain":
        return Rendered(prompt + answer, tuple((span, 0) for span in whole))
    content = answer.strip()
    if closings(content):
        return _with_thought(prompt, answer, tokenizer, config)
    text, asked = _chat(tokenizer, config, _answered(prompt, content)), _chat(tokenizer, config, asking(prompt))
    frame = _chat(tokenizer, config, _answered(_PROMPT, _ANSWER if content else ""))
    before, _, rest = frame.partition(_PROMPT)
    between, _, after = rest.partition(_ANSWER)
    opened = _OPENED.search(asked)
    if content and opened and not text.startswith(asked):  # past turns are written without their thought
        between = _chat(tokenizer, config, asking(_PROMPT)).partition(_PROMPT)[2] + f"\n</{opened[1]}>\n\n"
        text = f"{asked}\n</{opened[1]}>\n\n{content}{after}"
    check_begins(text, asked, f"the prompt {prompt[:60]!r}")
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


def _with_thought(prompt: str, answer: str, tokenizer: Tokenizer, config: Data) -> Rendered:
    """A reference that thinks, as the policy itself writes it: behind its prompt.

    Templates rewrite thoughts, or leave them out. A mark that the prompt has opened is not opened again.
    """
    asked, content = _chat(tokenizer, config, asking(prompt)), answer.strip()
    opened = opened_by(asked, config.thinking_marks)
    if opened and content.startswith(opened):
        content = content.removeprefix(opened).lstrip()
    frame = _chat(tokenizer, config, _answered(_PROMPT, _ANSWER))
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
        if _chat(tokenizer, config, asking(_PROMPT)) == _chat(tokenizer, bare, asking(_PROMPT)):
            raise ConfigError(
                f"data.thinking: off is not valid with this tokenizer, whose chat template does not know {SWITCH}; set "
                "data.thinking=drop, or data.template_options for its own switch"
            )
    if config.thinking == "drop" and opened_by(render_prompt(_PROMPT, tokenizer, config), config.thinking_marks):
        raise ConfigError(
            "data.thinking: drop is not valid with this tokenizer, whose chat template opens a thought in the prompt: "
            "what follows would stand inside of it; set data.thinking=keep and finetune.loss_on=after_thought"
        )


def render_turns(conversation: Conversation, tokenizer: Tokenizer, config: Data) -> RenderedTurns:
    """A conversation up to the turn that `data.turn` names, and where the supervised turns stand in it.

    Where the template has `{% generation %}` marks, these say what the assistant wrote; else a turn is what stands
    between its own prompt and its end.

    Raises:
        DataError: no turn of the assistant, or the template writes one in another way than it was asked for.
    """
    place = conversation.place_of(config.turn)
    answers = conversation.answers if config.turn == "all" else [place]
    if not answers or place == len(conversation.messages):
        raise DataError("field 'messages': it does not end with a turn of the assistant, which would be supervised")
    whole = conversation.until(place + 1)
    if config.template == "plain":
        asked, answer = plain_text(whole.until(place)), f" {whole.messages[place]['content'].strip()}"
        return _with_contents(asked + answer, [(len(asked), len(asked) + len(answer))], whole)
    text = _chat(tokenizer, config, whole)
    if "generation %}" in str(tokenizer.chat_template) or "generation -%}" in str(tokenizer.chat_template):
        marked = _marked(tokenizer, config, whole)
        return _with_contents(text, marked if config.turn == "all" else marked[-1:], whole)
    end = _chat(tokenizer, config, asking(_PROMPT).and_then(_ANSWER)).partition(_ANSWER)[2]
    spans = []
    for answer in answers:
        before, after = _chat(tokenizer, config, whole.until(answer)), _chat(tokenizer, config, whole.until(answer + 1))
        check_begins(after, before, f"turn {answer}")
        check_begins(text, after.removesuffix(end), f"turn {answer}")
        spans.append((len(before), len(after) - (len(end) if after.endswith(end) else 0)))
    return _with_contents(text, spans, whole)


def _with_contents(text: str, turns: Sequence[Span], conversation: Conversation) -> RenderedTurns:
    contents, position = list(turns), 0
    for message in conversation.messages:
        content = message["content"].strip()
        start = text.find(content, position) if content else -1
        if start >= 0:
            position = start + len(content)
            contents.append((start, position))
    return RenderedTurns(text, tuple(turns), tuple(merged(contents)))


def check_begins(text: str, prompt: str, where: str) -> None:
    """See that an example begins with its prompt, character by character.

    Raises:
        DataError: it does not.
    """
    if not text.startswith(prompt):
        raise DataError(
            f"{where}: its example does not begin with its prompt, as the chat template writes past turns in another "
            f"way; set data.template_options for it, {'data.turn=last, ' if where.startswith('turn') else ''}or "
            "data.template=plain"
        )


def _answered(prompt: str, answer: str) -> Conversation:
    return asking(prompt).and_then(answer) if answer else asking(prompt)


def _marked(tokenizer: Tokenizer, config: Data, conversation: Conversation) -> list[Span]:
    """Where the `{% generation %}` marks of the template stand."""
    with_marks = {
        "tokenize": True,
        "return_dict": True,
        "return_assistant_tokens_mask": True,
        "tokenizer_kwargs": {"return_offsets_mapping": True},
    }
    rendered = apply_template(tokenizer, config, conversation, with_marks)
    mask, offsets = rendered["assistant_masks"], rendered["offset_mapping"]
    spans = [tuple(offset) for offset, kept in zip(offsets, mask, strict=True) if kept]
    return merged(spans)


def _chat(tokenizer: Tokenizer, config: Data, conversation: Conversation) -> str:
    return apply_template(tokenizer, config, conversation, {"tokenize": False})
