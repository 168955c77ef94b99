"""What of a model's output is its answer: not what it thinks before, and not one of several that differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_MARKS = (
    (re.compile(r"<(?:(?:seed:)?think|thinking|thoughts?|reasoning|scratchpad|reflection|analysis)>", re.IGNORECASE),
     re.compile(r"</(?:(?:seed:)?think|thinking|thoughts?|reasoning|scratchpad|reflection|analysis)>", re.IGNORECASE)),
    (re.compile(r"\u25c1think\u25b7"), re.compile(r"\u25c1/think\u25b7")),
    (re.compile(r"<\|START_THINKING\|>"), re.compile(r"<\|END_THINKING\|>")),
    (re.compile(r"\[THINK\]"), re.compile(r"\[/THINK\]")),
    (re.compile(r"<\|channel\|>analysis"), re.compile(r"<\|channel\|>final(?:<\|message\|>)?")),
    (re.compile(r"\Aanalysis(?=[A-Z])"), re.compile(r"assistantfinal")),  # gpt-oss, without its special tokens
    (re.compile(r"<\|begin_of_thought\|>"), re.compile(r"<\|end_of_thought\|>")),
)  # fmt: skip
TURNED = re.compile(
    r"\b(?:wait|no(?=[,.!\s]*\n|[,.!])|nope|actually|correction|corrected|sorry|mistake|oops"
    r"|scratch that|let me (?:re|fix))",
    re.IGNORECASE,
)
"""What takes an earlier answer back."""


_END_MARK = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|endoftext|end_of_text|end_of_turn|start_header_id|end|return|user)\|>"
    r"|</s>|<eos>|<(?:end|start)_of_turn>|\[/?INST\]|<\uff5c(?:end\u2581of\u2581sentence|User)\uff5c>"
)
"""Marks of an end that stand in the text itself: what follows was not meant to be read."""
_HEAD = re.compile(
    r"\s*(?:<\|im_start\|>\s*assistant|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>|<start_of_turn>\s*model"
    r"|<\|assistant\|>|\[/INST\])\s*"
)
"""The head of its own turn, which a model repeats."""
_CALL = re.compile(
    r"<(tool_call|function_call)>.*?(?:</\1>|\Z)|(?:\[TOOL_CALLS\]|<\|python_tag\|>|<\|tool_call\|>).*"
    r"|\{\s*\"name\"\s*:\s*\"[^\"\n]*\"\s*,\s*\"(?:arguments|parameters)\"\s*:.*",
    re.DOTALL,
)
"""A call of a tool, which asks and does not answer."""
_INVISIBLE = re.compile(r"[\u200b\u2060\ufeff]")
"""Spaces without width, and byte order marks."""
_NEXT_QUESTION = re.compile(
    r"\n\s*+(?:[*_#>]++[ \t]*+)*+"
    r"(?:(?:(?:Next|New|Another)\s+)?(?:Question|Q|Problem|Exercise|Human|User|Instruction)\s*\d*[*_]*\s*[:\uff1a]"
    r"|The following are multiple choice questions\b|\[(?:Question|Problem)\])"
)


MOST_MARKS = 60
_RUN = re.compile(rf"\W{{{2 * MOST_MARKS},}}")
"""Marks, spaces and empty lines that a model could not stop writing: each pattern would try them from every place."""
MIN_ECHO = 12
"""Characters of a question that is looked for at the beginning of its answer."""


class Spoken(NamedTuple):
    """What a model said after it had thought."""

    text: str
    is_unfinished: bool
    """Its thought was cut: there is no answer."""


def with_known_marks(output: str, marks: Sequence[str], prompt: str = "") -> str:
    """`output` with `marks`, the user's [open, close], as known ones, and with the mark that its prompt opened it with.

    A template that ends the prompt in `<think>` has the model begin inside of a thought: without a closing mark all of
    it is one.
    """
    open_mark, close_mark = "<think>", "</think>"
    if marks:
        output, prompt = (text.replace(marks[1], close_mark).replace(marks[0], open_mark) for text in (output, prompt))
    begun = prompt.rstrip()
    for opening, _ in _MARKS:
        last = list(opening.finditer(begun))
        if last and last[-1].end() == len(begun):
            return last[-1].group() + output
    return output


def is_thinking_mark(token: str, marks: Sequence[str]) -> bool:
    """Whether a special token is, or is part of, a mark of thinking: it must not vanish from what is judged."""
    known = token in marks or token in ("<|channel|>", "<|message|>")
    return known or any(pattern.fullmatch(token) for pair in _MARKS for pattern in pair)


def without_thoughts(output: str) -> Spoken:
    """The part of `output` that answers: what stands between the marks of thinking never does."""
    text = _INVISIBLE.sub("", output)
    for opening, closing in _MARKS:
        closed = list(closing.finditer(text))
        if closed:
            text = text[closed[-1].end() :]
        if opening.search(text):
            return Spoken("", is_unfinished=True)
    text = _CALL.sub("", text[head.end() :] if (head := _HEAD.match(text)) else text)
    ended = _END_MARK.search(text)
    return Spoken(text[: ended.start()] if ended else text, is_unfinished=False)


def until_next_question(text: str, asked: str = "") -> str:
    """What stands before a next question that the model went on to ask itself (lm-evaluation-harness stops there).

    The question that was `asked` may be repeated before the answer. A long run without letter or digit comes back cut.
    """
    echo = text.find(asked.strip()) if len(asked.strip()) >= MIN_ECHO else -1
    is_echoed = echo >= 0 and not re.search(r"\d|\banswer\b", text[:echo], re.IGNORECASE)
    text = text[echo + len(asked.strip()) :] if is_echoed else text
    text = _RUN.sub(lambda run: run[0][:MOST_MARKS] + run[0][-MOST_MARKS:], text)
    begun = re.search(r"\S", text)
    if begun is None:
        return text
    following = _NEXT_QUESTION.search(text, 0 if is_echoed else begun.end())
    return text[: following.start()] if following else text


def closings(text: str) -> list[tuple[int, int]]:
    """The marks that end a thought, as spans of `text`, in their order."""
    return sorted(match.span() for _, closing in _MARKS for match in closing.finditer(text))


def opened_by(prompt: str, marks: Sequence[str]) -> str:
    """The mark of thinking that a prompt ends with; empty if it does not."""
    return with_known_marks("", marks, prompt)


def settled(given: Sequence[tuple[int, str | None]], text: str, same: Callable[[str, str], bool]) -> str | None:
    """The one answer of all that were given, each with its place in `text`; None where they differ.

    The last one counts where the text before it takes the earlier ones back.
    """
    answers = [one for _, one in given]
    if not answers:
        return None
    first, last = answers[0], answers[-1]
    if first is not None and all(one is not None and same(one, first) for one in answers):
        return first
    is_taken_back = len(given) > 1 and TURNED.search(text, given[-2][0], given[-1][0]) is not None
    return last if is_taken_back else None
