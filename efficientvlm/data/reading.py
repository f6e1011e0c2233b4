"""What a tokenizer makes of the texts of some data, before a network reads them: what is unknown, cut, or alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from efficientvlm.data.kinds.questions import asked
from efficientvlm.data.texts import Texts
from efficientvlm.errors import number_of, shorten
from efficientvlm.runtime.progress import say

SAMPLE = 10_000  # texts that are looked at beforehand
SAID_ABOVE = 0.01  # part of unknown tokens
NAMED, QUOTED = 3, 60


@dataclass
class Reading:
    """Counts (JSON-ready) and, in words, what somebody should know of them."""

    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def __add__(self, other: Reading) -> Reading:
        return Reading(self.counts | other.counts, self.remarks + other.remarks)


def named(texts: Sequence[str]) -> str:
    """The first of `texts`, quoted, each cut to what fits into a message."""
    more = ", ..." if len(texts) > NAMED else ""
    return ", ".join(f"'{shorten(text, QUOTED)}'" for text in texts[:NAMED]) + more


def unknown(read: int, unread: int, where: str) -> list[str]:
    """A remark on `unread` of `read` tokens, if they are many."""
    if unread <= SAID_ABOVE * read:
        return []
    return [f"{100 * unread / read:.1f} % of the tokens {where} are unknown to the tokenizer ({unread:,} of {read:,}): they all read alike"]


def cut_off(cut: int, longest: int, max_tokens: int, where: str = "") -> list[str]:
    """A remark on texts that are longer than what is read of them."""
    if not cut:
        return []
    what = f"{number_of(cut, 'text')}{where} {'has' if cut == 1 else 'have'} more than {max_tokens} tokens"
    return [f"{what} (up to {longest}) and {'is' if cut == 1 else 'are'} cut; max_tokens sets the length"]


def of_read(texts: Texts) -> list[str]:
    """Remarks on all that `texts` has read."""
    return unknown(texts.read, texts.unread, "that were read") + cut_off(len(texts.cut), texts.longest, texts.max_tokens)


def counts_of(texts: Texts) -> dict[str, int]:
    """Tokens that `texts` has read and does not know, the length it reads, and how many texts were longer."""
    return {"tokens": texts.read, "unknown_tokens": texts.unread, "max_tokens": texts.max_tokens, "cut_texts": len(texts.cut)}


def of_texts(texts: Texts, source: Any, prompt: int = 0) -> Reading:
    """Unknown tokens and texts to be cut among the first of `source`, questions or captions with all that belongs to them.

    No image is decoded. `prompt` tokens stand in front of each.
    """
    some = list(islice(source.texts(), SAMPLE + 1))
    whole, own = len(some) <= SAMPLE, Texts(texts.tokenizer)
    lengths, room = [len(ids) for ids in own.ids(some[:SAMPLE])], texts.room() - prompt
    cut = sum(length > room for length in lengths)
    counts = {"texts": len(lengths), "tokens": own.read, "unknown_tokens": own.unread, "cut_texts": cut}
    where = f"in the {len(some):,} texts" if whole else f"in the first {SAMPLE:,} texts"
    longest = max(lengths, default=0) + texts.max_tokens - room
    place = f" of the first {SAMPLE:,}" * (not whole)
    return Reading(counts, unknown(own.read, own.unread, where) + cut_off(cut, longest, texts.max_tokens, place))


def of_answers(texts: Texts, answers: Sequence[str], room: int | None) -> Reading:
    """Answers of a closed list that cannot be read, and those that are cut in training to `room` tokens (None: none is)."""
    ids, identities = texts.ids(answers), texts.identities(answers)
    lost = [answer for answer, identity in zip(answers, identities, strict=True) if identity is None]
    counts, remarks = {"answers": len(answers), "unread_answers": len(lost)}, []
    if lost:
        why = "it has no token for a part of them, so they are never given and never right"
        remarks.append(f"{len(lost):,} of {len(answers):,} answers cannot be read by the tokenizer ({named(lost)}): {why}")
    if room is None:
        return Reading(counts, remarks)
    cut = [answer for answer, tokens in zip(answers, ids, strict=True) if len(tokens) > room]
    counts["cut_answers"] = len(cut)
    if cut:
        remarks.append(f"{len(cut):,} of {len(answers):,} answers have more than {room} tokens and are cut in training ({named(cut)})")
    targets: dict[tuple[int, ...], dict[tuple[int, ...], str]] = {}
    for answer, tokens, identity in zip(answers, ids, identities, strict=True):
        if identity is not None:
            targets.setdefault(tuple(tokens[:room]), {}).setdefault(identity, answer)
    same = [list(group.values()) for group in targets.values() if len(group) > 1]
    counts["alike_after_the_cut"] = sum(map(len, same))
    if same:
        fix = "raise max_answer_tokens"
        remarks.append(f"{sum(map(len, same)):,} answers are no longer told apart after the cut ({named(same[0])}): {fix}")
    return Reading(counts, remarks)


def of_questions(texts: Texts, answers: Sequence[str], source: Any) -> Reading:
    """Questions of `source` of which no accepted answer is in the closed list, as the tokenizer reads both."""
    listed = set(texts.identities(answers)) - {None}
    questions = lost = 0
    for question in asked(source):
        questions += 1
        lost += listed.isdisjoint(texts.identities([answer for answer, _ in question.answers]))
    return Reading({"questions": questions, "unanswerable": lost}, unanswerable(lost, questions))


def unanswerable(lost: int, questions: int) -> list[str]:
    """A remark on questions that no answer of the closed list is right for."""
    if not lost:
        return []
    share = f"{100 * lost / questions:.1f} % of the questions cannot be answered ({lost:,} of {questions:,})"
    return [f"{share}: none of their answers is one that can be given"]


def titled(title: str, reading: Reading) -> Iterator[str]:
    for remark in reading.remarks:
        yield f"{title}: {remark}"


def all_read(title: str, texts: Texts, before: Reading, quiet: bool, begun: int = 0) -> dict[str, int]:
    """What a manifest keeps: the counts made before training, and the tokens that were read in it, of which too many unknown are said.

    A run that went on at step `begun` has read its texts from there on, which is said and kept too.
    """
    for remark in of_read(texts):
        say(f"{title}: {remark}" + f"; that is of what was read from step {begun} on" * bool(begun), quiet=quiet)
    counts = {**before.counts, "tokens_read": texts.read, "unknown_tokens_read": texts.unread, "texts_cut": len(texts.cut)}
    return counts | ({"read_from_step": begun} if begun else {})
