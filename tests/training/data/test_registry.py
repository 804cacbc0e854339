"""Raw files in their publishers' format, to the exact fields; the registry, and its errors for missing names."""

import gzip
import importlib
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from tree import RAW

from exo_fast.training.data import registry
from exo_fast.training.data.examples import load_examples, load_prompts, load_sft, load_texts
from exo_fast.training.data.published import reviews
from exo_fast.training.data.published.hh import turns
from exo_fast.training.data.registry import RawDataset, known_names, open_dataset, register
from exo_fast.training.data.sources import find_source, read_records
from exo_fast.training.downloads import Snippet
from exo_fast.training.errors import InputError

FILTERED, COMPARISONS = RAW / "tldr" / "openai-tldr-filtered", RAW / "tldr" / "summarize_from_feedback"
HELPFUL, IMDB = RAW / "hh" / "helpful-base", RAW / "imdb" / "aclImdb"
EGG = "\n\nHuman: How do I boil an egg?"


def read(data: str, split: str = "train", tokenizer: Any = None) -> list[dict[str, Any]]:
    return [record for _, record in read_records(find_source(data, split), tokenizer)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# TL;DR


def test_tldr_filtered() -> None:
    # The filter of the original takes a summary as it is; an empty one is left out.
    source = find_source(f"tldr/sft:{FILTERED}", "train")
    assert [record for _, record in read_records(source)] == [
        {
            "prompt": "SUBREDDIT: r/relationships\nTITLE: My roommate [22M] eats my food\nPOST: He says he does not."
            "\n\nI marked the milk.\u2028It was emptied overnight.\nTL;DR:",
            "chosen": " Roommate denies eating my food; the marked milk says otherwise.",
        },
        {
            "prompt": 'SUBREDDIT: r/tifu\nTITLE: TIFU by "fixing" the shower\nPOST: Water everywhere.\nTL;DR:',
            "chosen": "I broke the shower 🚿 and flooded the flat.",
        },
    ]
    assert source.raw.dropped == {"empty summary": 1}
    (row,) = read(f"tldr/sft:{FILTERED}", "test")
    assert row["prompt"] == "SUBREDDIT: r/pettyrevenge\nTITLE: Parking\nPOST: \nTL;DR:"


def test_tldr_comparisons() -> None:
    prompt = "SUBREDDIT: r/relationships\nTITLE: Long distance\nPOST: We live 900 km apart.\nIs it worth it?\nTL;DR:"
    other = "SUBREDDIT: r/tifu\nTITLE: TIFU at work\nPOST: I sent the mail to everyone.\nTL;DR:"
    first, second = " Nine hundred km apart, worth it?", " We live apart."
    assert read(f"tldr/pref:{COMPARISONS}") == [
        {"prompt": prompt, "chosen": first, "rejected": second},
        {"prompt": other, "chosen": " I sent it to everyone.", "rejected": " Mail went wrong"},
    ]
    assert read(f"tldr/rw:{COMPARISONS}")[0] == {"prompt": prompt, "completions": [first, second], "rewards": [1, 0]}
    assert read(f"tldr/sft:{COMPARISONS}")[0] == {"prompt": prompt, "chosen": first}
    source = find_source(f"tldr/pref:{COMPARISONS}", "test")  # validation.json
    assert [row for _, row in read_records(source)] == [
        {"prompt": prompt, "chosen": " Same info, second.", "rejected": " Same info, first."}
    ]
    assert source.raw.dropped == {"a news article, not a Reddit post": 1}


# HH


def test_hh() -> None:
    source = find_source(f"hh/pref:{HELPFUL}", "train")
    assert [record for _, record in read_records(source)] == [
        {
            "prompt": EGG + "\n\nAssistant: In water.\n\nHuman: How long?\n\nAssistant:",
            "chosen": " Six minutes, for a soft one.",
            "rejected": " Until it is done.",
        },
        {  # "Humans:" in one of them; blank lines inside turns
            "prompt": "\n\nHuman: First line.\n\nSecond paragraph.\n\n\n\nThird, after two blank lines.\n\nAssistant:",
            "chosen": " Step one.\n\nStep two.",
            "rejected": " No.",
        },
        {  # spaces before a response are stripped from both
            "prompt": EGG + "\n\nAssistant:",
            "chosen": " A line\u2028separator stays, é and 🥚 too.",
            "rejected": " Spaces before.",
        },
        {  # "Assistant:" alone in its paragraph, where the original stops
            "prompt": EGG + "\n\nAssistant:",
            "chosen": "\n\nBegins in a paragraph of its own.",
            "rejected": " Does not.",
        },
        {"prompt": EGG + "\n\nAssistant:", "chosen": " One way.", "rejected": " Another way."},
        {"prompt": EGG + "\n\nAssistant:", "chosen": " You said  boil it.", "rejected": " Ask again."},
    ]
    assert source.raw.dropped == {"same response": 2, "empty response": 1}
    (row,) = read(f"hh/sft:{HELPFUL}", "test")  # test.jsonl.gz
    assert row == {"prompt": EGG + "\n\nAssistant:", "chosen": " Gently."}


def test_hh_turns_join_to_the_dialogue() -> None:
    dialogue = "\n\nbefore\n\nHuman: a\n\n\n\nb\n\nAssistant:\n\nc\n\nAssistant: \n\nHuman:\n\nd"
    assert turns("chosen", dialogue) == [
        "\n\nbefore",
        "Human: a\n\n\n\nb",
        "Assistant:\n\nc",
        "Assistant: \n\nHuman:\n\nd",
    ]
    assert "\n\n".join(turns("chosen", dialogue)) == dialogue


def test_hh_folder_of_folders(tmp_path: Path) -> None:
    for name in ("harmless-base", "helpful-base"):
        (tmp_path / name).mkdir()
        shutil.copy(HELPFUL / "test.jsonl.gz", tmp_path / name / "train.jsonl.gz")
    with pytest.raises(InputError, match=r"add one of its folders \(harmless-base, helpful-base\)"):
        find_source(f"hh/pref:{tmp_path}", "train")
    assert len(read(f"hh/pref:{tmp_path / 'helpful-base'}")) == 1


# IMDB


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: characters beyond ASCII are several tokens, and offsets leave out spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [text for path in sorted(IMDB.rglob("*.txt")) if (text := path.read_text(encoding="utf-8")).isascii()]
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def clean(path: Path) -> str:
    return path.read_text(encoding="utf-8").rstrip().replace("<br />", "\n")


def test_imdb_class() -> None:
    rows = read(f"imdb/class:{IMDB}")
    assert rows == [
        {
            "text": "A warm and quietly funny film about two brothers.\n\nIt earns every minute of its running time, "
            "and the last scene is worth the wait.",
            "label": "pos",
        },
        {
            "text": "Best thing I have seen this year, by a long way, and I have seen a lot of things.",
            "label": "pos",
        },
        {
            "text": "The plot is a mess \nand the jokes are older than I am; nobody on screen seems to have read the "
            "script.",
            "label": "neg",
        },
        {
            "text": "Boring. 😴😴😴 Two hours of people walking through rain, and not one of them has an umbrella or a "
            "reason.",
            "label": "neg",
        },
    ]
    assert [text.label for text in load_texts(find_source(f"imdb/class:{IMDB}", "test"))] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_imdb_sft_cuts_by_tokens(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = read(f"imdb/sft:{IMDB}", tokenizer=byte_tokenizer)
    texts = [clean(IMDB / f"train/{name}.txt") for name in ("pos/0_9", "pos/10_10", "neg/0_3", "neg/1_1")]
    assert [row["prompt"] + row["chosen"] for row in rows] == texts
    for row, text in zip(rows[:3], texts[:3], strict=True):
        ids = byte_tokenizer(text)["input_ids"]
        # What the original has, where no character is cut.
        assert (row["prompt"], row["chosen"]) == (byte_tokenizer.decode(ids[:10]), byte_tokenizer.decode(ids[10:]))
    # The tenth token here ends inside a character, which goes to the prompt whole.
    ids = byte_tokenizer(texts[3])["input_ids"]
    assert "\N{REPLACEMENT CHARACTER}" in byte_tokenizer.decode(ids[:10])
    assert byte_tokenizer.decode(ids[:10]).rstrip("\N{REPLACEMENT CHARACTER}") + "😴" == rows[3]["prompt"]
    # Loaders hand their tokenizer on.
    source = find_source(f"imdb/sft:{IMDB}", "train")
    assert [example.prompt for example in load_sft(source, tokenizer=byte_tokenizer)] == [row["prompt"] for row in rows]


def test_imdb_test_split_is_shuffled_and_alternates(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    # As the original does it, on files sorted by name: 0_10, 10_9, 1_8, 2_7.
    positive, negative = (sorted((IMDB / "test" / label).glob("*.txt")) for label in ("pos", "neg"))
    random.seed(42)
    random.shuffle(positive)
    random.shuffle(negative)
    expected = [clean(path) for pair in zip(positive, negative, strict=True) for path in pair]
    rows = read(f"imdb/sft:{IMDB}", "test", byte_tokenizer)
    assert [row["prompt"] + row["chosen"] for row in rows] == expected


def test_imdb_short_reviews_and_other_prefixes(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = open_dataset("imdb/sft", str(IMDB), tokenizer=byte_tokenizer, prefix_tokens=30)
    kept = dataset.records("train")
    assert len(kept) + dataset.dropped["no more than 30 tokens"] == 4
    assert 0 < len(kept) < 4
    with pytest.raises(InputError, match="the dataset hh/sft has no such option"):
        open_dataset("hh/sft", str(HELPFUL), prefix_tokens=3)


def test_imdb_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="so a tokenizer is needed; run `exo-fast prepare --tokenizer MODEL`"):
        read(f"imdb/sft:{IMDB}")
    with pytest.raises(InputError, match="reviews are not preferences; sample from a model"):
        read(f"imdb/pref:{IMDB}")
    (tmp_path / "train" / "pos").mkdir(parents=True)
    (tmp_path / "train" / "neg").mkdir()
    (tmp_path / "train" / "pos" / "0_1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"train/neg: no reviews \(\*\.txt\)"):
        read(f"imdb/class:{tmp_path}")
    (tmp_path / "train" / "neg" / "0_1.txt").write_text(" \n")
    with pytest.raises(InputError) as error:
        read(f"imdb/class:{tmp_path}")
    assert "pos/0_1.txt, line 1 (row 0), field `text`, value b'caf\\xe9': not UTF-8 text (byte 3)" in str(error.value)
    assert "neg/0_1.txt, line 1 (row 1), field `text`, value '': the review is empty" in str(error.value)
    (tmp_path / "train" / "neg" / "1_1.txt").mkdir()
    (tmp_path / "train" / "neg" / "2_1.txt").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"neg/1_1\.txt, .*no file, or one of more than 64 MiB(.|\n)*neg/2_1\.txt"):
        read(f"imdb/class:{tmp_path}")


# Reviews


def test_reviews_at_a_path_are_records(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(InputError, match="neither a snippet nor a record of reviews/class"):
        read(f"reviews/class:{tmp_path}")


@pytest.fixture
def snippets(monkeypatch: pytest.MonkeyPatch) -> list[Snippet]:
    rng = random.Random(0)
    words = list("abcdefghijklmnop")
    found = [Snippet(" ".join(rng.choices(words, k=rng.randint(5, 20))) + ".", rng.uniform(-4, 4)) for _ in range(400)]
    found += [Snippet(found[0].text + " Indeed", 0.0), Snippet('A "quoted opening of some words goes on, and on.', 1)]
    found += [Snippet("It has  two spaces in its opening and then it goes on, and on.", 3)]
    monkeypatch.setattr(reviews, "get_reviews", lambda cache, say: found)
    return found


def test_reviews(snippets: list[Snippet]) -> None:
    sft = {split: read("reviews/sft", split) for split in ("train", "test")}
    texts = {" ".join(snippet.text.split()) for snippet in snippets}
    for row in sft["train"] + sft["test"]:
        assert row["prompt"] + row["chosen"] in texts
        assert (len(row["prompt"].split()), row["chosen"][0]) == (6, " ")
    prompts = [row["prompt"].casefold() for row in sft["train"] + sft["test"]]
    assert len(prompts) == len(set(prompts)) > 200
    assert 0.05 < len(sft["test"]) / len(prompts) < 0.3
    assert any(row["prompt"] == "It has two spaces in its" for row in sft["train"] + sft["test"])
    assert not any('"' in prompt for prompt in prompts)

    kinds = {split: read("reviews/class", split) for split in ("train", "test")}
    assert sum(map(len, kinds.values())) == len(snippets) - 1  # one has the rating 0
    for row in kinds["train"] + kinds["test"]:
        assert row["label"] == ("pos" if row["rating"] > 0 else "neg")
    # A snippet is in one split, whatever the kind and the length of prompts.

    def openings(rows: list[dict[str, Any]], field: str) -> set[str]:
        return {" ".join(row[field].split()[:3]).casefold() for row in rows}

    assert not openings(kinds["test"], "text") & openings(kinds["train"], "text")
    assert openings(sft["test"], "prompt") <= openings(kinds["test"], "text")
    longer = [row for _, row in open_dataset("reviews/sft", None, prompt_words=8).records("test")]
    assert openings(longer, "prompt") <= openings(sft["test"], "prompt")
    with pytest.raises(InputError, match="prompt_words=2: at least 3 are needed"):
        open_dataset("reviews/sft", None, prompt_words=2)


# What is malformed

BAD_ROWS = {
    "tldr/sft": [
        ("{nonsense", "line 1 (row 0), field `(the whole row)`, value '{nonsense': not valid JSON"),
        (["a"], "line 2 (row 1), field `(the whole row)`, value ['a']: an object with the field `info`"),
        (
            {"subreddit": "a", "title": "b", "summary": "c"},
            "field `post`, value missing: the row has subreddit, title, summary; add `post`",
        ),
        ({"subreddit": "a", "title": 1, "post": "b", "summary": "c"}, "field `title`, value 1: a string is needed"),
    ],
    "tldr/pref": [
        ({"info": "x", "summaries": [], "choice": 0}, "field `info`, value 'x': an object with the field `subreddit`"),
        (
            {"info": {"subreddit": "a", "title": "b", "post": "c"}, "summaries": [{"text": "d"}], "choice": 0},
            "field `summaries`, value [{'text': 'd'}]: a list of at least 2",
        ),
        (
            {"info": {"subreddit": "a", "title": "b", "post": "c"}, "summaries": [{"text": "d"}, {}], "choice": 0},
            "field `summaries[1].text`, value missing",
        ),
        (
            {"info": {"subreddit": "a", "title": "b", "post": "c"}, "summaries": [{"text": "d"}] * 2, "choice": True},
            "field `choice`, value True: 0 or 1 is needed",
        ),
    ],
    "hh/pref": [
        ({"chosen": EGG}, "field `rejected`, value missing"),
        ({"chosen": "Human: a", "rejected": EGG}, "field `chosen`, value 'Human: a': a dialogue begins with a blank"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "field `chosen`, value 'Human: a': the first turn that differs must be the assistant's",
        ),
    ],
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_malformed_rows_are_all_told_by_file_and_line(name: str, tmp_path: Path) -> None:
    rows, messages = zip(*BAD_ROWS[name], strict=True)
    path = write_lines(tmp_path / "train.jsonl", list(rows))
    with pytest.raises(InputError) as error:
        read(f"{name}:{tmp_path}")
    text = str(error.value)
    assert text.startswith(f"{name}:{tmp_path}[train]: {len(rows)} of {len(rows)} rows cannot be used:")
    for number, (line, message) in enumerate(zip(text.split("\n")[1:], messages, strict=False), start=1):
        assert f"{path}, line {number} (row {number - 1}), field " in line
        assert message in line
    assert "exo-fast prepare --skip_malformed" in text


def test_ten_faults_at_most_and_skipping_them(tmp_path: Path) -> None:
    good = {"subreddit": "a", "title": "b", "post": "c", "summary": "d"}
    write_lines(tmp_path / "train.jsonl", [good, *({**good, "post": number} for number in range(25))])
    with pytest.raises(InputError) as error:
        read(f"tldr/sft:{tmp_path}")
    assert "value 9:" in str(error.value)
    assert "value 10:" not in str(error.value)
    assert "… and 15 more" in str(error.value)
    dataset = open_dataset("tldr/sft", str(tmp_path), skip_malformed=True)
    assert (len(dataset.records("train")), dataset.dropped) == (1, {"malformed": 25})


def test_nothing_left(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"chosen": EGG, "rejected": EGG}])
    with pytest.raises(InputError, match=r"every row was left out \(same response: 1\)"):
        read(f"hh/pref:{tmp_path}")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(InputError, match="no rows"):
        read(f"hh/pref:{tmp_path}")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"chosen": "a"}\n')[:-9])
    with pytest.raises(InputError, match="not a readable gzip file"):
        read(f"hh/pref:{tmp_path}")


# The registry


@pytest.mark.parametrize(
    "name", ["imdb/sft", "imdb/pref", "imdb/class", "hh/pref", "tldr/pref", "tldr/rw", "custom/rw"]
)
def test_records_that_are_there_already_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    row = {
        "sft": {"prompt": "a", "chosen": "b"},
        "pref": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "rw": {"prompt": "a", "completions": ["b", "c"], "rewards": [1, 2]},
        "class": {"text": "a", "label": "pos"},
    }[name.split("/")[1]]
    (tmp_path / "test.json").write_text(json.dumps([row], indent=4))
    assert read(f"{name}:{tmp_path}", "test") == [row]
    assert find_source(f"{name}:{tmp_path}", "train") is None
    assert read(f"{name}:{tmp_path / 'test.json'}", "train") == [row]  # a file is one split


def test_every_name_of_the_original_and_ours() -> None:
    original = {f"{name}/{kind}" for name in ("imdb", "tldr", "hh") for kind in ("sft", "pref", "rw")} | {"imdb/class"}
    ours = {"custom/sft", "custom/pref", "custom/rw", "custom/class", "reviews/sft", "reviews/class"}
    assert original | ours <= set(known_names())


def test_unknown_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"unknown dataset 'imbd/sft'; did you mean 'imdb/sft'"):
        find_source(f"imbd/sft:{tmp_path}", "train")
    with pytest.raises(InputError, match=r"unknown dataset 'q/z'; there are custom/class, .*, tldr/sft\."):
        find_source("q/z:x", "train")
    with pytest.raises(InputError, match=r"hh/pref: where is its data\? Write hh/pref:PATH"):
        find_source("hh/pref", "train")
    with pytest.raises(InputError, match="hh/pref:missing: no such file or directory"):
        find_source("hh/pref:missing", "train")
    # Without a colon it is rather a path, and one that is there wins.
    with pytest.raises(InputError, match=r"data/rw: no such file or directory\."):
        find_source("data/rw", "train")
    with pytest.raises(InputError, match=r"no such file or directory; did you mean 'reviews/sft'\?"):
        find_source("review/sft", "train")
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "reviews" / "sft" / "train.jsonl", [{"prompt": "mine", "chosen": "b"}])
    assert load_prompts(find_source("reviews/sft", "train")) == ["mine"]


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.mark.usefixtures("clean_registry")
def test_a_dataset_of_ones_own(tmp_path: Path) -> None:
    @register("mine/pref")
    class Mine(RawDataset):
        def to_record(self, row: Any) -> dict[str, Any]:
            return {"prompt": row["q"], "chosen": row["yes"], "rejected": row["no"]}

    write_lines(tmp_path / "train.jsonl", [{"q": "a", "yes": "b", "no": "c"}])
    (example,) = load_examples(
        find_source(f"mine/pref:{tmp_path}", "train"), loss_type="exo-pref", num_contrastive=None
    )
    assert (example.prompt, example.completions, example.rewards) == ("a", ["b", "c"], [1.0, 0.0])
    assert str(example.place).endswith("train.jsonl, line 1 (row 0)")
    with pytest.raises(InputError, match="'mine/pref' is registered already, by"):
        register("mine/pref")(type("Other", (RawDataset,), {}))
    for name in ("mine", "mine/other", "a/b/pref", "/pref"):
        with pytest.raises(InputError, match="NAME/KIND is needed, where KIND is one of sft, pref, rw, class"):
            register(name)
    with pytest.raises(InputError, match="is not a subclass of RawDataset"):
        register("mine/sft")(dict)


@pytest.fixture
def entry_point_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution with one entry point that works and one whose module fails."""
    folder = tmp_path / "site"
    info = folder / "exo_fast_test_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: exo-fast-test-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[exo_fast.datasets]\nplugged/sft = exo_fast_test_plugin:Plugged\nbroken/sft = exo_fast_test_broken:Broken\n"
        "wrong/sft = exo_fast_test_plugin:NUMBER\n"
    )
    (folder / "exo_fast_test_plugin.py").write_text(
        "from exo_fast.training.data.registry import RawDataset\nNUMBER = 1\n"
        "class Plugged(RawDataset):\n"
        "    def to_record(self, row):\n        return {'prompt': row['q'], 'chosen': row['a']}\n"
    )
    (folder / "exo_fast_test_broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("exo_fast_test_plugin", "exo_fast_test_broken"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("clean_registry")
def test_entry_points(entry_point_package: Path) -> None:
    write_lines(entry_point_package / "train.jsonl", [{"q": "a", "a": "b"}])
    assert read(f"plugged/sft:{entry_point_package}") == [{"prompt": "a", "chosen": "b"}]
    assert {"plugged/sft", "broken/sft", "imdb/sft"} <= set(known_names())
    assert len(read(f"hh/pref:{HELPFUL}")) == 6  # the broken one breaks no other
    with pytest.raises(InputError, match=r"'broken/sft': its entry point .*ModuleNotFoundError.*a_module_that_is_not"):
        find_source(f"broken/sft:{entry_point_package}", "train")
    with pytest.raises(InputError, match="1 is not a subclass of RawDataset"):
        find_source(f"wrong/sft:{entry_point_package}", "train")


def test_shards_of_a_split(tmp_path: Path) -> None:
    """Shards as in a download from the Hub, in the directory or in data/ below it."""
    import pyarrow
    import pyarrow.parquet

    def shard(name: str, *prompts: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"prompt": list(prompts)}), tmp_path / name)

    shard("data/train-00000-of-00003.parquet", "a", "b")
    shard("data/train-00002-of-00003.parquet", "d")
    with pytest.raises(InputError, match=r"2 parts of train are there, of 3 \(train-00000.*fetch those that are miss"):
        find_source(tmp_path, "train")
    shard("data/train-00001-of-00003.parquet", "c")
    shard("data/validation-00000-of-00001.parquet", "e")
    source = find_source(tmp_path, "train")
    assert load_prompts(source) == ["a", "b", "c", "d"]
    assert [path.name[:11] for path in source.files] == ["train-00000", "train-00001", "train-00002"]
    assert load_prompts(find_source(tmp_path, "test")) == ["e"]
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "data/train-00002-of-00003.parquet")
    with pytest.raises(InputError, match=r"train-00002-of-00003\.parquet, row 0, field `prompt`, value missing"):
        load_prompts(source)
    (tmp_path / "train.jsonl").write_text('{"prompt": "f"}')
    with pytest.raises(InputError, match=r"both train\.jsonl and data/train-00000-of-00003\.parquet are there"):
        find_source(tmp_path, "train")
