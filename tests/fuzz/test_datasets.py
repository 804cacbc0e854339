"""Data files of every kind, well-formed and not: rows that can be used, or an InputError that names file and place."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_files import folder, load, make_tokenizer
from fuzzing import JSON, REFUSED, TEXTS, damaged, fuzzed, judge, mutated
from hypothesis import given
from hypothesis import strategies as st

from exo_fast.data.examples import Example
from exo_fast.training.data.examples import (
    load_examples,
    load_pairs,
    load_prompts,
    load_samples,
    load_sft,
    load_texts,
)
from exo_fast.training.data.groups import tokenize
from exo_fast.training.data.sources import find_source, read_records
from exo_fast.training.downloads import MAX_UNPACKED, read_member
from exo_fast.training.errors import InputError

USER, ASSISTANT = {"role": "user", "content": "the film"}, {"role": "assistant", "content": "was good"}
OTHER = {"role": "assistant", "content": "good"}
ROWS = {
    "candidates": {"prompt": "the film", "completions": ["was", "good", "the"], "rewards": [0.5, 1, -2]},
    "drawn": {"prompt": "a", "completions": ["was", "film"], "rewards": [0, 1.5], "completion_ids": [[4, 2], [3]]},
    "pair": {"prompt": "the", "chosen": "film", "rejected": "was"},
    "completion": {"prompt": "the", "completion": "film"},
    "text": {"text": "the film", "label": "pos"},
    "truth": {"text": "the film", "label": False},
    "messages": {"messages": [USER, ASSISTANT]},
    "conversation": {"prompt": [USER], "completions": [[ASSISTANT], [OTHER]], "rewards": [0, 1]},
    "implicit": {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER], "chat_template_kwargs": {"a": 1}},
    "tldr": {
        "info": {"subreddit": "a", "title": "b", "post": "c"},
        "summaries": [{"text": "x"}, {"text": "y"}],
        "choice": 1,
    },
    "filtered": {"subreddit": "a", "title": "b", "post": "c", "summary": "d"},
    "dialogue": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
}
LOADERS: dict[str, tuple[Callable[..., list[Any]], tuple[str, ...]]] = {  # and the rows that they take as they are
    "exo-rw": (partial(load_examples, loss_type="exo-rw", num_contrastive=None), ("candidates", "drawn", "pair")),
    "dpo-pref": (partial(load_examples, loss_type="dpo-pref", num_contrastive=3), ("candidates",)),
    "pairs": (load_pairs, ("candidates", "drawn", "pair", "conversation", "implicit")),
    "sft": (load_sft, ("pair", "completion", "text", "messages")),
    "samples": (load_samples, ("candidates", "drawn", "pair", "completion", "conversation")),
    "texts": (load_texts, ("text", "truth")),
    "prompts": (load_prompts, ("candidates", "pair", "completion", "messages", "conversation")),
}
NAMES = ("hh/sft", "hh/pref", "hh/rw", "tldr/sft", "tldr/pref", "tldr/rw", "custom/rw", "custom/class", "reviews/class",
         "reviews/sft", "imdb/sft", "imdb/class")  # fmt: skip


RAW = {"hh": ("dialogue",), "tldr": ("tldr", "filtered")}


TOKENIZER = make_tokenizer()
TOKENIZERS = st.sampled_from([None, TOKENIZER, TOKENIZER])


def tokenise(rows: list[Any], place: Path) -> None:
    """Rows that were read can be tokenised, or are refused with their place."""
    if not isinstance(rows[0], Example):
        return
    if {len(row.rewards) for row in rows} == {len(row.completions) for row in rows} == {len(rows[0].completions)}:
        options = {"num_contrastive": None, "max_seq_len": 12, "max_gen_len": 4, "progress": False}
        groups = judge(lambda: tokenize(rows, TOKENIZER, **options), InputError, [str(place)])
        if groups is not REFUSED:
            assert len(groups) == len(rows)
            assert groups.rewards.isfinite().all()


@st.composite
def files(draw: st.DrawFn, kinds: tuple[str, ...]) -> tuple[str, bytes, bool]:
    """The name and content of a text file, and whether all is well with it."""
    rows = [ROWS[draw(st.sampled_from(kinds))]] * draw(st.integers(1, 3))
    good = draw(st.integers(0, 3)) == 0
    if not good:
        rows = draw(mutated(rows))
    if not isinstance(rows, list):
        rows = [rows]
    written = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    suffix = draw(st.sampled_from([".json", ".jsonl", ".json.gz", ".jsonl.gz"]))
    text = f"[{', '.join(written)}]" if draw(st.booleans()) else "\n".join(written)
    content = text.encode("utf-8", "surrogatepass")
    if not good and draw(st.booleans()):
        content = draw(damaged(content))
    if suffix.endswith(".gz"):
        content = gzip.compress(content, 1)
        if not good and draw(st.integers(0, 3)) == 0:
            content = draw(damaged(content))
    return f"train{suffix}", content, good


@pytest.mark.parametrize("name", LOADERS)
@fuzzed(40)
@given(data=st.data(), tokenizer=TOKENIZERS)
def test_text_files(name: str, data: st.DataObject, tokenizer: Any) -> None:
    loader, kinds = LOADERS[name]
    if tokenizer is None:
        kinds = tuple(kind for kind in kinds if "essages" not in kind and kind not in ("conversation", "implicit"))
    file, content, good = data.draw(files(kinds))
    with folder() as place:
        (place / file).write_bytes(content)
        rows = load(place, place, loader, tokenizer)
        if isinstance(rows, list):
            tokenise(rows, place)
        mixed = name == "exo-rw"  # rows of other numbers of candidates do not go together
        assert not good or mixed or isinstance(rows, list)


@fuzzed(60)
@given(data=st.data(), name=st.sampled_from(NAMES), tokenizer=TOKENIZERS)
def test_published_formats(data: st.DataObject, name: str, tokenizer: Any) -> None:
    loader, kinds = LOADERS[data.draw(st.sampled_from(["pairs", "sft", "texts", "prompts"]))]
    file, content, _ = data.draw(files(RAW.get(name.split("/")[0], kinds)))
    with folder() as place:
        (place / file).write_bytes(content)
        path = f"{name}:{place if data.draw(st.booleans()) else place / file}"
        load(place, path, loader, tokenizer)


@fuzzed(30)
@given(
    content=st.binary(max_size=12) | st.sampled_from([b"the film", b"", b"\xef\xbb\xbfthe", b" "]),
    what=st.integers(0, 9),
)
def test_reviews_as_files(content: bytes, what: int) -> None:
    with folder() as place:
        for label in ("pos", "neg"):
            (place / "train" / label).mkdir(parents=True)
            (place / "train" / label / "0_1.txt").write_bytes(b"the film was good " * 4)
        odd = place / "train" / "pos" / "1_1.txt"
        match what:
            case 0:
                odd.mkdir()
            case 1:
                odd.symlink_to(odd)
            case 2:
                odd.symlink_to("/dev/zero")
            case _:
                odd.write_bytes(content)
        load(place, f"imdb/class:{place}", load_texts, None)
        load(place, f"imdb/sft:{place}", load_sft, TOKENIZER)


CELLS = st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.binary(max_size=4) | st.text(max_size=5)
COLUMNS = st.one_of(
    st.lists(st.none() | st.text(max_size=5), min_size=2, max_size=2).map(lambda v: pyarrow.array(v, pyarrow.string())),
    st.lists(st.none() | st.binary(max_size=5), min_size=2, max_size=2).map(
        lambda v: pyarrow.array(v, pyarrow.binary()).view(pyarrow.string())  # not always UTF-8
    ),
    st.lists(st.none() | st.lists(st.floats(width=32), max_size=3), min_size=2, max_size=2).map(
        lambda v: pyarrow.array(v, pyarrow.list_(pyarrow.float32()))
    ),
    st.lists(st.lists(st.text(max_size=3), max_size=3), min_size=2, max_size=2).map(
        lambda v: pyarrow.array(v, pyarrow.list_(pyarrow.string()))
    ),
    st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=2).map(
        lambda v: pyarrow.array(v, pyarrow.timestamp("ns"))
    ),
    st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=2).map(lambda v: pyarrow.array(v, pyarrow.int64())),
    st.sampled_from([["the", "film"], [["was", "good"], ["a", "b"]], [[1.0, 0.0], [0.5, 2.0]]]).map(pyarrow.array),
)
FIELD_NAMES = ("prompt", "completions", "rewards", "chosen", "rejected", "completion_ids", "text", "label", "messages")


@fuzzed(50)
@given(data=st.data(), name=st.sampled_from(list(LOADERS)), tokenizer=TOKENIZERS)
def test_parquet_files(data: st.DataObject, name: str, tokenizer: Any) -> None:
    loader, kinds = LOADERS[name]
    row = ROWS[data.draw(st.sampled_from(kinds))]
    arrays = {field: pyarrow.array([value, value]) for field, value in row.items()}
    for field in data.draw(st.lists(st.sampled_from([*row, *FIELD_NAMES]), max_size=2)):
        arrays[field] = data.draw(COLUMNS)
    table = pyarrow.Table.from_arrays([*arrays.values()], names=[*arrays])
    if data.draw(st.integers(0, 9)) == 0:
        table = table.append_column(table.column_names[0], table.column(0))  # a name that is there already
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    content = buffer.getvalue()
    if data.draw(st.integers(0, 2)) == 0:
        content = data.draw(damaged(content))
    with folder() as place:
        (place / "train.parquet").write_bytes(content)
        load(place, place / "train.parquet", loader, tokenizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DatasetDict and a Dataset as `save_to_disk` leaves them."""
    place = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_list([ROWS["candidates"], ROWS["candidates"]])
    rows.save_to_disk(place / "one")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(place / "two")
    datasets.Dataset.from_list([{**ROWS["candidates"], "prompt": "SECRET"}]).save_to_disk(place / "secret")
    return place


ESCAPES = st.sampled_from(
    ["../secret", "../secret/data-00000-of-00001.arrow", "../../secret", "/etc/passwd", "..", ".", "", "a\0b", "~",
     "file:///etc/passwd", "s3://bucket/x", "{secret}/data-00000-of-00001.arrow", "{secret}"]
)  # fmt: skip
FEATURES = st.sampled_from(
    [{"_type": kind} for kind in ("Image", "Audio", "Video", "Pdf", "Nothing", "Json", "Array2D", "List")]
)


@fuzzed(60)
@given(data=st.data(), kind=st.sampled_from(["one", "two"]), split=st.sampled_from(["train", "test"]))
def test_saved_datasets(saved: Path, data: st.DataObject, kind: str, split: str) -> None:
    with folder() as place:
        shutil.copytree(saved / "secret", place.parent / "secret")
        shutil.copytree(saved / kind, place, dirs_exist_ok=True)
        path = data.draw(st.sampled_from(sorted(path for path in place.rglob("*") if path.is_file())))
        if path.suffix == ".json" and data.draw(st.integers(0, 3)):
            junk = ESCAPES.map(lambda text: text.format(secret=place.parent / "secret")) | FEATURES | JSON
            path.write_text(json.dumps(data.draw(mutated(json.loads(path.read_text()), junk))))
        else:
            path.write_bytes(data.draw(damaged(path.read_bytes())))
        rows = load(place, place, load_prompts, None, split)
        if isinstance(rows, list):
            assert "SECRET" not in rows


@fuzzed(100)
@given(data=st.data(), split=st.sampled_from(["train", "test", "eval"]))
def test_paths(data: st.DataObject, split: str) -> None:
    text = data.draw(
        TEXTS
        | st.sampled_from(["a" * 5000, "/" + "a/" * 3000, "loop", "loop/x", "folder.json", "torch.json", "zip.jsonl"])
        | st.sampled_from(
            ["hh/pref", "hh/pref:", "hh/pref:x\0y", "hh/prf:x", "a/b:c", "~nosuchuser", "reviews/sft:loop"]
        )
        | TEXTS.map("custom/rw:{}".format)
    )
    with folder() as place:
        (place / "loop").symlink_to("loop")
        (place / "folder.json").mkdir()
        (place / "torch.json").write_bytes(b"\x80\x02}q\x00.")
        with tarfile.open(place / "zip.jsonl", "w"):
            pass
        inside = text if ":" in text or text.startswith("~") or "/" in text else str(place / text)
        if "\0" not in text:
            text = text.replace("loop", str(place / "loop")) if text.startswith("reviews") else text
        # An error quotes a path as it is normally written, or as Python writes a string; or a data set's name.
        spellings = [inside, text, str(Path(inside)), text.partition(":")[0], str(place)]
        names = [*spellings, *(repr(spelling)[1:-1] for spelling in spellings)]

        def call() -> list[Any] | None:
            source = find_source(inside, split)
            return None if source is None else list(read_records(source))

        judge(call, InputError, names)


MEMBERS = st.sampled_from(["data.txt", "../data.txt", "/data.txt", "a/../data.txt", "data.txt/x", "é" * 120])
KINDS = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
         tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE]  # fmt: skip


@fuzzed(100)
@given(data=st.data())
def test_archives(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    ) as tar:
        for _ in range(data.draw(st.integers(0, 3))):
            info = tarfile.TarInfo(data.draw(MEMBERS))
            info.type = data.draw(st.sampled_from(KINDS))
            info.linkname = data.draw(MEMBERS)
            content = data.draw(st.binary(max_size=8))
            info.size = len(content) if info.type in (tarfile.REGTYPE, tarfile.CONTTYPE) else 0
            tar.addfile(info, io.BytesIO(content))
    content = buffer.getvalue()
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    content = gzip.compress(content, 1)
    if data.draw(st.integers(0, 3)) == 0:
        content = data.draw(damaged(content))
    with folder() as place:
        path = place / "archive.tar.gz"
        path.write_bytes(content)
        judge(lambda: read_member(path, "data.txt"), InputError, [str(path)])
        assert [entry.name for entry in place.parent.rglob("*")] == ["here", path.name]


@pytest.mark.parametrize("what", ["zeros", "names", "hole"])
def test_archives_that_declare_more_than_they_hold(tmp_path: Path, what: str) -> None:
    path = tmp_path / "archive.tar.gz"
    info = tarfile.TarInfo("data.txt")
    if what == "zeros":
        content = bytes(MAX_UNPACKED + 1)
    elif what == "names":
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**40
        content = info.tobuf(tarfile.GNU_FORMAT) * 5000
    else:
        info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[483:495] = b"77777777777\0"  # the real size of a sparse file
        header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
        content = bytes(header) + bytes(1024)
    path.write_bytes(gzip.compress(content, 1))
    with pytest.raises(InputError, match=r"archive\.tar\.gz: (unpacks to more|not a readable|data\.txt declares)"):
        read_member(path, "data.txt")
