"""Tokenizers: BERT-style ones trained on the data at hand; those and byte-pair or unigram ones loaded from a folder and checked."""

from __future__ import annotations

import heapq
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientvlm.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = ("pad", "unk", "cls", "sep", "mask")
FILES = ("tokenizer.json", "tokenizer_config.json")
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with the vocabulary of `texts`; the special tokens have ids 0 to 4.

    The merges are ours, not those of `tokenizers`, whose trainer gives another vocabulary in every process: here equal texts give equal
    ids.

    Raises:
        BadInput: no text, or a `vocab_size` that leaves no room for letters.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if vocab_size < len(SPECIAL) + 11:
        raise BadInput(f"vocab_size {vocab_size}", "it leaves no room beside the special tokens", "use at least 16")
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text, count in Counter(texts).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            words[word] += count
    if not words:
        raise BadInput("no tokenizer can be trained", "the data holds no text", "check --data and --column")
    vocab = {token: index for index, token in enumerate((*SPECIAL, *_pieces(words, vocab_size - len(SPECIAL))))}
    for piece in (form for letter in ALPHABET for form in (letter, f"##{letter}")):
        if len(vocab) < vocab_size:
            vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    return _wrap(tokenizer)


def with_special(tokenizer: PreTrainedTokenizerFast, tokens: Iterable[str]) -> PreTrainedTokenizerFast:
    """`tokenizer` with special `tokens` behind its vocabulary; those it has already stay where they are."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str], *, bert: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer in folder `path`: `tokenizer.json`, or `vocab.txt` of an older BERT, or `vocab.json` and `merges.txt` of an older CLIP.

    Args:
        bert: whether only WordPiece with BERT's special tokens will do.

    Raises:
        BadInput: no tokenizer there, a damaged one, an empty vocabulary, a missing special token, another kind than `bert` asks for.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    folder = Path(path)
    ready, plain = folder / "tokenizer.json", folder / "vocab.txt"
    fix = "give the folder of a tokenizer: --tokenizer DIR"
    if ready.is_file():
        text = ready.read_text(encoding="utf-8")
        if (kind := _kind(ready, text, fix)) != "WordPiece":
            return _load_stock(folder, kind, fix, bert)
        tokenizer = Tokenizer.from_str(text)
    elif plain.is_file():
        tokens = plain.read_text(encoding="utf-8").splitlines()
        tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=_lowercase(folder))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _load_stock(folder, "BPE", fix, bert)
    else:
        raise BadInput(f"no tokenizer in {folder}", "it has neither tokenizer.json nor vocab.txt", fix)
    vocab = tokenizer.get_vocab()
    missing = [token for token in SPECIAL if token not in vocab]
    if missing:
        raise BadInput(f"tokenizer in {folder}", f"it has no {', '.join(missing)}", fix)
    if len(vocab) <= len(SPECIAL):
        raise BadInput(f"tokenizer in {folder}", f"its vocabulary is empty ({len(vocab)} tokens, all of them special)", fix)
    return _wrap(tokenizer)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: str | os.PathLike[str]) -> None:
    """Write `tokenizer` into folder `path`, in files that `AutoTokenizer` and :func:`load_tokenizer` open."""
    tokenizer.save_pretrained(str(path))


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab = tokenizer.get_vocab()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{role}_token": token for role, token in zip(ROLES, SPECIAL, strict=True)}
    )


def ends_of(tokenizer: Any) -> tuple[int | None, int]:
    """Ids of the tokens that begin (None: nothing does) and end a text, as the tokenizer itself puts them around one.

    Raises:
        BadInput: it puts something else around a text, or has no token for padding.
    """
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    before = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
    begin, end = full[:before], full[before + len(plain) :]
    if len(begin) > 1 or len(end) != 1 or tokenizer.pad_token_id is None:
        why = f"it puts {len(begin)} tokens before a text and {len(end)} behind it, and its padding is {tokenizer.pad_token!r}"
        raise BadInput("this tokenizer cannot be used", why, "texts need one token at the end, at most one in front, and one for padding")
    return (begin[0] if begin else None), end[0]


def _load_stock(folder: Path, kind: str, fix: str, bert: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that is no WordPiece, as transformers' own class for it."""
    if bert:
        raise BadInput(f"tokenizer in {folder}", f"its model is {kind}, WordPiece with BERT's special tokens is needed", fix)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        size = len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    except Exception as error:  # noqa: BLE001  what tokenizers raises on a damaged file is just that
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"cannot read the {kind} tokenizer in {folder}", why[:200], fix) from None
    if not size:
        raise BadInput(f"the {kind} tokenizer in {folder}", "its vocabulary is empty", fix)
    ends_of(tokenizer)
    return tokenizer


def _kind(path: Path, text: str, fix: str) -> str:
    """Which model a `tokenizer.json` holds. `tokenizers` raises a bare Exception on a damaged file, so what matters is looked at first."""
    try:
        model = json.loads(text)["model"]
        kind = model.get("type", "WordPiece" if "max_input_chars_per_word" in model else "BPE" if "merges" in model else "")
        known = isinstance(kind, str) and isinstance(model["vocab"], dict | list)
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known or (kind == "WordPiece" and not isinstance(model["vocab"], dict)):
        raise BadInput(f"tokenizer {path}", "it is damaged, or no file of the tokenizers library", fix)
    return str(kind)


def _lowercase(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    return bool(json.loads(config.read_text(encoding="utf-8")).get("do_lower_case", True)) if config.is_file() else True


def _pieces(words: Counter[str], room: int) -> Iterator[str]:
    """Letters, then merges of the most frequent neighbours (ties by spelling) until `room` or nothing is left to merge."""
    letters: Counter[str] = Counter()
    spelled: list[list[str]] = []
    counts: list[int] = []
    for word, count in sorted(words.items()):
        symbols = [word[0], *(f"##{letter}" for letter in word[1:])]
        spelled.append(symbols)
        counts.append(count)
        for symbol in symbols:
            letters[symbol] += count
    known = {symbol for symbol, _ in sorted(letters.items(), key=lambda pair: (-pair[1], pair[0]))[:room]}
    yield from sorted(known)
    room -= len(known)

    pairs: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, symbols in enumerate(spelled):
        if known.issuperset(symbols):
            for pair in itertools.pairwise(symbols):
                pairs[pair] += counts[index]
                places[pair].add(index)
    queue = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(queue)
    while queue and room > 0:
        count, pair = heapq.heappop(queue)
        if pairs[pair] != -count:  # an outdated entry; the present count has its own
            continue
        merged = pair[0] + pair[1].removeprefix("##")
        if merged not in known:
            known.add(merged)
            room -= 1
            yield merged
        changed: set[tuple[str, str]] = set()
        for index in sorted(places.pop(pair)):
            symbols = spelled[index]
            for neighbours in itertools.pairwise(symbols):
                pairs[neighbours] -= counts[index]
                changed.add(neighbours)
            spelled[index] = symbols = _merge(symbols, pair, merged)
            for neighbours in itertools.pairwise(symbols):
                pairs[neighbours] += counts[index]
                places[neighbours].add(index)
                changed.add(neighbours)
        del pairs[pair]
        for neighbours in changed:
            if pairs.get(neighbours, 0) > 0:
                heapq.heappush(queue, (-pairs[neighbours], neighbours))


def _merge(symbols: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    out: list[str] = []
    position = 0
    while position < len(symbols):
        if position + 1 < len(symbols) and (symbols[position], symbols[position + 1]) == pair:
            out.append(merged)
            position += 2
        else:
            out.append(symbols[position])
            position += 1
    return out
