"""Tokenizers: BERT-style ones trained on the data at hand; those and byte-pair or unigram ones loaded from a folder and checked."""

from __future__ import annotations

import heapq
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientvlm.checkpoints.files import MIB, read_limited
from efficientvlm.checkpoints.manifest import parse_json, read_json
from efficientvlm.checkpoints.pointers import CODE
from efficientvlm.data.text_tables import lines_of
from efficientvlm.errors import BadInput, EvlmError, shorten

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = ("pad", "unk", "cls", "sep", "mask")
FILES = ("tokenizer.json", "tokenizer_config.json")
READ = (
    *(*FILES, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("config.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
LARGEST = 256 * MIB  # of a tokenizer's file
LONGEST_RULES = 500_000  # characters, about twice those of SigLIP's
MOST_GROWTH = 1000
MOST_IDS = 10_000_000
FIX = "give the folder of a tokenizer: --tokenizer DIR"
TRIAL = "What colour is it? 12 caf\u00e9s, \u4e2d\u6587."
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
    for file in itertools.chain.from_iterable(map(folder.glob, READ)):  # other libraries read some of them, whole and without asking
        if file.is_file() and file.stat().st_size > LARGEST:
            read_limited(file, LARGEST, "a tokenizer's file")
    with guarded(f"tokenizer in {folder}", FIX):
        if ready.exists():
            text = _text(ready)
            if (kind := _kind(ready, text)) != "WordPiece":
                return _load_stock(folder, kind, bert)
            tokenizer = Tokenizer.from_str(text)
        elif plain.exists():
            tokens = lines_of(_text(plain))
            tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=_lowercase(folder))
            tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            _check_ids(folder / "vocab.json", read_json(folder / "vocab.json"))
            return _load_stock(folder, "BPE", bert)
        else:
            raise BadInput(f"no tokenizer in {folder}", "it has neither tokenizer.json nor vocab.txt", FIX)
        vocab = tokenizer.get_vocab()
        missing = [token for token in SPECIAL if token not in vocab]
        if missing:
            raise BadInput(f"tokenizer in {folder}", f"it has no {', '.join(missing)}", FIX)
        if len(vocab) <= len(SPECIAL):
            raise BadInput(f"tokenizer in {folder}", f"its vocabulary is empty ({len(vocab)} tokens, all of them special)", FIX)
        return _tried(_wrap(tokenizer))


@contextmanager
def guarded(what: str, fix: str) -> Iterator[None]:
    """The one door around the tokenizers library: whatever it raises in the block is bad input, its panics included.

    Raises:
        BadInput: `what` fails, why, and `fix`.
    """
    try:
        yield
    except (EvlmError, MemoryError):
        raise
    except BaseException as error:
        panic = type(error).__module__ == "pyo3_runtime"  # of Rust code; it is no Exception
        if not panic and not isinstance(error, Exception):
            raise
        raise BadInput(f"{what} fails", shorten(str(error).strip() or type(error).__name__), fix) from None


def require_ids(tokenizer: Any, vocab_size: int, where: Path) -> None:
    """:class:`BadInput` if the tokenizer has more tokens than a model embeds, or ids beyond them."""
    most = max(tokenizer.get_vocab().values(), default=0)
    if len(tokenizer) > vocab_size or most >= vocab_size:
        found = f"{len(tokenizer)} tokens" if len(tokenizer) > vocab_size else f"an id {most}"
        raise BadInput(f"{where}: the tokenizer has {found}", f"the model embeds {vocab_size}", "use its own tokenizer")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: str | os.PathLike[str], first: int | None = None) -> None:
    """Write `tokenizer` into folder `path`, in files that `AutoTokenizer` and :func:`load_tokenizer` open.

    With the token `first`, `AutoTokenizer` puts that in front of a text instead of BERT's [CLS], which :func:`load_tokenizer` always does.
    """
    from tokenizers import Tokenizer, processors

    for name in CODE:
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(str(path))
    token = None if first is None else tokenizer.convert_ids_to_tokens(first)
    if first is not None and token is not None and token != tokenizer.cls_token:
        file = str(Path(path) / "tokenizer.json")
        written = Tokenizer.from_file(file)
        written.post_processor = processors.BertProcessing((tokenizer.sep_token, tokenizer.sep_token_id), (token, first))
        written.save(file)


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
    with guarded("the tokenizer", FIX):
        plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    before = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
    begin, end = full[:before], full[before + len(plain) :]
    if len(begin) > 1 or len(end) != 1 or tokenizer.pad_token_id is None:
        why = f"it puts {len(begin)} tokens before a text and {len(end)} behind it, and its padding is {tokenizer.pad_token!r}"
        raise BadInput("this tokenizer cannot be used", why, "texts need one token at the end, at most one in front, and one for padding")
    return (begin[0] if begin else None), end[0]


def _load_stock(folder: Path, kind: str, bert: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that is no WordPiece, as transformers' own class for it."""
    if bert:
        raise BadInput(f"tokenizer in {folder}", f"its model is {kind}, WordPiece with BERT's special tokens is needed", FIX)
    from transformers import AutoTokenizer

    with guarded(f"the {kind} tokenizer in {folder}", FIX):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        size = len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        if not size:
            raise BadInput(f"the {kind} tokenizer in {folder}", "its vocabulary is empty", FIX)
        ends_of(tokenizer)
        return _tried(tokenizer)


def _tried(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """`tokenizer`, after it has read and written a sentence: what is wrong with its parts shows when they run."""
    for text in (TRIAL, ""):
        tokenizer.decode(tokenizer(text, verbose=False)["input_ids"])
    return tokenizer


def _text(path: Path) -> str:
    try:
        return read_limited(path, LARGEST, "a tokenizer's file").decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"tokenizer {path}", "it is not UTF-8 text", FIX) from None


def _kind(path: Path, text: str) -> str:
    """Which model a `tokenizer.json` holds, once its ids and what it makes of a text are within bounds."""
    damaged = BadInput(f"tokenizer {path}", "it is damaged, or no file of the tokenizers library", FIX)
    try:
        values = parse_json(text)
        model = values["model"]
        kind = model.get("type", "WordPiece" if "max_input_chars_per_word" in model else "BPE" if "merges" in model else "")
        vocab, added = model["vocab"], {token["content"]: token["id"] for token in values.get("added_tokens") or ()}
        normaliser = json.dumps(values.get("normalizer")), json.dumps(values.get("pre_tokenizer")), json.dumps(values.get("decoder"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    if not isinstance(kind, str) or not isinstance(vocab, dict if kind == "WordPiece" else dict | list):
        raise damaged
    _check_ids(path, {**(vocab if isinstance(vocab, dict) else {}), **added})
    if (most := max(map(len, normaliser))) > LONGEST_RULES:  # rules that replace a letter by many multiply one another
        raise BadInput(f"tokenizer {path}", f"its rules for texts take {most:,} characters, {LONGEST_RULES:,} are allowed", FIX)
    growth = _growth(values.get("normalizer")) * _growth(values.get("pre_tokenizer"))
    if growth > MOST_GROWTH:
        raise BadInput(f"tokenizer {path}", f"its rules can make a text {shorten(growth)} times as long", FIX)
    return kind


def _check_ids(path: Path, vocab: Any) -> None:
    """:class:`BadInput` unless `vocab` maps tokens to ids; the library makes a table up to the largest."""
    wrong = [] if isinstance(vocab, dict) else ["the vocabulary is no mapping"]
    for token, index in vocab.items() if isinstance(vocab, dict) else ():
        if type(index) is not int or not 0 <= index < MOST_IDS:
            wrong = [f"the id of {shorten(token, 40)!r} is {shorten(index, 40)}, ids are 0 to {MOST_IDS - 1:,}"]
            break
    if wrong:
        raise BadInput(f"tokenizer {path}", wrong[0], FIX)


def _growth(rules: Any) -> int:
    """How many letters the rules, one after the other, can make of one."""
    if not isinstance(rules, dict):
        return 1
    growth = 1
    for part in (*(rules.get("normalizers") or ()), *(rules.get("pretokenizers") or ())):
        growth *= _growth(part)
    if rules.get("type") in ("Replace", "Prepend"):
        growth *= max(1, len(str(rules.get("content", rules.get("prepend", "")))))
    return growth * (2 if rules.get("type") == "ByteLevel" else 1)


def _lowercase(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return True
    values = read_json(config)
    if not isinstance(values, dict):
        raise BadInput(f"tokenizer {config}", "it is not a JSON object", FIX)
    return bool(values.get("do_lower_case", True))


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
