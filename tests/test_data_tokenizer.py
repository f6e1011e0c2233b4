"""Tokenizers: the same on every machine, complete, and refused when empty."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import tokenization_utils_base

from efficientvlm.data.easy_vqa import EasyVQA
from efficientvlm.data.texts import Texts
from efficientvlm.data.tokenizer import SPECIAL, _tried, guarded, load_tokenizer, require_ids, save_tokenizer, train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.tasks.answering import Answerer

SENTENCES = ["A red circle.", "the redder circle", "a cat & a dog", "dogs"]


def test_words_of_easy_vqa_are_single_tokens() -> None:
    questions = list(EasyVQA("train", limit=400).texts())
    tokenizer = train_wordpiece(questions, 8192)
    vocab = tokenizer.get_vocab()
    words = {word for text in questions for word in text.replace("?", " ?").split()}
    assert len(words) > 25 and words <= set(vocab)
    assert [vocab[token] for token in SPECIAL] == [0, 1, 2, 3, 4]
    assert sorted(vocab.values()) == list(range(len(tokenizer)))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Is there a TEAL rectangle?")["input_ids"])
    assert tokens == ["[CLS]", "is", "there", "a", "teal", "rectangle", "?", "[SEP]"]


def test_letters_never_seen_are_not_unknown() -> None:
    tokenizer = train_wordpiece(SENTENCES, 500)
    assert tokenizer.unk_token_id not in tokenizer("zebra 7")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("猫")["input_ids"]


def test_vocabulary_does_not_depend_on_the_process() -> None:
    code = (
        "import json, hashlib; from efficientvlm.data.tokenizer import train_wordpiece; "
        f"v = train_wordpiece({SENTENCES!r}, 60).get_vocab(); print(hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest())"
    )
    here = hashlib.sha256(json.dumps(train_wordpiece(SENTENCES, 60).get_vocab(), sort_keys=True).encode()).hexdigest()
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == here


@pytest.mark.parametrize("size", [16, 30, 45, 300])
def test_the_vocabulary_keeps_to_its_size(size: int) -> None:
    tokenizer = train_wordpiece(SENTENCES, size)
    assert len(tokenizer) <= size and (size > 100 or len(tokenizer) == size)


def test_frequent_pieces_come_first() -> None:
    vocab = train_wordpiece(["cat cat cat dog dog at"], 300).get_vocab()
    assert vocab["##at"] < vocab["cat"] < vocab["##og"] < vocab["dog"] < vocab["at"]


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(SENTENCES, 80)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    text = "the reddest Dog?"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.pad_token_id, loaded.cls_token_id, loaded.sep_token_id, loaded.mask_token_id) == (0, 2, 3, 4)


def test_vocab_txt_of_an_older_bert(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "red", "##der", "circle"]), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("Redder circle")["input_ids"] == [2, 5, 6, 7, 3]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}', encoding="utf-8")
    assert load_tokenizer(tmp_path)("Redder circle")["input_ids"] == [2, 1, 7, 3]


def test_truncation_stored_in_a_file_is_dropped(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(SENTENCES, 80)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.backend_tokenizer.truncation is None and loaded.backend_tokenizer.padding is None
    assert len(loaded("a red circle")["input_ids"]) == 5


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no tokenizer"),
        ({"vocab.txt": "\n".join(SPECIAL)}, "empty"),
        ({"vocab.txt": "[PAD]\n[UNK]\na\nb\nc\nd"}, r"\[CLS\], \[SEP\], \[MASK\]"),
        ({"tokenizer.json": "{"}, "damaged"),
        ({"tokenizer.json": "[]"}, "damaged"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'}, "BPE"),
    ],
)
def test_a_useless_tokenizer_is_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=words):
        load_tokenizer(tmp_path)


def test_only_wordpiece_will_do_where_bert_is_asked_for(tmp_path: Path) -> None:
    save_tokenizer(train_wordpiece(SENTENCES, 80), tmp_path)
    assert load_tokenizer(tmp_path, bert=True).cls_token_id == 2
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', encoding="utf-8")
    with pytest.raises(BadInput, match="its model is BPE, WordPiece"):
        load_tokenizer(tmp_path, bert=True)


def test_training_needs_text_and_room() -> None:
    with pytest.raises(BadInput, match="no text"):
        train_wordpiece([], 100)
    with pytest.raises(BadInput, match="room"):
        train_wordpiece(SENTENCES, 10)


def spoiled(tmp_path: Path, change: Any = None, content: bytes | None = None, tokenizer: Any = None) -> Path:
    """A folder with a tokenizer's file that `change` has been at, or of this `content`."""
    save_tokenizer(tokenizer or train_wordpiece(["what colour is the red circle?"], 60), tmp_path)
    file = tmp_path / "tokenizer.json"
    if change:
        values = json.loads(file.read_text("utf-8"))
        change(values)
        content = json.dumps(values).encode()
    file.write_bytes(content or b"")
    return tmp_path


HOSTILE: dict[str, Any] = {
    "an id that is no number": lambda v: v["model"]["vocab"].update(red=[[]]),
    "a negative id": lambda v: v["model"]["vocab"].update(red=-1),
    "an id that takes all memory": lambda v: v["model"]["vocab"].update(red=4_000_000_000),
    "the same of an added token": lambda v: v["added_tokens"].append({**v["added_tokens"][0], "content": "x", "id": 4_000_000_000}),
    "a broken expression": lambda v: v.update(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}),
    "an unknown rule": lambda v: v.update(normalizer={"type": "Nothing"}),
    "rules that multiply": lambda v: v.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 2000}] * 3}
    ),
    "rules that multiply in small steps": lambda v: v.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "xxx"}] * 30}
    ),
    "no vocabulary": lambda v: v["model"].update(vocab=7),
    "another model": lambda v: v["model"].update(type=["WordPiece"]),
    "tokens without a name": lambda v: v.update(added_tokens=[{}]),
    "added tokens that are none": lambda v: v.update(added_tokens=[1]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_bad_input(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput) as error:
        load_tokenizer(spoiled(tmp_path, HOSTILE[name]))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("content", [b"\xff\xfe{", b'{"model":' + b"[" * 100_000, b"", b"null", b"[]", b'{"model": {"vocab": {}}}'])
def test_a_tokenizer_file_of_other_content_is_bad_input(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BadInput):
        load_tokenizer(spoiled(tmp_path, content=content))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_ids_of_an_older_vocabulary_are_its_lines(tmp_path: Path, end: str) -> None:
    from transformers import BertTokenizer

    tokens = [*SPECIAL, "a", "x\u2028y", "x\x85y", "x\x1cy", "", "b"]
    (tmp_path / "vocab.txt").write_bytes("".join(token + end for token in tokens).encode())
    vocab = load_tokenizer(tmp_path).get_vocab()
    assert vocab == {token: number for number, token in enumerate(tokens)} == BertTokenizer.from_pretrained(tmp_path).get_vocab()


def test_older_files_that_are_damaged_are_bad_input(tmp_path: Path) -> None:
    good = "\n".join([*SPECIAL, "a", "b"]).encode()
    for number, (vocab, config) in enumerate(
        ((b"[PAD]\n\xff\n", b"{}"), (good, b"{"), (good, b"[]"), (good, b"\xff"), (good, b"[" * 100_000))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "vocab.txt").write_bytes(vocab)
        (folder / "tokenizer_config.json").write_bytes(config)
        with pytest.raises(BadInput):
            load_tokenizer(folder)


def test_tokenizer_files_have_a_limit_and_are_files(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt", "merges.txt", "chat_template.jinja", "additional_chat_templates/a.jinja"):
        folder = spoiled(tmp_path / name, content=b"{}")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(8_000_000_000)
        with pytest.raises(BadInput, match="too large"):
            load_tokenizer(folder)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "tokenizer.json")
    (tmp_path / "device").mkdir()
    os.symlink("/dev/zero", tmp_path / "device" / "tokenizer.json")
    for name in ("pipe", "device"):
        with pytest.raises(BadInput):
            load_tokenizer(tmp_path / name)


def test_a_panic_of_the_library_is_bad_input_at_every_call(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "^(a+)+$"}, "behavior": "Isolated", "invert": False}
    texts = Texts(load_tokenizer(spoiled(tmp_path, lambda v: v.update(pre_tokenizer=split))))
    with pytest.raises(BadInput, match="the tokenizer fails"):
        texts.ids(["a" * 60 + "!"])
    with pytest.raises(BadInput, match="the tokenizer fails"):
        texts.ids(["what\udcff?"])
    with pytest.raises(KeyboardInterrupt), guarded("it", "wait"):
        raise KeyboardInterrupt


def test_ids_beyond_a_models_vocabulary_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(spoiled(tmp_path, lambda v: v["model"]["vocab"].update(what=5000)))
    with pytest.raises(BadInput, match="an id 5000"):
        require_ids(tokenizer, 60, tmp_path)
    require_ids(tokenizer, 5001, tmp_path)


def test_a_pointer_to_code_is_not_saved_with_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(["red"], 60)
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["evil.T", None]}
    save_tokenizer(tokenizer, tmp_path)
    assert "evil" not in "".join(path.read_text("utf-8") for path in tmp_path.iterdir())


@pytest.mark.parametrize("module", ["builtins", "pyo3_runtime"])
def test_what_a_tokenizer_makes_of_ids_is_guarded_like_what_it_makes_of_texts(module: str) -> None:
    base = Exception if module == "builtins" else BaseException
    failure = type("PanicException", (base,), {"__module__": module})

    def decode(ids: list[int]) -> str:
        raise failure("decoder")

    answerer = Answerer.__new__(Answerer)
    answerer.loaded = cast(Any, SimpleNamespace(path=Path("m"), tokenizer=SimpleNamespace(decode=decode)))
    answerer.texts = cast(Any, SimpleNamespace(special=frozenset(), unknown=None))
    with pytest.raises(BadInput, match="the tokenizer in m fails: decoder"):
        answerer.decoded([1])


def test_long_texts_are_counted_here_and_not_warned_of_by_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_wordpiece(SENTENCES, 60)
    tokenizer.model_max_length = 5
    said: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda text, *_: said.append(text))
    texts = Texts(tokenizer, 5)
    texts.batch(["a cat & a dog & a cat"])
    assert len(texts.cut) == 1 and _tried(tokenizer) is tokenizer and not said
    tokenizer("a cat & a dog & a cat")
    assert "longer than the specified" in said[0], "others are still told"
