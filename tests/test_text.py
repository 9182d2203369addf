"""Text and token files that the tests make themselves, and the library of the running Python."""

import builtins
import functools
import itertools
import json
import pathlib
import sysconfig

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bmjax import data
from bmjax.data import packing

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away", "from", "it", ""]


def prose(words, seed=0):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def load(source, **settings):
    return data.load(data.Data(source=source, **{"length": 16, **settings}))


def tokenizer(path):
    """A file of a tokenizer with a few whole words, special tokens, truncation and padding, as files from elsewhere have them."""
    import tokenizers

    words = sorted({*WORDS, "<s>", "<unk>", "<pad>"} - {""})
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", words.index("<s>"))])
    made.enable_truncation(10)
    made.enable_padding(length=10)
    made.save(str(path))
    return words


def test_a_file_is_bytes_in_order(tmp_path):
    content = prose(2000).encode() + "é\r\n".encode()
    (tmp_path / "a.txt").write_bytes(content)
    dataset = load(f"text:{tmp_path / 'a.txt'}")
    assert (dataset.kind, dataset.classes) == ("tokens", 256)
    assert bytes(dataset.train.take(slice(None))["inputs"].astype(np.uint8).ravel()) == content[: dataset.train.inputs.size]
    assert (
        bytes(dataset.train.take(slice(None))["targets"].astype(np.uint8).ravel()) == content[1 : dataset.train.inputs.size + 1]
    )
    tokens = sum(split.inputs.size for split in (dataset.train, dataset.valid, dataset.test))
    assert len(content) - 3 * 17 <= tokens < len(content)
    assert abs(dataset.test.inputs.size / len(content) - 0.05) < 0.01


def test_a_folder_is_a_document_each_file_but_hidden_ones(tmp_path):
    (tmp_path / "sub" / ".cache").mkdir(parents=True)
    for i in range(30):
        (tmp_path / ("sub" if i % 2 else ".") / f"{i:02}.md").write_text(chr(65 + i) * 100)
    for hidden in (".hidden", "sub/.cache/x.md"):
        (tmp_path / hidden).write_text("~" * 500)
    dataset = load(f"text:{tmp_path}", test=0.2, valid=0.2, packing="first_fit")
    seen = [set(split.targets[split.extra["weights"]].tolist()) for split in (dataset.train, dataset.valid, dataset.test)]
    assert set.union(*seen) == set(range(65, 95))
    assert [len(part) for part in seen] == [18, 6, 6]


def test_the_library_of_this_python_is_text():
    dataset = load("text", length=512, limit=300)
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    first = (root / "__future__.py").read_bytes()
    whole = [bytes(part.inputs.astype(np.uint8).ravel()) for part in (dataset.train, dataset.valid, dataset.test)]
    assert sum(first[:400] in part for part in whole) == 1
    assert load("text:", length=512, limit=300).fingerprint == dataset.fingerprint
    assert not any(b"class ListTest" in part for part in whole)  # test/test_list.py


def test_an_end_is_put_after_each_document(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [{"text": letter * 20, "id": i} for i, letter in enumerate("abcdefgh" * 4)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    dataset = load(f"jsonl:{path}", end=0, test=0.1, valid=0.1)
    stream = bytes(dataset.train.inputs.ravel())
    assert all(part == part[:1] * 20 for part in stream.split(b"\0")[:-1])
    assert stream.count(b"\0") >= 20
    beyond = load(f"jsonl:{path}", end=256, test=0.1, valid=0.1)
    assert (beyond.classes, beyond.train.inputs.max()) == (257, 256)
    with pytest.raises(ValueError, match=r"data.end is 300; expected an id of the vocabulary, 0 to 255"):
        load(f"jsonl:{path}", end=300, vocabulary=256)


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    texts = [prose(50, seed) for seed in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": text, "n": 1}) for text in texts))
    pq.write_table(pa.table({"body": texts, "n": [1] * 30}), tmp_path / "a.parquet")
    one, two = load(f"jsonl:{tmp_path / 'a.jsonl'}", column="body"), load(f"parquet:{tmp_path / 'a.parquet'}", column="body")
    assert one.fingerprint == two.fingerprint
    with pytest.raises(ValueError, match=r"line 1 of .* has no text in 'text'; it has body, n; set data.column"):
        load(f"jsonl:{tmp_path / 'a.jsonl'}")
    with pytest.raises(ValueError, match=r"no column of text 'n'; it has body \(string\), n \(int64\); set data.column"):
        load(f"parquet:{tmp_path / 'a.parquet'}", column="n")


def test_a_tokenizer_file_gives_its_ids_and_nothing_else(tmp_path):
    words, text = tokenizer(tmp_path / "t.json"), prose(3000)
    (tmp_path / "a.txt").write_text(text)
    dataset = load(f"text:{tmp_path / 'a.txt'}", tokenizer=str(tmp_path / "t.json"))
    assert dataset.classes == len(words)
    found = [words[i] for i in dataset.train.inputs.ravel()]
    assert found == text.split()[: len(found)]  # neither special tokens nor truncation nor padding
    assert load(f"text:{tmp_path / 'a.txt'}", tokenizer=str(tmp_path / "t.json"), vocabulary=64).classes == 64
    with pytest.raises(
        ValueError, match=f"has {len(words)} ids, and data.vocabulary is 8; set it to 0 or to at least {len(words)}"
    ):
        load(f"text:{tmp_path / 'a.txt'}", tokenizer=str(tmp_path / "t.json"), vocabulary=8)


def test_bad_tokenizers_get_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\xff" * 400)
    (tmp_path / "bad.json").write_text("{}")
    tokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"no tokenizer file 'gone.json'"):
        load(f"text:{tmp_path / 'a.txt'}", tokenizer="gone.json")
    with pytest.raises(ValueError, match="not readable as a tokenizers JSON file"):
        load(f"text:{tmp_path / 'a.txt'}", tokenizer=str(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match="is no UTF-8 text, which a tokenizer needs"):
        load(f"text:{tmp_path / 'a.txt'}", tokenizer=str(tmp_path / "t.json"))
    real = builtins.__import__

    def without(name, *args):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="needs the package tokenizers, which is not installed"):
        load(f"text:{tmp_path / 'a.txt'}", tokenizer=str(tmp_path / "t.json"))


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_a_file_of_ids_stays_on_the_disk(tmp_path, dtype):
    ids = np.random.default_rng(0).integers(0, 900, 5000).astype(dtype)
    ids[7] = 899
    np.save(tmp_path / "a.npy", ids)
    dataset = load(f"tokens:{tmp_path / 'a.npy'}")
    assert dataset.classes == 900
    base = dataset.train.inputs
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert isinstance(base, np.memmap)
    batch = data.train_batches(dataset.train, 8, 0)[3]
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    np.testing.assert_array_equal(batch["inputs"], ids[batch["id"][:, None] * 16 + np.arange(16)])
    np.testing.assert_array_equal(batch["targets"], ids[batch["id"][:, None] * 16 + np.arange(16) + 1])
    assert load(f"tokens:{tmp_path / 'a.npy'}", vocabulary=1000).classes == 1000
    with pytest.raises(ValueError, match="the id 899 at place 7 is outside the vocabulary of 899"):
        load(f"tokens:{tmp_path / 'a.npy'}", vocabulary=899)


def test_ids_of_a_file_too_large_to_read_are_checked_in_each_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "FULL", 1000)
    monkeypatch.setattr(packing, "sampled", lambda stream: [stream[:100]])
    ids = np.zeros(5000, np.int32)
    ids[200:205] = 99
    np.save(tmp_path / "a.npy", ids)
    dataset = load(f"tokens:{tmp_path / 'a.npy'}", vocabulary=50)
    with pytest.raises(
        ValueError, match=r"a batch holds the id 99, which is outside the vocabulary of 50; correct data.vocabulary"
    ):
        dataset.train.take(slice(None))
    assert dataset.train.take(slice(5))["inputs"].max() == 0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((10, 10), np.int32), r"found int32 \[10, 10\]; expected integers \[tokens\]"),
        (np.zeros(100), r"found float64 \[100\]"),
        (np.zeros(0, np.int32), r"found int32 \[0\]"),
        (np.array([0, 2**40] * 100), "ids is more than int32 holds"),
        (np.zeros(100, np.int32), "leave 5 for the valid split, which needs at least 17"),
        (np.array([None]), "not readable as an .npy file of plain numbers"),
    ],
)
def test_bad_token_files_get_one_line(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message) as raised:
        load(f"tokens:{tmp_path / 'a.npy'}")
    assert "\n" not in str(raised.value)


def test_what_is_missing_or_broken_gets_one_line(tmp_path):
    for source, name in (("text", "text:<file or folder>"), ("jsonl", "jsonl:<file>"), ("parquet", "parquet:<file>")):
        with pytest.raises(ValueError, match=f"there is no .*gone.*; expected {name}"):
            load(f"{source}:{tmp_path / 'gone'}")
    with pytest.raises(ValueError, match=r"no data file ''; expected tokens:<file.npy>"):
        load("tokens")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="there is no text in it"):
        load(f"text:{tmp_path / 'empty.txt'}")
    (tmp_path / "a.jsonl").write_text('{"text": "yes"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* has no text in 'text'"):
        load(f"jsonl:{tmp_path / 'a.jsonl'}")
    (tmp_path / "b.jsonl").write_text('{"text": \n')
    with pytest.raises(ValueError, match=r"line 1 of .* is not readable as JSON"):
        load(f"jsonl:{tmp_path / 'b.jsonl'}")
    with pytest.raises(ValueError, match="not readable as a parquet file"):
        load(f"parquet:{tmp_path / 'a.jsonl'}")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"row 1 of .* has no text in 'text'"):
        load(f"parquet:{tmp_path / 'a.parquet'}")
    np.savez(tmp_path / "a.npz", a=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"holds several arrays; expected an .npy file with one"):
        load(f"tokens:{tmp_path / 'a.npz'}")
    np.save(tmp_path / "a.npy", np.arange(100))
    with pytest.raises(ValueError, match=r"a file of ids has no documents to pack; set data.packing to concat"):
        load(f"tokens:{tmp_path / 'a.npy'}", packing="first_fit")
    with pytest.raises(ValueError, match=r"bytes have 256 values, and data.vocabulary is 100"):
        load("text", vocabulary=100)


UNICODE = ["naïve", "日本語", "🙂", "the", "quick", "\tfox", "ß", "a b", "<s>"]


def byte_level(path, text, prefix=False):
    """A byte-level BPE trained on a text, so that some tokens are parts of a character; no decoder, as many files have none."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    made.train_from_iterator([text], trainer)
    made.save(str(path))


def sentencepiece(path, text):
    """As Llama's: a space before the text, U+2581 for spaces, bytes for what has no piece."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    normalizers = tokenizers.normalizers
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", *raw], initial_alphabet=list("\u2581abcdefghijklmno"), show_progress=False
    )
    made.train_from_iterator(["abc def\u2581ghi"], trainer)
    made.save(str(path))


def foreign(words, seed):
    return " ".join(np.random.default_rng(seed).choice(UNICODE, words))


KINDS = {"bytes": None, "byte_level": byte_level, "prefix": functools.partial(byte_level, prefix=True), "pieces": sentencepiece}
END = 1000


@pytest.fixture(params=KINDS)
def documents(request, tmp_path):
    """(settings, {ids of a document: (its bytes, those of its first token)}) of texts in many scripts."""
    texts = [f"{i} {foreign(20, i)}" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = {"source": f"jsonl:{tmp_path / 'a.jsonl'}", "test": 0.2, "valid": 0.2, "end": END}
    if request.param == "bytes":
        return settings, {tuple(text.encode()): (len(text.encode()), 1) for text in texts}
    import tokenizers

    path = str(tmp_path / "t.json")
    KINDS[request.param](path, "".join(texts))
    known = {}
    for text in texts:
        encoded = tokenizers.Tokenizer.from_file(path).encode(text, add_special_tokens=False)
        first = len(encoded.tokens[0]) - (request.param != "byte_level")  # digits, behind a space that is not the text's
        known[tuple(encoded.ids)] = len(text.encode()), first
    return {**settings, "tokenizer": path}, known


def test_each_target_knows_its_bytes(documents):
    """Between two ends lie the bytes of one document; an end stands for none."""
    settings, known = documents
    dataset, seen = load(**settings), 0
    assert dataset.bytes_note == ""
    for split in (dataset.train, dataset.valid, dataset.test):
        assert split.text_bytes == split.target_bytes.sum()
        targets, found = split.targets.ravel(), split.target_bytes.ravel()
        ends = np.flatnonzero(targets == END)
        assert not found[ends].any()
        for first, last in itertools.pairwise(ends):
            assert found[first:last].sum() == known[tuple(targets[first + 1 : last].tolist())][0]
            seen += 1
    assert seen > 30
    assert set(dataset.train.take(slice(4))) == {"inputs", "targets", "id"}  # no batch is larger for it


def test_packed_targets_know_their_bytes(documents):
    """A document's first token is no target, padding is no text."""
    settings, known = documents
    dataset, seen = load(**settings, packing="first_fit", length=400), 0
    for split in (dataset.train, dataset.valid, dataset.test):
        segments = split.extra["segments"]
        assert not split.target_bytes[segments == 0].any()
        assert split.text_bytes == split.target_bytes.sum()
        for row, numbers in enumerate(segments):
            for number in range(1, numbers.max() + 1):
                whole, first = known[tuple(split.inputs[row][numbers == number].tolist())]
                assert split.target_bytes[row][numbers == number].sum() == whole - first
                seen += 1
    assert seen == len(known)


def lossy(path, words, **parts):
    import tokenizers

    vocabulary = {word: number for number, word in enumerate(["<unk>", " ", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "isolated")
    for name, part in parts.items():
        setattr(made, name, part)
    made.save(str(path))


def test_tokens_that_do_not_spell_the_text_have_no_bytes(tmp_path):
    import tokenizers

    texts = ["one two one" * 9, "two one Two"] * 20
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

    def note(words, **parts):
        lossy(tmp_path / "t.json", words, **parts)
        dataset = load(f"jsonl:{tmp_path / 'a.jsonl'}", tokenizer=str(tmp_path / "t.json"), length=4)
        known = {split.text_bytes is not None for split in (dataset.train, dataset.valid, dataset.test)}
        assert known == {dataset.bytes_note == ""}
        return dataset.bytes_note

    words = ["one", "two", "Two", "oneone"]
    assert note(words) == ""
    reason = "do not spell its text exactly (it normalises, drops white space, or has unknown tokens)"
    assert f"t.json makes of line 2 of {tmp_path / 'a.jsonl'} {reason}" in note(["one", "two", "oneone"])  # Two is unknown
    assert reason in note(words, normalizer=tokenizers.normalizers.Lowercase())
    assert reason in note(words, pre_tokenizer=tokenizers.pre_tokenizers.Whitespace())


def test_ids_of_a_file_are_bytes_only_where_they_can_be_nothing_else(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5000).astype(np.uint8))
    dataset = load(f"tokens:{tmp_path / 'a.npy'}")
    assert (dataset.test.text_bytes, dataset.bytes_note) == (dataset.test.targets.size, "")
    np.save(tmp_path / "a.npy", np.arange(5000) % 256)
    dataset = load(f"tokens:{tmp_path / 'a.npy'}")
    assert dataset.test.text_bytes is None
    assert dataset.bytes_note == "bits per byte are left out: a file of ids does not say how many bytes of text each stands for"
