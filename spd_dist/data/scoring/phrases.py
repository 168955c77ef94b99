"""What people say around the letter of a choice: that it is the answer, that it is none, in several languages."""

from __future__ import annotations

import re

ANSWER_WORDS = (
    r"(?:\b(?:antwort|antwoord|l\u00f6sung|r[\u00e9e]ponse|respuesta|resposta|risposta|svar(?:et)?|cevap|odpowied\u017a"
    r"|\u043e\u0442\u0432\u0435\u0442|\u0627\u0644\u0625\u062c\u0627\u0628\u0629|\u0627\u0644\u062c\u0648\u0627\u0628)\b"
    r"|\u7b54\u6848|\u7b54\u3048|\u6b63\u89e3|\uc815?\ub2f5|\u0909\u0924\u094d\u0924\u0930)"
)
"""`answer` in other languages."""
ANSWER_VERBS = (
    r"(?:ist|lautet|is|est|es(?: la| el)?|\u00e9|\u00e8|\u00e4r|to\b|\u662f|\u4e3a|\u70ba|\u306f|\u9009|\u9078|\uc740"
    r"|\u0647\u064a|\u0647\u0648|=|:|\uff1a)"
)
_OPTION = r"(?:opci[o\u00f3]n|op[c\u00e7][a\u00e3]o|opzione)"
_CORRECT = r"(?:correct[aeo]?|corrett[ao]|corret[ao]|richtig\w*|bonne|\u0627\u0644\u0635\u062d\u064a\u062d\u0629)"
_BE = r"(?:ist|est|es|\u00e9|\u00e8)"
NEGATED = re.compile(
    r"\b(?i:not|isn't|neither|nor|never|rather than|instead of|rule out|eliminate)\s+(?:option |choice |answer )?"
    r"\(?[A-Z]\)?(?=[\s.,;:)]|$)(?:,?\s+but\b)?"
    r"|(?<!\w)\(?[A-Z]\)?\s*[:=]\s*(?:no|wrong|incorrect|false)\b"
    r"|(?<!\w)\(?[A-Z]\)?(?:[.:]?[ \t]+(?![A-Z]\b)[\w']+){0,4}?[ \t]+(?:is|are|was|seems)\s+"
    r"(?:(?:the |an? )?(?:only |most )?(?:not|wrong|incorrect|false|out|distractor|trap)"
    r"|(?:an? )?(?:tempting|plausible))\b"
    r"|(?<!\w)(?!I\s)\(?[A-Z]\)?\s+(?:can't|cannot|can not|couldn't|could not|doesn't|does not|won't)\b"
    rf"|(?<!\w)\(?[A-Z]\)?\s+{_BE}\s+(?:nicht|falsch|fausse?|incorrect\w*|errad[ao]|sbagliat[ao])\b"
    r"|\b(?i:people|students|many|most|some|others|someone|anyone)\b(?:(?!\b(?:I|we)\b)[^.\n]){0,40}?"
    r"\b(?:choose|pick|select|say|go with|think)\s+(?:option )?\(?[A-Z]\)?(?!\w)"
    r"|\b(?<![Nn]o )(?<![Ww]ithout )(?<![Ww]ithout a )(?<![Bb]eyond )(?<![Bb]eyond a )"
    r"(?i:doubt|don't think|do not think|don't believe|unlikely)\b[^.\n]{0,30}?(?<!\w)\(?[A-Z]\)?(?!\w)"
    r"|\b(?i:anything|everything|all|any) (?:but|except)\s+(?:option |choice )?\(?[A-Z]\)?(?!\w)"
    r"|\b(?i:while|although|though)\s[^,.;\n]*(?<!\w)[A-Z](?!\w)[^,.;\n]*,"
)
"""What an answer is not: `not A but`, `A is wrong`, `many would choose A`, `while A seems right`."""
ANSWER = (
    r"\b(?:[Aa](?:nswer|NSWER)\b(?:\"|(?: to [^.\n:]{1,60}?)?)|[Aa]ns\.?(?=[\s:=])"
    r"|(?:(?:correct|right|best) )?(?<!each )(?<!every )(?<!any )(?<!which )(?<!following )"
    r"(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Gg]uess|one)\"?(?=\s*(?:is|was|:|=))"
    r"|[Ff]inal(?=\s*:))\s*(?:is|was|would be|must be|should be|:|=|-|\u2014)(?:\s+but\b)?\W*?"
    r"(?:(?:the |an? )?(?:correct |right |best )?(?:option|choice|letter|answer)\b[\s:]*(?:is\b)?\W*)?"
)
FOREIGN = (
    rf"(?:(?i:(?:{ANSWER_WORDS}|\b{_OPTION})(?: {_CORRECT})?\s*(?:{ANSWER_VERBS}|\u2014))"
    r"|\b[Rr]ichtig ist|\b[Cc]'est|\bIch w\u00e4hle"
    r"|(?<!\u4e0d)[\u9009\u9078](?:[\u62e9\u64c7]|[\u9879\u9805][\u662f\u4e3a\u70ba])?)\W*?"
    rf"(?:(?:la|a|de|het|die)\s+)?(?:(?i:letra|lettre|lettera|{_OPTION}|option|{ANSWER_WORDS})\s+)?"
)
AFTER_OPENING = (
    r"(?=[).:,;\]\"*/]|\s*[=(]|\s*[-\u2014]\s|\s*\n|\s*$|\s+(?:or|and|&|/)\s"
    r"|\s+(?:is|because|since|as|seems|would|it is)\b)"
)
CHOSEN = (
    r"\b(?:(?:I|we)(?:'d| would|'ll| will)? (?:choose|chose|pick|select|go with|say)"
    r"|[Cc]hoose|chose|[Pp]ick|[Ss]elect|[Gg]o with)"
    r"\s+(?:the )?(?:option |choice |letter |answer )?"
)
IT_IS = (
    r"\b(?:[Ii]t|[Tt]hat|[Tt]his|[Ww]hich)(?:'s| is| must be| should be| has to be)\s+"
    r"(?:(?:option|choice|letter|answer) )?"
)
CONCLUDED = (
    r"\b(?i:so|therefore|thus|hence|clearly|definitely|certainly|obviously|of course),?"
    r"\s+(?:the )?(?:option |choice |letter )?"
)
HEADED = r"(?m:^)\W*(?i:(?:the )?(?:final |correct )?answer)[ \t]*\n\s*"
"""A heading with the answer below it."""
OPTION = rf"^\W*(?i:{_OPTION})\s+"
IS_RIGHT = rf"(?:(?:is|must be|seems) (?:the )?(?:correct|right|best|true)|{_BE} (?:la |le |die |a |o )?{_CORRECT})"
NO_DENIAL = r"(?!(?i:no|n\u00e3o|non|nicht|pas|not|never|n'est)\b)"
"""In front of each word between a letter and its praise."""
TAKEN_BACK = r"\b(?i:no|wait|actually|sorry|rather)[,:.!]\s+"
NO_WORD = r"(?![A-Za-z\u00c0-\u052f\d_'?])"
"""What stands behind is no part of the same word; scripts without spaces may follow."""
END = r"(?=\s*(?:[.,;:!)*\"]|$|\n)|\s+(?:because|since|as)\b)"
CLAUSE = re.compile(
    r"(?:^|[^\w\s]|\n|\b(?i:option|choice|answer|letter|statement|so|thus|therefore|hence|that|think|believe|but|and"
    rf"|then|is|obviously|clearly|because|only|{_OPTION}|{ANSWER_WORDS}))\s*$"
)
"""What may stand before a letter that is the subject of a clause; in `Vitamin B` it belongs to a name."""
DENIED = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|wrong|incorrect|false|except|than|unlike|if|could|might|may)\b|n't\b"
)
"""In a sentence with one of these a choice's text is no answer."""
_TICK, _CROSS = r"[\u2705\u2713\u2714\u2611]|\[[xX]\]", r"[\u274c\u2717\u2718\u2716\u2612]|\[ \]"


def ticked(text: str) -> str:
    """Of lines that a tick or a cross marks only those with a tick, without it, and what is said to be the answer."""
    if not re.search(_TICK, text):
        return text
    lines = [
        line
        if re.search(_TICK, line) or not re.search(rf"{_CROSS}|^\W*[A-Za-z][).:](?:\s|$)", line)
        else "".join(re.findall(r"\banswer\b.*", line, re.IGNORECASE))
        for line in text.splitlines()
    ]
    return re.sub(rf"[ \t]*-?[ \t]*(?:{_TICK})\ufe0f?[ \t]*", " ", "\n".join(lines))
