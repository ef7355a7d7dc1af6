"""Corpus: the split by file, the order of documents, the `.bin` variants, and one sentence for each bad input."""

from __future__ import annotations

import re
import socket
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftershock.lab.data.corpus import Corpus, _split_by_file, load_tokens
from aftershock.lab.recipe import LanguageData


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return load_tokens(LanguageData())


def write(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        path = folder / (name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


# --------------------------------------------------------------------------------------------------------- stdlib


def test_oracle_stdlib_holds_each_library_file_once(stdlib: Corpus) -> None:
    """Against a slow walk with rglob: every source file is one document, on one side, in the order of its path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    kept = [paths[name] for name in sorted(paths) if not left_out & set(name.split("/")[:-1])]
    expected = [path.read_bytes() for path in kept if path.stat().st_size]
    sides = [split.tobytes().split(b"\0") for split in (stdlib.train, stdlib.eval)]
    assert sorted(sides[0] + sides[1]) == sorted(expected)
    for side in sides:
        chosen = set(side)
        assert side == [document for document in expected if document in chosen]


def test_stdlib_is_held_out_by_file_at_about_the_fraction_asked_for(stdlib: Corpus) -> None:
    sides = [set(split.tobytes().split(b"\0")) for split in (stdlib.train, stdlib.eval)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) > 10
    share = len(stdlib.eval) / (len(stdlib.eval) + len(stdlib.train))
    assert share == pytest.approx(0.05, abs=1e-3)  # the greedy fill ends within one small file of the budget


def test_stdlib_is_the_same_twice_and_its_digest_knows_the_split(stdlib: Corpus) -> None:
    again = load_tokens(LanguageData())
    assert again.digest == stdlib.digest
    assert np.array_equal(again.train, stdlib.train)
    assert load_tokens(LanguageData(eval_frac=0.1)).digest != stdlib.digest
    assert re.fullmatch("[0-9a-f]{16}", stdlib.digest)
    assert "standard library" in stdlib.description


# ----------------------------------------------------------------------------------------------------------- text


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=30),
    eval_frac=st.floats(0.01, 0.99),
)
def test_contract_split_by_file_is_a_partition(sizes: list[int], eval_frac: float) -> None:
    documents = {f"f{i:02}": f"{i:02}".encode() * size for i, size in enumerate(sizes)}
    split = _split_by_file(documents, eval_frac, "made up")
    train, held_out = split.train.split(b"\0"), split.eval.split(b"\0")
    assert sorted(train + held_out) == sorted(documents.values())
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert held_out
    smallest = min(map(len, documents.values()))
    assert sum(map(len, held_out)) <= max(eval_frac * sum(map(len, documents.values())), smallest)


def test_copies_of_a_file_stay_on_one_side(tmp_path: Path) -> None:
    """Else the held-out loss is measured on text that was trained on."""
    folder = write(tmp_path, **{f"{name}{copy}": f"{name} " * 9 for name in "abcdef" for copy in range(3)})
    corpus = load_tokens(LanguageData(source=str(folder), context=4, eval_frac=0.4))
    train, held_out = (split.tobytes().split(b"\0") for split in (corpus.train, corpus.eval))
    assert (len(train), len(held_out)) == (12, 6)
    assert not set(train) & set(held_out)


def test_folder_reads_below_hidden_and_empty_left_out_and_does_not_move_with_the_folder(tmp_path: Path) -> None:
    corpora = []
    for name in ("here", "there"):
        folder = write(tmp_path / name, a="alpha " * 9, deep__b="beta " * 9, c="gamma " * 9, empty="")
        (folder / ".hidden").write_text("secret")
        (folder / ".git").mkdir()
        (folder / ".git" / "config").write_text("secret")
        corpora.append(load_tokens(LanguageData(source=str(folder), context=4, eval_frac=0.4)))
    text = corpora[0].train.tobytes() + b"\0" + corpora[0].eval.tobytes()
    assert sorted(text.split(b"\0")) == sorted([b"alpha " * 9, b"beta " * 9, b"gamma " * 9])
    assert corpora[0].digest == corpora[1].digest


def test_planted_binary_in_a_folder_is_left_out_aloud(tmp_path: Path) -> None:
    folder = write(tmp_path / "text", a="alpha " * 9, b="beta " * 9)
    (folder / "logo.png").write_bytes(b"\x89PNG\0\xff")
    with pytest.warns(UserWarning, match=r"1 of 3 files left out as not UTF-8 text \(first: logo.png\)"):
        corpus = load_tokens(LanguageData(source=str(folder), context=4))
    assert "logo.png" in corpus.description
    assert b"PNG" not in corpus.train.tobytes() + corpus.eval.tobytes()


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=60, max_size=200))
def test_round_trip_of_a_text_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    corpus = load_tokens(LanguageData(source=str(path), context=2, eval_frac=0.2))
    assert (corpus.train.tobytes() + corpus.eval.tobytes()).decode() == text
    assert len(corpus.eval) == round(0.2 * len(text.encode()))


# --------------------------------------------------------------------------------------------------------- tokens


def header(magic: int, version: int, num_tokens: int) -> bytes:
    numbers = np.zeros(256, dtype="<i4")
    numbers[:3] = magic, version, num_tokens
    return numbers.tobytes()


def token_config(path: Path, **changes: object) -> LanguageData:
    values: dict[str, object] = {"source": str(path), "context": 4, "vocab_size": 50_304} | changes
    return LanguageData(**values)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("dtype", "prefix"),
    [
        ("uint16", b""),
        ("uint32", b""),
        ("uint16", header(20240520, 1, 600)),
        ("uint32", header(20240801, 7, 600)),
    ],
)
def test_round_trip_of_a_token_file(tmp_path: Path, dtype: str, prefix: bytes) -> None:
    ids = np.arange(600) * 83
    path = tmp_path / "ids.bin"
    path.write_bytes(prefix + ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    corpus = load_tokens(token_config(path, token_dtype=dtype, eval_frac=0.1))
    assert np.concatenate([corpus.train, corpus.eval]).tolist() == ids.tolist()
    assert corpus.train.dtype == np.dtype(dtype)
    assert len(corpus.eval) == 60
    assert not corpus.train.flags.writeable


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("train.bin", "val.bin"), ("web_train.bin", "web_val.bin"), ("web.bin", "web_val.bin")],
)
def test_validation_file_beside_is_the_held_out_split(tmp_path: Path, train: str, held_out: str) -> None:
    np.arange(40, dtype="<u2").tofile(tmp_path / train)
    np.arange(100, 130, dtype="<u2").tofile(tmp_path / held_out)
    corpus = load_tokens(token_config(tmp_path / train))
    assert corpus.train.tolist() == list(range(40))
    assert corpus.eval.tolist() == list(range(100, 130))
    assert held_out in corpus.description


def test_digest_of_a_token_file_knows_every_id(tmp_path: Path) -> None:
    digests = set()
    for changed in (0, 57, 99):
        ids = np.zeros(100, dtype="<u2")
        ids[changed] = 1
        ids.tofile(tmp_path / "ids.bin")
        digests.add(load_tokens(token_config(tmp_path / "ids.bin")).digest)
    assert len(digests) == 3


def test_planted_id_outside_the_vocabulary_in_the_held_out_part(tmp_path: Path) -> None:
    """The position is that in the file, not in the split."""
    ids = np.zeros(1000, dtype="<u2")
    ids[990], ids[995] = 300, 400
    ids.tofile(tmp_path / "ids.bin")
    words = r"ids.bin: token id 300 at position 990 is outside data.vocab_size=256; set data.vocab_size=401 or more"
    with pytest.raises(ValueError, match=words):
        load_tokens(token_config(tmp_path / "ids.bin", vocab_size=256))
    assert len(load_tokens(token_config(tmp_path / "ids.bin", vocab_size=401)).train) == 950


def test_planted_id_outside_the_vocabulary_in_a_later_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aftershock.lab.data.corpus._CHUNK_TOKENS", 7)
    ids = np.zeros(100, dtype="<u2")
    ids[50] = 9
    ids.tofile(tmp_path / "ids.bin")
    with pytest.raises(ValueError, match="token id 9 at position 50"):
        load_tokens(token_config(tmp_path / "ids.bin", vocab_size=9))


# -------------------------------------------------------------------------------------------------------- planted

TEXT = b"some text that is long enough for windows of five. " * 4
IDS = np.arange(200, dtype="<u2").tobytes()


@pytest.mark.parametrize(
    ("name", "content", "changes", "words"),
    [
        ("none.txt", None, {}, "none.txt: no such file or folder; data.source takes stdlib, a text file"),
        ("none.bin", None, {}, "none.bin: no such file; data.source takes"),
        ("a.txt", b"", {}, "a.txt: is empty; give a file with text"),
        ("a.bin", b"", {}, "a.bin: is empty; give a file of uint16 token ids"),
        ("a.txt", TEXT + b"\0", {}, "a.txt: is not UTF-8 text .NUL byte at offset 204.; convert it"),
        ("a.txt", b"caf\xe9" + TEXT, {}, "a.txt: is not UTF-8 text .undecodable byte 0xe9 at offset 3."),
        ("a.txt", TEXT.decode().encode("utf-16"), {}, "a.txt: is not UTF-8 text"),
        ("a.txt", TEXT, {"context": 4000}, "the training split has 194 tokens, but one window needs .* 4001;"),
        ("a.txt", TEXT, {"context": 30}, "the held-out split has 10 tokens, but one window needs"),
        ("a.bin", IDS, {"context": 30}, "a.bin: the held-out split has 10 tokens, but one window needs"),
        ("a.txt", TEXT, {"vocab_size": 100}, "data.vocab_size=100 is too small for .*a.txt, which is read as bytes"),
        ("a.bin", IDS + b"\1", {}, "a.bin: its 401 bytes are no whole number of uint16 tokens"),
        ("a.bin", IDS + b"\1\1", {"token_dtype": "uint32"}, "402 bytes are no whole number of uint32 tokens"),
        ("a.bin", header(20240520, 1, 500) + IDS, {}, "header announces 500 tokens, but 400 bytes follow it"),
        ("a.bin", header(20240520, 1, 200) + IDS, {"token_dtype": "uint32"}, "header says uint16, .* set it to uint16"),
        ("a.bin", header(20240520, 9, 200) + IDS, {}, "llm.c header of unknown version 9"),
    ],
)
def test_planted_bad_file(
    tmp_path: Path, name: str, content: bytes | None, changes: dict[str, object], words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_tokens(token_config(tmp_path / name, **changes))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_planted_empty_source() -> None:
    with pytest.raises(ValueError, match=r"data.source is empty; give stdlib"):
        load_tokens(LanguageData(source=" "))


def test_planted_folders_that_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file in this folder is UTF-8 text \(it holds 0 files\)"):
        load_tokens(LanguageData(source=str(tmp_path)))
    (tmp_path / "only.txt").write_text("only")
    with pytest.raises(ValueError, match=r"holds only one distinct text file, .*; use .*only.txt"):
        load_tokens(LanguageData(source=str(tmp_path)))


def test_planted_neither_file_nor_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind("endpoint")
        with pytest.raises(ValueError, match="endpoint: is neither a regular file nor a folder"):
            load_tokens(LanguageData(source="endpoint"))


@pytest.mark.parametrize("name", ["a.txt", "."])
def test_planted_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As root every file is readable, so the refusal is planted."""
    (tmp_path / "a.txt").write_text("text")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"a.txt: cannot be read \(Permission denied\); check data.source"):
        load_tokens(LanguageData(source=str(tmp_path / name)))


def test_planted_name_too_long() -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokens(LanguageData(source="x" * 5000))


def test_planted_stdlib_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"this interpreter keeps no library source there; set data.source"):
        load_tokens(LanguageData())
