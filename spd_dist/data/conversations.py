"""Rows of `messages`: turns, system, tools and their calls, checked when they are read; and which turn is asked for."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import jinja2

from spd_dist.config import Data
from spd_dist.data.readers import text_of
from spd_dist.data.text_files import shown
from spd_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from spd_dist.data.tasks.protocol import Example, Row
    from spd_dist.data.templates import Tokenizer

SWITCH = "enable_thinking"
"""What the templates of Qwen3, SmolLM3 and others call it."""
Turn = int | Literal["last", "first", "all"]
Message = Mapping[str, Any]
ASSISTANT = "assistant"
_SHARE_GPT = {"human": "user", "gpt": ASSISTANT, "system": "system", "user": "user", ASSISTANT: ASSISTANT}


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and the tools that they may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def answers(self) -> list[int]:
        """Where the assistant speaks."""
        return [place for place, message in enumerate(self.messages) if message["role"] == ASSISTANT]

    def until(self, place: int) -> Conversation:
        """What stands before a message."""
        return replace(self, messages=self.messages[:place])

    def and_then(self, answer: str) -> Conversation:
        """The same, answered."""
        return replace(self, messages=(*self.messages, {"role": ASSISTANT, "content": answer}))

    def under(self, system: str | None) -> Conversation:
        """The same behind a system message, if it has none of its own."""
        if system is None or (self.messages and self.messages[0]["role"] in ("system", "developer")):
            return self
        return replace(self, messages=({"role": "system", "content": system}, *self.messages))

    def until_last_answer(self) -> Conversation:
        """The same up to the last turn of the assistant: later ones ask for what the row does not hold.

        Raises:
            DataError: the assistant never speaks, or speaks first.
        """
        last = max(self.answers, default=0)
        if last == 0:
            raise DataError(
                "field 'messages': no turn of the assistant with a turn before it; end the row with what the model "
                "should say"
            )
        return self.until(last + 1)

    def place_of(self, turn: Turn) -> int:
        """Where the turn stands that is asked for: behind the last message, if that is not the assistant's.

        Raises:
            DataError: there is no such turn.
        """
        answers = self.answers
        if turn in ("last", "all"):
            is_answered = bool(self.messages) and self.messages[-1]["role"] == ASSISTANT
            return len(self.messages) - is_answered
        number = 0 if turn == "first" else int(turn)
        if not -len(answers) <= number < len(answers):
            raise DataError(
                f"data.turn: {turn} is not valid for a conversation with {len(answers)} turns of the assistant; they "
                "count from 0, and from -1 backwards"
            )
        return answers[number]


@runtime_checkable
class Conversing(Protocol):
    """The seam for tasks whose rows are conversations, beside `Task`."""

    @property
    def mask(self) -> str:
        """The mask that `calibrate.mask=task` means: of a turn, behind all that stands before it."""
        ...

    def conversation(self, row: Row) -> Conversation | None:
        """The row's messages; None if it is a prompt and its answer."""

    def answer(self, row: Row) -> str:
        """As `Task.answer`."""
        ...


def conversation_of(row: Row, task: Example) -> Conversation | None:
    """The messages of a row, with its reference answer as their last turn if they have none; None if it has none."""
    found = task.conversation(row) if isinstance(task, Conversing) else None
    if found is None or found.messages[-1]["role"] == ASSISTANT or not task.answer(row):
        return found
    return found.and_then(task.answer(row).strip())


def read_conversation(messages: Any, tools: Any = None) -> Conversation:
    """Messages of a row: `role` and `content`, or ShareGPT's `from` and `value`; arguments of tools may be JSON.

    Raises:
        DataError: they are not of this form.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"field 'messages': {shown(messages)} must be a list of objects with role and content")
    read = tuple(_read_message(message, number) for number, message in enumerate(messages))
    if isinstance(tools, str):
        tools = _parsed(tools)
    tools = tools or []
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"field 'tools': {shown(tools)} must be a list of objects, as JSON schemas of functions")
    return Conversation(read, tuple(_without_none(tool) for tool in tools))


def _read_message(message: Any, number: int) -> Message:
    where = f"field 'messages', message {number}"
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: {shown(message)} must be an object with role and content")
    read: dict[str, Any] = _without_none(message)
    if "role" not in read and "from" in read:
        read = {"role": _SHARE_GPT.get(str(read["from"]), read["from"]), "content": read.get("value")}
    if not isinstance(read.get("role"), str):
        raise DataError(f"{where}: its role {shown(read.get('role'))} must be text, as system, user, assistant or tool")
    if read.get("tool_calls"):
        read["tool_calls"] = [_read_call(call, where) for call in read["tool_calls"]]
    content: Any = read.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        text = "".join(str(part["text"]) for part in content)
    else:
        text = text_of(content)
    if text is None and read.get("tool_calls"):
        text = ""
    if text is None:
        raise DataError(f"{where}: its content {shown(content)} must be text")
    return {**read, "content": text}


def _read_call(call: Any, where: str) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: {shown(call)} is no call of a tool; write {{'function': {{'name', 'arguments'}}}}")
    arguments = function.get("arguments", {})
    arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_none(value: Any) -> Any:
    """Without the empty fields that columns of a table give every object."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def plain_text(conversation: Conversation) -> str:
    """The form of a conversation without a chat template: after it the answer stands."""
    turns = (f"{one['role']}: {one['content'] or one.get('tool_calls', '')}\n\n" for one in conversation.messages)
    return "".join(turns) + "assistant:"


def as_text(messages: Sequence[Message]) -> str:
    """Messages as lines for people, and for the search for copies."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def apply_template(tokenizer: Tokenizer, config: Data, conversation: Conversation, options: Mapping[str, Any]) -> Any:
    """What a tokenizer's chat template makes of a conversation: its text, or its tokens if `options` ask for them.

    Raises:
        ConfigError: there is no template, it has no place for tools, refuses a role, or fails.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "data.template: 'chat' is not valid, as this tokenizer has no chat template; set data.template=plain"
        )

    def apply(system: str | None, asked: Conversation) -> Any:
        turns = asked.under(system).messages
        is_asked = turns[-1]["role"] != "assistant"
        tools = {"tools": list(asked.tools)} if asked.tools else {}
        switch = {SWITCH: False} if config.thinking == "off" else {}
        ours = {"add_generation_prompt": is_asked, **tools, **_dated(tokenizer, config), **options}
        return tokenizer.apply_chat_template(list(turns), **ours | switch | config.template_options)

    try:
        rendered = apply(config.system, conversation)
        if conversation.tools and rendered == apply(config.system, replace(conversation, tools=())):
            raise ConfigError(
                "data.template: 'chat' is not valid for rows with tools, as this tokenizer's chat template has none; "
                "remove `tools` from the rows, or take a model whose template knows them"
            )
        return rendered
    except ConfigError:
        raise
    except _FAULTS as error:
        fault = " ".join(str(error).split()) or type(error).__name__
        if config.system is not None and _works(lambda: apply(None, conversation)):
            raise ConfigError(
                f"data.system: {config.system!r} is refused by the chat template of this model: {fault}; unset "
                "data.system, and put it into the prompt"
            ) from error
        raise ConfigError(
            f"data.template: the chat template of this model fails on the roles "
            f"{', '.join(str(message['role']) for message in conversation.messages)}: {fault}; set "
            "data.template_options or data.template=plain, or correct its chat_template"
        ) from error


_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template may end in: its own words, or Python's."""


def _works(render: Callable[[], Any]) -> bool:
    try:
        render()
    except _FAULTS:
        return False
    return True


def _dated(tokenizer: Tokenizer, config: Data) -> dict[str, str]:
    """A template that asks for the day, and is told the same one in every stage, attempt and arm."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template:
        return {}
    day = datetime.date.fromisoformat(config.date)
    told = "".join(f".replace('%{code}', '{day.strftime('%' + code)}')" for code in "dbBYmyjaA")
    return {"chat_template": f"{{%- macro strftime_now(form) -%}}{{{{ form{told} }}}}{{%- endmacro -%}}{template}"}
