"""What people say around an answer: that a letter is one or none, in several languages, refusals and farewells."""

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
    r"\b(?i:wrong|incorrect|worst|false) (?:answer|option|choice|one|letter)\s*(?:is|:|=)\s*\(?[A-Z]\)?(?!\w)|"
    r"\b(?i:not|isn't|neither|nor|never|rather than|instead of|rule out|eliminate)\s+"
    r"(?:only )?(?:option |choice |answer:? )?"
    r"\(?[A-Z]\)?(?=[\s.,;:)]|$)(?:,?\s+but\b)?"
    r"|(?<!\w)\(?[A-Z]\)?\s*[:=]\s*(?:no|wrong|incorrect|false)\b"
    r"|(?<!\w)\(?[A-Z]\)?(?:[.:]?[ \t]+(?![A-Z]\b)[\w']+){0,4}?[ \t]+(?:is|are|was|seems|would be)\s+"
    r"(?:(?:the |an? )?(?:only |most )?"
    r"(?:not(?=\s+(?:an?\b|it\b|the (?:right|correct|best|answer)|correct|right|true|supported|possible|likely)|\W*$)"
    r"|wrong|incorrect|false|out|distractor|trap)"
    r"|(?:an? |also |very )*(?:tempting|plausible))\b"
    r"|(?<!\w)(?!I\s)\(?[A-Z]\)?\s+(?:can't|cannot|can not|couldn't|could not|doesn't|does not|won't)\b"
    rf"|(?<!\w)\(?[A-Z]\)?\s+{_BE}\s+(?:nicht|falsch|fausse?|incorrect\w*|errad[ao]|sbagliat[ao])\b"
    r"|(?:\b(?i:not|never)|n't)\s+(?:choose|pick|select|go with|say|answer)\s+(?:option )?\(?[A-Z]\)?(?!\w)"
    r"|\b(?i:people|students?|person|child|candidate|many|most|some|others|someone|anyone)\b(?:(?!\b(?:I|we)\b)[^.\n]){0,40}?"
    r"\b(?:choose|pick|select|say|go with|think)\s+(?:option )?\(?[A-Z]\)?(?!\w)"
    r"|\b(?<![Nn]o )(?<![Ww]ithout )(?<![Ww]ithout a )(?<![Bb]eyond )(?<![Bb]eyond a )"
    r"(?i:doubt|don't think|do not think|don't believe|unlikely"
    r"|not (?:sure|certain|confident|convinced))\b[^.\n]{0,30}?(?<!\w)\(?[A-Z]\)?(?!\w)"
    r"|\b(?i:anything|everything|all|any) (?:but|except)\s+(?:option |choice )?\(?[A-Z]\)?(?!\w)"
    r"|(?<!\ba )\b(?i:while|although|though)\s(?:[^,.;\n]*(?<!\w)[A-Z](?!\w)[^,.;\n]*,"
    r"|(?:(?!\banswer\b)[^,.;\n])*(?<!\w)(?!I\b)[A-Z](?!\w)(?:(?!\banswer\b)[^,.;\n])*(?=[.;\n]|$))"
)
"""What an answer is not: `not A but`, `A is wrong`, `many would choose A`, `while A seems right`."""
ANSWER = (
    r"\b(?:[Aa](?:nswer|NSWER)\b(?:[\"']|(?: to [^.\n:]{1,60}?)?)|[Aa]ns\.?(?=[\s:=])"
    r"|(?:(?:correct|right|best) )?(?<![Ee]ach )(?<![Ee]very )(?<![Aa]ny )(?<![Ww]hich )(?<![Ff]ollowing )"
    r"(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Gg]uess|one)\"?(?=\s*(?:is|was|:|=))"
    r"|[Ff]inal(?=\s*:)"
    r"|(?:[Ss]olution|[Oo]utput|[Rr]esult|[Rr]esponse)(?=\s*:\W*[A-Za-z]\W*(?:\n|$)))"
    r"\s*(?:is|was|would be|must be|should be|has to be|:|=|-|\u2014)(?:\s+but\b)?\W*?"
    r"(?:(?:the |an? )?(?:correct |right |best )?(?:option|choice|letter|answer)\b[\s:]*(?:is\b)?\W*)?"
)
FOREIGN = (
    rf"(?:(?i:(?:{ANSWER_WORDS}|\b{_OPTION})(?: {_CORRECT})?\s*(?:{ANSWER_VERBS}|\u2014))"
    r"|\b[Rr]ichtig ist|\b[Cc]'est|\bIch w\u00e4hle"
    r"|(?<!\u4e0d)[\u9009\u9078](?:[\u62e9\u64c7]|[\u9879\u9805][\u662f\u4e3a\u70ba])?)\W*?"
    rf"(?:(?:la|a|de|het|die)\s+)?(?:(?i:letra|lettre|lettera|{_OPTION}|option|{ANSWER_WORDS})\s+)?"
)
AFTER_OPENING = (
    r"(?=[).:,;\]\"*/]|\s*\(|\s*=\s*[A-Z]?[a-z]{2}|\s*[-\u2014]\s|\s*\n|\s*$|\s+(?:or|and|&|/)\s"
    r"|\s+(?:because|since|as|it is)\b)"
)
CHOSEN = (
    r"\b(?:(?:I|we)(?:'d| would|'ll| will|'m| am|'re| are)? (?:choose|chose|pick|select|go(?:ing)? with|say|answer)"
    r"|(?<!might )(?<!could )(?<!may )(?<!can )(?<!not )(?<!n't )"
    r"(?:[Cc]hoose|chose|[Pp]ick|[Ss]elect|[Gg]o(?:ing)? with))"
    r"\s+(?:the )?(?:option |choice |letter |answer )?"
)
IT_IS = (
    r"\b(?:[Ii]t|[Tt]hat|[Tt]his|[Ww]hich)(?:'s| is| must be| should be|(?<=[Tt]hat) would be| has to be)\s+"
    r"(?:(?:option|choice|letter|answer) )?"
)
CONCLUDED = (
    r"\b(?i:so|therefore|thus|hence|clearly|definitely|certainly|probably|likely|obviously|of course),?"
    r"\s+(?:the )?(?:option |choice |letter )?"
)
HEADED = r"(?m:^)\W*(?i:(?:the )?(?:final |correct )?answer)[ \t]*\n\s*"
"""A heading with the answer below it."""
IS_IN_BRACKETS = (
    r"(?m:^)(?:(?!\b(?:wrong|incorrect|false|not|least|except|trap|tempting)\b|n't\b)[^.\n])*\bis:?\s+(?=\()"
)
"""`The sentence with the right order is (B)`."""
OPTION = rf"^\W*(?i:{_OPTION})\s+"
IS_RIGHT = (
    r"(?:(?:is|must be|seems|would be) (?:(?:the |my |our )?(?:only )?"
    r"(?:correct|right|best|true|answer|most (?:plausible|likely|accurate|appropriate|suitable|reasonable))"
    r"|the (?:only )?one\b(?!\s+of))"
    rf"|(?:fits|matches) (?:better|best)|{_BE} (?:la |le |die |a |o )?{_CORRECT})"
    r"(?!\s+(?:if|not|wrong|incorrect|false|un\w+)\b)"
)
NO_DENIAL = r"(?!(?i:no|n\u00e3o|non|nicht|pas|not|never|n'est)\b)"
"""In front of each word between a letter and its praise."""
TAKEN_BACK = r"\b(?i:no|wait|actually|sorry|rather)[,:.!]\s+(?:I meant? |make that )?"
NO_WORD = r"(?![A-Za-z\u00c0-\u052f\d_?]|'\w|[-+](?=\w|[\s.]*$))"
"""What stands behind is no part of the same word; scripts without spaces may follow."""
END = r"(?=\s*(?:[.,;:!)*\"]|$|\n)|\s+(?:because|since|as)\b)"
CLAUSE = re.compile(
    r"(?:^|[^\w\s]|\n|\b(?i:option|choice|answer|letter|statement|so|thus|therefore|hence|that|think|believe|but|yet|and"
    rf"|then|is|obviously|clearly|because|only|{_OPTION}|{ANSWER_WORDS}))\s*$"
)
"""What may stand before a letter that is the subject of a clause; in `Vitamin B` it belongs to a name."""
DENIED = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|wrong|incorrect|false|except|than|unlike|if|could|might|may)\b|n't\b"
)
"""In a sentence with one of these a choice's text is no answer."""
CLOSING = re.compile(
    r"\n\W*(?:let me know|(?:I )?hope (?:this|that|it)|feel free|would you like|is there anything|do you have"
    r"|if you (?:have|need)[^\n]*\b(?:questions?|help|clarification))\b[^\n]*\s*\Z",
    re.IGNORECASE,
)
"""What an assistant says at the end, whatever was asked."""
REFUSED = re.compile(
    r"\W*(?:there (?:is|are) )?(?:not enough|insufficient) (?:information|data)\b|"
    r"\W*(?:(?:I'm|I am|We're) (?:so |very )?sorry|sorry|as an AI\b[^.,\n]*|unfortunately|I apologi[sz]e)?[,.:]?\s*"
    r"(?:but )?(?:I|we)(?: (?:can't|cannot|can not|won't)|(?: am| are|'m|'re) (?:unable|not able)) (?:to )?"
    r"(?:help|assist|answer|solve|determine|provide|do (?:that|this|it)|comply|complete)\b",
    re.IGNORECASE,
)
"""How a refusal begins."""
OUT_OF = re.compile(r" (?:[a-z]+ ){0,3}?(?:out of|left (?:over )?(?:from|of|out of)) [$]?\d[\d,.]*(?=\W*$| [a-z])")
"""`5 out of 12`: what the answer is a part of."""
SUM_IN_BRACKETS = re.compile(
    r"\(\s*[$]?\d[\d.,]*(?: [a-z]+)?(?:\s*(?:[-+*/]|\bx\b)\s*[$]?\d[\d.,]*(?: [a-z]+)?)+\s*\)", re.IGNORECASE
)
_CLAUSE_OF_ITS_OWN = r"(?:so|and|then|is|was|makes|gives|which|that|leaving|leaves|equals|he|she|they|it|we|but)\b"
_OF_WHAT = (
    r"(?:for(?! [$])|on|(?<!results )(?<!resulting )in|at|(?<!total )(?<!sum )of|from|after(?: [a-z]+ing)?"
    r"|(?<!left )(?<!up )(?<!him )(?<!her )(?<!them )with|over|during|within|every)"
)
BESIDE = re.compile(
    rf"(?<=[\d%])(?: (?!{_CLAUSE_OF_ITS_OWN})[A-Za-z]+){{0,6}}? {_OF_WHAT}"
    r"(?: (?:the|all|these|those|her|his|their|end of))* [$]?\d[\d.,]*%?(?: [A-Za-z]+){0,5}(?=\W*$)"
    r"|(?<=\d)(?: [A-Za-z]+){1,6} (?:in|of|since) (?:19|20)\d\d(?=\W*$)"
    r"|(?<=\d)(?: [a-z]+){0,3}: \d+ [a-z]+(?:, \d+ [a-z]+)*,? and \d+ [a-z]+(?=\W*$)"
    r"|(?<=\w) \((?:[a-z]|\d[\d.,]*(?: [A-Za-z]+){2})[^()\n]*\)(?=\W*$)"
)
"""What a number at the end belongs to that is not the answer: `$64 for the 16 glasses`, `$10 in 50 minutes`."""
_JUDGED = re.compile(
    r"^([^\w\n]*+[A-Z][).:](?:[^\n]*?(?:[.:(\u2014-](?![.:(\u2014-])|\bis))?[^\w\n]*+)\b(?:(?i:(correct|right|true)|incorrect|wrong|false))\W*$",
    re.MULTILINE,
)
"""A line about one choice that ends in a word about it: `A. Berlin - the capital of Germany. Incorrect.`"""
_TICK, _CROSS = r"[\u2705\u2713\u2714\u2611]|\[[xX]\]", r"[\u274c\u2717\u2718\u2716\u2612]|\[ \]"


def ticked(text: str) -> str:
    """Of lines that a tick or a cross marks only those with a tick, without it, and what is said to be the answer."""
    if len(_JUDGED.findall(text)) > 2:
        text = _JUDGED.sub(lambda line: line[1] + ("\u2713" if line[2] else "\u2717") + "\n", text)
    if not re.search(_TICK, text):
        return text
    text = re.sub(rf"([A-Z][).:][^\n]*?(?:{_TICK}|{_CROSS})\ufe0f?)[ \t]+(?=\(?[A-Z][).:])", r"\1\n", text)
    lines = [
        line
        if re.search(_TICK, line) or not re.search(rf"{_CROSS}|^\W*[A-Za-z][).:](?:\s|$)", line)
        else "".join(re.findall(r"\banswer\b.*", line, re.IGNORECASE))
        for line in text.splitlines()
    ]
    lines = [re.sub(r"^\W*(?=[A-Z][).:])", "Answer: ", line) if re.search(_TICK, line) else line for line in lines]
    return re.sub(rf"[ \t]*-?[ \t]*(?:{_TICK})\ufe0f?[ \t]*", " ", "\n".join(lines))
