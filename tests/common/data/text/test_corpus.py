"""common/data/text/corpus.py: bytes, characters and words; missing and damaged files in one sentence."""

import gzip

import numpy as np
import pytest

from common.data.source import sha256
from common.data.text import corpus
from common.data.text.corpus import Bytes, Characters, PlainText, WordFiles, Words
from common.errors import UserError

TEXT = "the cat\n\nthe dog sees the cat é\n"
SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@pytest.fixture
def words(tmp_path):
    (tmp_path / "train.txt").write_text(" b a \n\n c <unk> b\n")
    (tmp_path / "test.txt").write_text("a zebra\n")

    def made(**options):
        files = {"train": ["missing.txt", "train.txt"], "test": ["test.txt"]}
        return WordFiles(**({"root": str(tmp_path), "files": files, "name": "toy"} | options))

    return made


def plain(folder, content=None, **options):
    (folder / "text.txt").write_bytes(TEXT.encode() if content is None else content)
    return PlainText(root=str(folder), files=["text.txt"], **options)


@pytest.mark.parametrize("vocabulary", [Bytes(), Characters(TEXT)])
def test_text_survives(vocabulary):
    tokens = vocabulary.encode(TEXT)
    assert vocabulary.decode(tokens) == TEXT and max(tokens) < vocabulary.size
    assert vocabulary.lengths()[tokens].sum() == len(TEXT.encode())


def test_words_keep_lines_and_know_what_they_lack():
    vocabulary = Words(["<eos>", "the", "<unk>", "dog"])
    assert vocabulary.encode("the dog\n\nthe fox") == [1, 3, 0, 0, 1, 2]
    assert vocabulary.decode([1, 3, 0, 0, 1, 2]) == "the dog\n\nthe <unk>"
    assert vocabulary.lengths().tolist() == [1, 4, 6, 4]
    assert vocabulary.encode("\n") == [0]
    with pytest.raises(UserError, match=r"knows neither 'dgo' nor <unk>. Closest: dog"):
        Words(["<eos>", "dog"]).encode("dgo")
    with pytest.raises(UserError, match="no character 'Z'"):
        Characters(TEXT).encode("Z")


def test_splits_are_the_two_ends_of_the_text(tmp_path):
    source = plain(tmp_path, held_out=0.25)
    train, test = source.load("train"), source.load("test")
    assert bytes([*train, *test]) == TEXT.encode() and len(test) == round(len(TEXT.encode()) * 0.25)
    packed = gzip.compress(TEXT.encode())
    assert np.array_equal(plain(tmp_path, packed, held_out=0.25).load("test"), test)


def test_vocabulary_is_end_of_line_then_words_by_frequency(words):
    source = words()
    assert source.vocabulary().words == ["<eos>", "b", "a", "c", "<unk>"]  # ties in the order of the text
    assert source.load("train").tolist() == [1, 2, 0, 0, 3, 4, 1, 0]
    assert source.load("test").tolist() == [2, 4, 0]


def test_cache_is_built_once_verified_and_bound_to_the_files(words, tmp_path, monkeypatch):
    first = words(cache_dir=str(tmp_path / "cache"))
    expected = first.load("train").tolist()
    assert first.load("test").tolist() == [2, 4, 0]

    read = []
    lines = corpus._lines
    monkeypatch.setattr(corpus, "_lines", lambda path, name: read.append(path.name) or lines(path, name))
    again = words(cache_dir=str(tmp_path / "cache"))
    assert again.load("train").tolist() == expected and again.vocabulary().size == 5 and read == []

    (kept,) = (tmp_path / "cache").glob("*/train.npy")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert words(cache_dir=str(tmp_path / "cache")).load("train").tolist() == expected and read == ["train.txt"]

    (tmp_path / "train.txt").write_text("b b\n")
    assert words(cache_dir=str(tmp_path / "cache")).load("train").tolist() == [1, 1, 0]


def test_an_unknown_word_without_the_token_for_it(words, tmp_path):
    (tmp_path / "train.txt").write_text("a b\n")
    with pytest.raises(UserError, match=r"the word 'zebra' of the split test is not in the training text"):
        words().load("test")


def test_missing_files_say_where_and_whence(words, tmp_path):
    with pytest.raises(UserError, match=r"toy \(train\) not found: looked for .*one.txt or .*two.txt. Set data.root"):
        words(files={"train": ["one.txt", "two.txt"]}).check()
    source = PlainText(root=str(tmp_path / "gone"), files=["a.txt"], name="play", origin="example.org")
    with pytest.raises(UserError, match=r"does not exist\). Set data.root .*get it from example.org") as refused:
        source.check()
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="must name the split train"):
        words(files={"test": ["test.txt"]})


def test_damaged_files_are_named(words, tmp_path):
    with pytest.raises(UserError, match=r"text.txt is damaged: its text has another sha256"):
        plain(tmp_path, digest=sha256(b"another")).load("train")
    with pytest.raises(UserError, match=r"text.txt is damaged: it is no UTF-8"):
        plain(tmp_path, b"\xff\xfe", unit="char").load("train")
    with pytest.raises(UserError, match=r"text.txt is damaged: it cannot be read"):
        plain(tmp_path, gzip.compress(b"x" * 1000)[:-12]).load("train")
    (tmp_path / "train.txt").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match=r"train.txt is damaged: it cannot be read"):
        words().load("train")


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"data\.source\.unit must be one of byte, char"):
        plain(tmp_path, unit="bytes")
    with pytest.raises(UserError, match=r"data\.source\.held_out must be > 0 and < 1"):
        plain(tmp_path, held_out=1.0)
    with pytest.raises(UserError, match=r"has no split 'tset'\. Closest: test"):
        plain(tmp_path).load("tset")


def test_the_real_texts(data_folder):
    folder = data_folder("text")
    for unit, size in (("byte", 256), ("char", 65)):
        source = PlainText(root=str(folder), files=["tinyshakespeare.txt.gz"], unit=unit, digest=SHAKESPEARE)
        assert source.vocabulary().size == size
        assert (len(source.load("train")), len(source.load("test"))) == (1_003_855, 111_539)
    wiki = {"train": ["wikitext2_valid.tokens.txt.gz"], "test": ["wikitext2_test.tokens.txt.gz"]}
    source = WordFiles(root=str(folder), files=wiki)
    # 217,646 and 245,569 tokens with the ends of lines: the published sizes of WikiText-2 valid and test
    assert (len(source.load("train")), len(source.load("test"))) == (217_646, 245_569)
    assert source.vocabulary().size == 13_777
