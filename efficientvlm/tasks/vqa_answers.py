"""Answers of VQAv2 in the form its evaluation compares: one line, lower case, no articles or punctuation, numbers as digits.

The rules are those published with the data set (Antol et al., "VQA: Visual Question Answering", and its evaluation page).
"""

from __future__ import annotations

import re

DIGITS = {
    word: str(number) for number, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
MARKS = frozenset(';/[]"{}()=+\\_-><@`,?!')

# Words that are written with an apostrophe, and get it back when it was left out.
NOT = [
    "are",
    "ca",
    "could",
    "did",
    "does",
    "do",
    "had",
    "has",
    "have",
    "is",
    "might",
    "must",
    "need",
    "should",
    "was",
    "were",
    "wo",
    "would",
]
CONTRACTIONS = {f"{word}nt": f"{word}n't" for word in NOT} | {
    "cant": "can't",
    "aint": "ain't",
    "couldve": "could've",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "hadnt've": "hadn't've",
    "hadn'tve": "hadn't've",
    "hed": "he'd",
    "hed've": "he'd've",
    "he'dve": "he'd've",
    "hes": "he's",
    "howd": "how'd",
    "howll": "how'll",
    "hows": "how's",
    "im": "i'm",
    "ive": "i've",
    "isnt": "isn't",
    "itd": "it'd",
    "itll": "it'll",
    "lets": "let's",
    "maam": "ma'am",
    "mightve": "might've",
    "mustve": "must've",
    "notve": "not've",
    "oclock": "o'clock",
    "shes": "she's",
    "shouldve": "should've",
    "somebodyd": "somebody'd",
    "somebodys": "somebody's",
    "someones": "someone's",
    "somethings": "something's",
    "thats": "that's",
    "thered": "there'd",
    "theres": "there's",
    "theyd": "they'd",
    "theyll": "they'll",
    "theyre": "they're",
    "theyve": "they've",
    "twas": "'twas",
    "weve": "we've",
    "whatll": "what'll",
    "whatre": "what're",
    "whats": "what's",
    "whatve": "what've",
    "whens": "when's",
    "whered": "where'd",
    "wheres": "where's",
    "whereve": "where've",
    "whod": "who'd",
    "wholl": "who'll",
    "whos": "who's",
    "whove": "who've",
    "whyll": "why'll",
    "whyre": "why're",
    "whys": "why's",
    "wouldve": "would've",
    "yall": "y'all",
    "youd": "you'd",
    "youll": "you'll",
    "youre": "you're",
    "youve": "you've",
}


def normalised(answer: str) -> str:
    """`answer` as VQAv2's evaluation compares it."""
    text = re.sub(r"[\n\t]", " ", answer).strip()
    words = _without_marks(text).lower().split()
    return " ".join(CONTRACTIONS.get(word, word) for word in (DIGITS.get(word, word) for word in words) if word not in ARTICLES)


def _without_marks(text: str) -> str:
    """A mark with a space beside it vanishes, and so do all in a text with a number like 1,000; any other becomes a space. A full stop
    vanishes unless a digit follows."""
    in_a_number = re.search(r"\d,\d", text) is not None
    out = text
    for mark in MARKS & set(text):
        out = out.replace(mark, "" if in_a_number or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out)
