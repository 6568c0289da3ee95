"""Where a text can be negated by rule, and where a negation can be taken back: English and Chinese.

Decides the rules, and keeps to those that leave a sentence that people would write; where none applies, the text has no
site. English: copulas, modals and perfect auxiliaries with a word before them (a question that begins with its verb is
left alone), contractions, and `not` after any of these. Chinese: 不 and 没 before the verbs and adverbs listed, and
those verbs without them, where neither neighbour makes another word of them (但是, 机会, 所有 ...). The meaning of the
text changes, so its label may.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ratoon.text.edits import Site

_COPULAS = "am|is|are|was|were"
_MODALS = "can|could|will|would|shall|should|may|might|must"
_PERFECT = "has|have|had"
_PARTICIPLE = (
    r"(?:\w{2,}ed|been|become|begun|bought|broken|brought|built|caught|chosen|come|done|driven|eaten|fallen|felt|"
    r"forgotten|found|given|gone|got|gotten|heard|held|hidden|kept|left|lost|made|met|paid|put|read|risen|run|said|"
    r"seen|sent|set|sold|spent|spoken|stolen|stood|taken|taught|thought|told|won|written)"
)
_LONGEST_WORD = 40
"""Characters looked back for the word before a verb."""
_APOSTROPHE = "['\u2019]"
_ODD = {"won": "will", "can": "can", "shan": "shall"}
"""Verbs whose contraction has no n of its own before the apostrophe, and what they are without it."""
_NOUN_BEFORE = frozenset(re.findall(r"\w+", "a an the this that my your his her its our their no any some each every"))
"""After these, `can`, `will`, `might` and `must` are nouns."""
_QUESTION_BEFORE = frozenset(("how", "why", "when", "where", "what", "and", "or", "but", "if", "so"))
_SUBJECT_NEXT = r"(?![ \t]+(?:I|you|he|she|it|we|they|there|my|your|the|this|that|these|those|a|an)\b)"
"""What follows a verb that stands before its subject; after a word of the question the `not` would stand wrong."""

_BASE_NEXT = r"(?=[ \t]+(?!(?:and|or|of|is|was|were|that|which)\b)\w)"
"""After a modal comes a word, and none of those that follow a noun (a can of, his will and)."""

_TAKE_NOT = re.compile(
    rf"(?:\b(?:{_COPULAS}|{_MODALS}|{_PERFECT}|do|does|did)|{_APOSTROPHE}(?:s|m|re|ve|ll|d))"
    r"(?P<not>[ \t]+not)\b(?![ \t]+(?:only|just|merely|simply|least)\b)(?=[ \t]+\w)",
    re.IGNORECASE,
)
_TAKE_CONTRACTION = re.compile(
    rf"\b(?P<verb>is|are|was|were|could|would|should|must|has|have|had|do|does|did|won|can|shan)"
    rf"(?P<tail>n?{_APOSTROPHE}t)\b",
    re.IGNORECASE,
)
_CANNOT = re.compile(r"\b(can)not\b", re.IGNORECASE)
_PUT_NOT = re.compile(
    rf"(?<=[\w'\u2019)][ \t])"
    rf"(?P<verb>(?:{_COPULAS})\b|(?:{_MODALS})\b{_BASE_NEXT}|(?:{_PERFECT})\b(?=[ \t]+{_PARTICIPLE}\b))"
    rf"(?![ \t]+(?:not|never|no)\b)(?!{_APOSTROPHE})(?=(?P<after>{_SUBJECT_NEXT})?)"
)
_PUT_SHORT = re.compile(
    rf"\b(?:I{_APOSTROPHE}m|(?:you|we|they){_APOSTROPHE}re|(?:he|she|it|that|there){_APOSTROPHE}s"
    rf"|(?:I|you|we|they|he|she|it){_APOSTROPHE}ll)\b(?![ \t]+(?:not|never|no)\b)(?=[ \t]+\w)",
    re.IGNORECASE,
)

_BU: dict[str, tuple[str, str]] = {
    "是": ("不但可只于总还而要就老正若或真即硬凡先便倒算像", "非否的不吗吧啊呢么"),
    "会": ("不机社协一大开宴体学晚聚约工委年全省城教议再", "议员场计所长面谈见儿馆展不"),
    "能": ("不可功性智才职技热节动电核只产", "力源量否够手耐不"),
    "要": ("不重核主需纲只必摘首将提快", "求素闻领点件害不么是"),
    "想": ("不思理梦猜联着感设幻回", "法象像念到起不必"),
    **dict.fromkeys(("可以", "应该", "愿意", "喜欢", "支持", "同意", "相信", "知道", "值得"), ("不", "不")),
}
"""Verbs that 不 is put before or taken from, and the characters that before or behind them make another word (or
another negation) of it."""
_MEI = (
    "没未所具拥只还占富享共持国公私原含固惟唯稀仅少独现据专自另带该凡别仍",
    "限关效的些时益名利趣意机序助无望害力毒空着点没",
)
"""The same for 有 and its 没."""
_ALSO_AFTER_BU = "好|对|行|难|贵|快|敢|肯|应|该|很|太|再|大|够|算|必|需要|需|用|一定"
"""What 不 is taken from without being put before it elsewhere: too many words hold these characters."""

_PUT_BU = re.compile("|".join(f"(?<![{before}])(?={verb}(?![{after}]))" for verb, (before, after) in _BU.items()))
_PUT_MEI = re.compile(f"(?<![{_MEI[0]}])(?=有(?![{_MEI[1]}]))")
_TAKE_BU = re.compile(
    f"(?<![从无毫绝决莫得并要可好])不(?!错|好意思|对劲|大不小|用说)(?=(?:{'|'.join(_BU)}|{_ALSO_AFTER_BU}))"
)
_NOT_BAD = re.compile("不错")
"""Said of what is good; without its 不 nobody would say it."""
_TAKE_MEI = re.compile("(?<![有淹沉埋吞出])没(?=有(?!没))")


def sites(text: str) -> list[Site]:
    """Every place where a rule applies, in order, apart from each other; one choice each: the negation put in, or
    taken out."""
    found: list[Site] = []
    done = 0
    for site in sorted((*_english(text), *_chinese(text)), key=lambda site: (site.start, site.end)):
        if site.start >= done and not (found and site.start == found[-1].start):
            found.append(site)
            done = site.end
    return found


def _english(text: str) -> Iterator[Site]:
    for match in _TAKE_NOT.finditer(text):
        yield Site(match.start("not"), match.end("not"), ("",))
    for match in _TAKE_CONTRACTION.finditer(text):
        verb, has_n = match["verb"], match["tail"][0] in "nN"
        if has_n != (verb.lower() in _ODD):
            yield Site(match.start(), match.end(), (_cased_like(_ODD.get(verb.lower(), verb), verb),))
    for match in _CANNOT.finditer(text):
        yield Site(match.start(), match.end(), (match[1],))
    for match in _PUT_NOT.finditer(text):
        before = text[max(0, match.start() - _LONGEST_WORD) : match.start()].split()[-1].lower()
        is_noun = match["verb"] in ("can", "will", "might", "must") and before in _NOUN_BEFORE
        is_turned = match["after"] is None and before in _QUESTION_BEFORE
        if not (is_noun or is_turned):
            yield Site(match.end("verb"), match.end("verb"), (" not",))
    for match in _PUT_SHORT.finditer(text):
        yield Site(match.end(), match.end(), (" not",))


def _cased_like(word: str, pattern: str) -> str:
    """The word in the capitals of what it replaces."""
    if pattern.isupper():
        return word.upper()
    return word.capitalize() if pattern[0].isupper() else word


def _chinese(text: str) -> Iterator[Site]:
    for match in (*_TAKE_BU.finditer(text), *_TAKE_MEI.finditer(text)):
        asks = text[max(0, match.start() - 1) : match.start()] == text[match.end()]  # 是不是, 能不能
        if not asks:
            yield Site(match.start(), match.end(), ("",))
    for match in _NOT_BAD.finditer(text):
        yield Site(match.start(), match.end(), ("不好",))
    for match in _PUT_BU.finditer(text):
        yield Site(match.start(), match.start(), ("不",))
    for match in _PUT_MEI.finditer(text):
        yield Site(match.start(), match.start(), ("没",))
