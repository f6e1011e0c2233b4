"""The words of a caption as its metrics count them: those of the Penn Treebank, lower-cased, without punctuation.

Published figures are counted on the words that the tokenizer of Stanford CoreNLP 3.4.1 finds, which is written in Java. This one gives the
same for what is found in captions; mark-up, files' names, telephone numbers and faces of more than three signs are read as they come.
"""

from __future__ import annotations

import re

# A full stop stays with: these, single letters, and (ca, fig, no ...) what a number follows. A capital is needed where one is written.
_ABBREVIATED = (
    r"(?i:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri"
    r"|ala|ariz|calif|colo|conn|ct|dak|del|fla|ga|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo"
    r"|inc|cos?|corp|ltd|plc|bancorp|dept|assn|univ|intl|jr|sr|bros|ph\.d|ed\.d|blvd|rd|esq|etc|al|est|ext|sq|tel|ft|mt"
    r"|mr|mrs|ms|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?|ave|pres|lieut|hon|brig"
    r"|co?mdr|pfc|spc|supts?|det|vs|cf|alex|wm|jos|cie)|Ark|Mass|Miss|Tex|Wash|Ill"
)
_BEFORE_A_NUMBER = r"(?i:ca|figs?|prop|nos?|art|bldg|pp|op)"
_SPLIT = {"can": "not", "gon": "na", "got": "ta", "wan": "na", "lem": "me", "gim": "me"}  # cannot → can, not
_MARKS = (  # accents and vowel signs that follow a letter
    "\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed"
    "\u0711\u0730-\u074a\u0900-\u0963\u0966-\u0dff\u0e31-\u0ecd\u0f18-\u0fc6"
)
_LETTER = rf"(?:[^\W\d_]|[{_MARKS}])"
_SIGN = rf"(?:[^\W_]|[{_MARKS}])"
_TWO = "|".join(map("".join, _SPLIT.items()))
_FIRST = "|".join(f"{first}(?={second}\\b)" for first, second in _SPLIT.items())
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_TOKEN = re.compile(
    rf"""
      (?!(?i:{_TWO})\b)[A-Za-z]{{2,}}(?=[\s,]|$)                  # what most captions consist of
    | (?:https?://|www\.)[^\s"<>|]+[^\s"<>|.!?(){{}},:;-]
    | [\w.+-]{{0,64}}\w@\w+(?:\.\w+)* | [@\#][A-Za-z]\w*
    | </?[A-Za-z][\w-]*/?>
    | (?i:{_FIRST} | '[t](?=(?:is|was)\b) | {_LETTER}+?(?=n't\b) | n't\b | '(?:[msd]|re|ve|ll)\b)
    | (?i:'n' | (?<!\w)'n\b | \b(?:y|[ldj])'(?!\w) | \by'(?=all\b|know\b) | \b(?:ol|somethin|dunkin)'(?!\w) | '(?:em|cause)\b)
    | (?<!\w)'\d\ds?\b
    | (?i:\b(?!n')[a-hj-xz]'{_LETTER}{{2,}} | \b{_LETTER}*[aeiouy]'[aeiou]{_LETTER}*)
    | \b(?:{_LETTER}\.)+(?!{_LETTER}) | \b(?:{_ABBREVIATED})\.(?!{_SIGN}) | \b{_BEFORE_A_NUMBER}\.(?=\s?\d)
    | \b[A-Z]+(?:[&+][A-Z]+)+\b | [A-Z]*\$ | [Cc]\+\+
    | \d{{1,4}}[ -]\d{{1,4}}/\d{{1,4}}\b | \b{_SLASHED}(?:/{_SLASHED}){{1,2}}
    | {_SIGN}(?:{_SIGN}|[.,](?={_SIGN})){{0,64}}(?:-{_SIGN}+)+
    | (?<![^\W\d])[-+]?\d*(?:[.:,]\d+)+ | (?<![^\W\d])[-+]\d+
    | {_SIGN}+(?:[_.!?](?={_LETTER}){_SIGN}+|_{_SIGN}+)*
    | [?!]{{2,}} | \*+ | [<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]](?!\w)
    | [^\w\s\x00-\x1f\x7f\u00ad\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufe00-\ufe0f\ufeff\U00010000-\U0010ffff]
    """,
    re.VERBOSE,
)
_READ = [("&amp;", "&"), ("&quot;", '"'), ("\u2019", "'"), ("\u0092", "'"), ("\u00ad", "")]
_WRITTEN = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-", "£": "#", "€": "$", "¢": "cents"}
_WRITTEN |= {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}
_PUNCTUATION = frozenset("'\"`.?!,:;-…–—―‐‑‒“”‘‛‚„«»‹›")


def words(caption: str) -> list[str]:
    """The words of a caption: `The man's hat isn't red.` → the, man, 's, hat, is, n't, red."""
    for written, read in _READ:
        caption = caption.replace(written, read)
    found = []
    for token in _TOKEN.findall(caption):
        if token not in _PUNCTUATION:
            word = token.lower()
            found.append(word if word.isalnum() and len(word) > 1 else _written(word))
    return found


def _written(word: str) -> str:
    """Brackets and some signs under their names; a number and its fraction are one word."""
    return "".join(_WRITTEN.get(sign, sign) for sign in word).replace(" ", "\u00a0")
