"""Every code block, link and picture of the README and of the documentation's pages.

Python blocks run, page by page, in one namespace a page; `model`, `tokenizer` and `input_ids` are the reader's own on
the page, and here a tiny Llama, a small tokenizer with a chat template and two rows. In shell blocks the commands that
make files run, and every command goes through its own parser, in the directory that the page's commands have left.
Recipes go through the check of recipes, data through the reader of data. A block that cannot be run says so, and why,
in a comment before it: `<!-- not run: reason -->`.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import chats
import families
import pytest
import torch
import yaml
from datasets import Dataset
from tree import ROOT

DOCS = ROOT / "docs"
AT_ROOT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
EXAMPLES = ROOT / "examples" / "README.md"
PAGES = [page for page in (*AT_ROOT, EXAMPLES, *sorted(DOCS.rglob("*.md"))) if page.exists()]
NOT_RUN = re.compile(r"<!-- not run: (\S.{9,}?) -->")
MOST_NOT_RUN = 8
OPTIONAL = ("trl", "peft", "lightning", "liger_kernel", "cut_cross_entropy", "wandb", "matplotlib")  # extras

# Programs that a page may name beside ours: what a shell has, and what others install.
MAKES_FILES = ("mkdir", "cat", "printf", "cp")
HERE = r"<<-?\s*'?(\w+)'?"  # the beginning of a here-document
OTHERS = re.compile(
    "cd|export|source|ls|eval|echo|git|jq|head|tail|sbatch|squeue|kill|less|grep|exit|tensorboard|wandb|hf|mkdocs|apt-get"
    "|ruff|mypy"
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    found, lines = [], page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"(\s*)(```+)\s*([\w+-]*)", lines[number])
        if not fence:
            number += 1
            continue
        indent, mark, language = fence.groups()
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == mark)
        text = "\n".join(line.removeprefix(indent) for line in lines[number + 1 : end]) + "\n"
        before = next((line for line in reversed(lines[:number]) if line.strip()), "")
        reason = NOT_RUN.search(before)
        found.append(Block(page, number + 1, language, text, reason and reason[1]))
        number = end + 1
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if not block.not_run]


def of(*languages: str) -> list[Block]:
    return [block for block in RUN if block.language in languages]


def pages_with(*languages: str) -> list[Any]:
    names = dict.fromkeys(block.page for block in of(*languages))
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in names]


def page_directory(page: Path, tmp_path: Path) -> Path:
    """A directory like a checkout's, in which the page's files are made."""
    for name in ("recipes", "Makefile", "setup.py", "tests", "benchmarks", "examples", "docs", "constraints.txt"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


# ---- Python ----


@pytest.mark.filterwarnings("ignore")  # of other libraries
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where classes that a page defines say they are from
    names = module.__dict__
    text = "".join(block.text for block in of("python") if block.page == page)
    if re.search(r"\b(model|tokenizer)\b", text):
        tokenizer = chats.byte_level(chats.CHATML)
        names |= {"tokenizer": tokenizer, "input_ids": torch.arange(12).view(2, 6)}
        names["model"] = families.tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
        names["model"].save_pretrained("model")
        names["model"].config._name_or_path = "model"  # from which TRL loads the reference
        names["pairs"] = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 4)
    threads, generator = torch.get_num_threads(), torch.random.get_rng_state()
    try:
        for block in of("python"):
            if block.page == page:
                needed = [name for name in OPTIONAL if re.search(rf"(from|import) {name}\b", block.text)]
                if "exo_fast.integrations.trl" in block.text:
                    needed.append("trl")
                for name in needed:
                    pytest.importorskip(name, reason=f"{page.name} imports {name}, which is not installed")
                exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    finally:
        if "exo_fast.integrations.trl" in sys.modules:
            sys.modules["exo_fast.integrations.trl"].unpatch_trl()
        torch.set_num_threads(threads)
        torch.random.set_rng_state(generator)
    if page in (ROOT / "README.md", DOCS / "index.md"):
        assert torch.isfinite(names["loss"])
        assert names["policy_logps"].shape == (2, 4)
        assert names["hidden"].grad.abs().sum() > 0
        assert names["weight"].grad.abs().sum() > 0
    if page == DOCS / "quick-start.md":
        assert names["sharing"].ok
        assert names["losses"][-1] < names["losses"][0]


# ---- shell ----


class Parsed(BaseException):
    """Raised instead of running a command whose own parser has accepted its words."""


def commands_of(text: str) -> list[tuple[str, str]]:
    """(command, here-document) of a block: continuations joined, `&&` and `;` taken apart, comments left out."""
    found: list[tuple[str, str]] = []
    lines = iter(text.splitlines())
    for line in lines:
        while line.rstrip().endswith("\\"):
            line = line.rstrip()[:-1] + " " + next(lines).strip()
        document = ""
        if here := re.search(HERE, line):
            for inside in lines:
                if inside.strip() == here[1]:
                    break
                document += inside + "\n"
            found.append((line, document))
            continue
        if line.startswith("#"):
            continue
        lexer = shlex.shlex(line, posix=False, punctuation_chars="&|;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                if words:
                    found.append((" ".join(words), ""))
                words = []
            else:
                words.append(word)
    return found


def without_redirections(words: list[str]) -> list[str]:
    found = []
    skip = False
    for word in words:
        if skip or re.fullmatch(r"\d?[<>]+(&\d)?\S*", word):
            skip = not skip and re.fullmatch(r"\d?[<>]+", word) is not None
            continue
        found.append(word)
    return found


def check_command(line: str, document: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the line if it makes files, otherwise give it to its own parser. Fails if it is no command."""
    if assignment := re.fullmatch(r"(?:export )?(\w+)=(.*)", line.strip()):
        variables[assignment[1]] = assignment[2].strip("\"'")
        return
    if line.split()[0] in MAKES_FILES:
        mark = re.search(HERE, line)
        script = f"{line}\n{document}{mark[1]}\n" if mark else line
        subprocess.run(["bash", "-ec", script], check=True, timeout=20)
        return
    words = shlex.split(re.sub(r"\$\(.*?\)", "0", line))
    words = [
        word for w in words for word in (variables[w[1:]].split() if w.startswith("$") and w[1:] in variables else [w])
    ]
    words = [re.sub(r"\$\{?(\w+)\}?", lambda name: variables.get(name[1], "1"), word) for word in words]
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    words = without_redirections(words)
    if words[:1] == ["srun"] or words[:1] == ["env"] or words[:1] == ["time"]:
        words = words[1:]
        while words and (words[0].startswith("-") or "=" in words[0]):
            words = words[2 if words[0] == "-u" else 1 :]
    if not words:
        return
    program, *rest = words
    program = program.removeprefix(".venv/bin/").removeprefix("./")
    if program == "exo-fast":
        parse_stage(rest, monkeypatch)
    elif program in ("torchrun", "deepspeed"):
        parse_launcher(program, rest, monkeypatch)
    elif program == "make":
        check_make(rest)
    elif program == "pytest":
        check_pytest(rest)
    elif re.fullmatch(r"python3?(\.\d+)?", program):
        check_python(rest, monkeypatch)
    elif program == "pip":
        check_pip(rest)
    else:
        assert OTHERS.fullmatch(program), f"{program!r} is no command that this test knows"


def stopping_parser(monkeypatch: pytest.MonkeyPatch, stop: Any) -> None:
    """Have argparse raise Parsed once it has accepted words for which `stop(parser)` holds."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> argparse.Namespace:
        found = parse(self, *arguments, **options)
        if stop(self):
            raise Parsed
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def expect_parsed(call: Any) -> None:
    """`call` must reach its own work, or be a request for help."""
    try:
        call()
    except Parsed:
        return
    except SystemExit as end:
        if end.code:
            raise
        return
    pytest.fail("the command did its work, or refused it, before its words were parsed")


def parse_stage(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`exo-fast WORDS` through the command line's own parsers, up to where the stage would begin."""
    from exo_fast.training.cli import command as cli

    if words in (["--help"], ["--version"]):
        return
    stage = next(word for word in words if not word.startswith("-"))
    assert stage in cli.STAGES, f"there is no stage {stage!r}"
    monkeypatch.setenv("HF_TOKEN", "none")  # asked for before anything is published; nothing is
    if "--sequence_parallel" in words:  # must divide the launcher's processes, of which a test has one
        at = words.index("--sequence_parallel")
        words = words[:at] + words[at + 2 :]
    with monkeypatch.context() as patch:
        if cli.STAGES[stage].config is None:
            stopping_parser(patch, lambda parser: parser.prog != "exo-fast")
        else:

            def begin(_: Any) -> None:
                raise Parsed

            patch.setattr(cli.Stage, "code", lambda self: SimpleNamespace(**{self.function: begin}))
            if any(word in ("-h", "--help", "--help-all") for word in words):
                return
        expect_parsed(lambda: cli.main(words))


def parse_launcher(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(words)
        module, script, rest = found.module, found.training_script, found.training_script_args
    else:
        launcher = pytest.importorskip("deepspeed.launcher.runner", reason="deepspeed is not installed")
        found = launcher.parse_args(words)
        module, script, rest = found.module, found.user_script, found.user_args
    if module:
        assert script == "exo_fast.training.cli"
        parse_stage(rest, monkeypatch)
    else:
        assert (ROOT / script).exists() or script in ("train.py", "my_script.py"), script


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^([\w $()/.-]+):(?!=)", makefile, flags=re.M)
    targets = {target for rule in rules for target in rule.split()}
    for word in words:
        if "=" in word:
            name = word.split("=")[0]
            assert re.search(rf"\b{name}\b", makefile), f"the Makefile has no variable {name}"
        else:
            assert word in targets, f"the Makefile has no target {word}"


def check_pytest(words: list[str]) -> None:
    marks = {line.split(":")[0] for line in pytest_markers()}
    values = iter(words)
    for word in values:
        if word == "-m":
            assert set(re.findall(r"\w+", next(values))) - {"not", "and", "or"} <= marks
        elif word in ("-n", "--dist", "-k", "-p"):
            next(values)
        elif not word.startswith("-"):
            assert (ROOT / word.split("::")[0]).exists(), f"there is no {word}"


def pytest_markers() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    return re.findall(r'"([^"]*)"', re.search(r"^markers = \[(.*?)\]", text, flags=re.M | re.S)[1])


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m MODULE …` and `python FILE …`: the module or file is there, and a module's main accepts its words."""
    while words and words[0] in ("-X", "-W"):
        words = words[2:]
    if words[:1] == ["-c"]:
        compile(words[1], "-c", "exec")
    elif words[:1] == ["-m"]:
        name, *rest = words[1:]
        if name == "pip":
            check_pip(rest)
        elif name.startswith("exo_fast.training.cli"):
            parse_stage(rest, monkeypatch)
        else:
            assert importlib.util.find_spec(name), f"there is no module {name}"
            module = importlib.import_module(name) if name.startswith("exo_fast.") else None
            if hasattr(module, "argparse") and inspect.signature(module.main).parameters:
                with monkeypatch.context() as patch:
                    stopping_parser(patch, lambda parser: True)
                    expect_parsed(lambda: module.main(rest))
    elif words and not words[0].startswith("-"):
        assert (ROOT / words[0]).exists() or Path(words[0]).exists(), f"there is no {words[0]}"


def check_pip(words: list[str]) -> None:
    extras = set(metadata("exo_fast").get_all("Provides-Extra") or ())
    for word in words:
        if named := re.fullmatch(r"(?:\.|exo_fast)\[([\w,-]+)\]", word):
            asked = set(named[1].split(","))
            assert asked <= extras | declared_extras(), f"no extra {sorted(asked - extras)}"


def declared_extras() -> set[str]:
    """The extras of setup.py, which an older installation does not know yet."""
    text = (ROOT / "setup.py").read_text()
    return set(re.findall(r'^\s+"(\w+)":', text[text.index("extras_require") :], flags=re.M))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages_with("bash", "sh", "shell", "console"))
def test_commands_are_accepted(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(page_directory(page, tmp_path))
    variables: dict[str, str] = {}
    wrong = []
    for block in of("bash", "sh", "shell", "console"):
        if block.page != page:
            continue
        for line, document in commands_of(block.text):
            copied = re.match(r"exo-fast recipes copy (\w+)$", line)
            if copied:  # a later line runs the copy
                shutil.copy(ROOT / "recipes" / f"{copied[1]}.yaml", tmp_path)
            try:
                check_command(line, document, variables, monkeypatch)
            except (Exception, SystemExit, pytest.fail.Exception) as error:
                wrong.append(f"{block}: {line}\n    {type(error).__name__}: {error} {capsys.readouterr().err}")
    assert not wrong, "\n".join(wrong)


def test_commands_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(page_directory(ROOT / "README.md", tmp_path))
    for line in (
        "exo-fast align --config recipes/align.yaml --learning_rat 1",
        "exo-fast alignn --config recipes/align.yaml",
        "exo-fast memory --modell x",
        "torchrun --nproc-per-node 2 -m exo_fast.training.cli align --config nowhere.yaml",
        "make coffee",
        "pytest -m tpu",
        "pip install 'exo_fast[everything]'",
        "python -m exo_fast.benchmarks.nothing",
        "python -m exo_fast.benchmarks.reliability.faults --no_such_option",
        "exo_slow align",
    ):
        with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
            check_command(line, "", {}, monkeypatch)
    check_command("exo-fast align --config recipes/align.yaml --learning_rate 1e-6", "", {}, monkeypatch)


# ---- recipes and data ----


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_recipes_are_accepted(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exo_fast.training.cli.command import STAGES
    from exo_fast.training.pipeline import check, process
    from exo_fast.training.pipeline.recipe import read_recipe

    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block.text, encoding="utf-8")
    if re.search(r"^stages:", block.text, flags=re.M):
        planned = read_recipe(recipe, STAGES)
        stages = [{"name": stage.name, "stage": stage.stage, "options": stage.options} for stage in planned.stages]
        assert stages
        assert check.check(process.CLI_MODULE, stages, planned.defaults)["error"] is None
        return
    named = re.match(r"# exo-fast ([\w-]+) --config", block.text)
    assert named, f"{block}: a recipe of one stage begins with its command: # exo-fast STAGE --config FILE"
    parse_stage([named[1], "--config", str(recipe)], monkeypatch)


def data_blocks() -> list[Block]:
    """JSON rows: blocks of it, and here-documents of shell blocks that hold it."""
    found = [block for block in of("json", "jsonl")]
    for block in of("bash"):
        for line, document in commands_of(block.text):
            if ".jsonl" in line and document:
                found.append(Block(block.page, block.line, "jsonl", document, None))
    return found


@pytest.mark.parametrize("block", data_blocks(), ids=str)
def test_data_is_read(block: Block, tmp_path: Path) -> None:
    from exo_fast.data import forms
    from exo_fast.training.data import examples
    from exo_fast.training.data.sources import find_source

    if block.language == "json":
        value = json.loads(block.text)
        rows = value if isinstance(value, list) else [value]
    else:
        rows = [json.loads(line) for line in block.text.splitlines()]
    rows = [row for row in rows if isinstance(row, dict)]
    names = set().union(*map(forms.standard, rows))  # what other tools call them too
    if not names & {"prompt", "messages", "text", "chosen"}:
        return  # JSON that is no data, such as what a command prints
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, tokenizer = find_source(file, "train"), conversational()
    if "rewards" in names or "rejected" in names:
        loaded = examples.load_examples(source, loss_type="exo-pref", num_contrastive=None, tokenizer=tokenizer)
        assert all(len(example.completions) >= 2 for example in loaded)
    elif "label" in names:
        loaded = examples.load_texts(source, tokenizer=tokenizer)
    elif names & {"chosen", "completion", "messages"} or names == {"text"}:
        loaded = examples.load_sft(source, tokenizer=tokenizer)
    elif "completions" in names:
        loaded = examples.load_samples(source, tokenizer=tokenizer)
    else:
        loaded = examples.load_prompts(source, tokenizer=tokenizer)
    assert len(loaded) == len(rows)


def conversational() -> Any:
    """A tokenizer with a chat template; it need not know any word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    made.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return made


def test_quick_start_aligns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The page's own data and its own command, on a tiny model in place of the reader's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from exo_fast.training.cli.command import main

    monkeypatch.chdir(tmp_path)
    page = DOCS / "quick-start.md"
    commands = [pair for block in of("bash") if block.page == page for pair in commands_of(block.text)]
    for line, document in commands:
        if line.startswith(MAKES_FILES):
            check_command(line, document, {}, monkeypatch)
    words = re.findall(r" ?\w+", (tmp_path / "data" / "train.jsonl").read_text())
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", " ", *sorted({w.strip() for w in words})])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained("models/base")
    tokenizer.save_pretrained("models/base")
    (command,) = [line for line, _ in commands if line.startswith("exo-fast align")]
    extra = ["--use_cpu", "--reference_cache_dir", str(tmp_path / "cache"), "--report_to", "none", "--disable_tqdm"]
    assert main([*shlex.split(command)[1:], *extra]) == 0, capfd.readouterr().err
    summary = json.loads(Path("runs/first/summary.json").read_text())
    assert summary["steps"] == 1
    assert LlamaForCausalLM.from_pretrained("runs/first").config.vocab_size == len(tokenizer)


# ---- pages ----


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    left_out = [f"{block}: {block.not_run}" for block in BLOCKS if block.not_run]
    assert len(left_out) <= MOST_NOT_RUN, "\n".join(left_out)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_languages_are_known_and_nothing_is_left_to_write(page: Path) -> None:
    known = {
        "python",
        "bash",
        "sh",
        "shell",
        "console",
        "yaml",
        "json",
        "jsonl",
        "text",
        "bibtex",
        "toml",
        "diff",
        "html",
    }
    for block in blocks_of(page):
        assert block.language in known, f"{block}: name the block's language; `text` for output"
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\bTODO\b|\bTBD\b|\bFIXME\b|\bXXX\b|lorem ipsum", text)


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^(\s*)(```+).*?^\1\2\s*$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and hosting sites make them."""
    from markdown.extensions.toc import slugify

    found: set[str] = set()
    text = re.sub(r"^(\s*)(```+).*?^\1\2\s*$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for title in re.findall(r"^#+ (.*?)(?: \{[^}]*\})?$", text, flags=re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "").replace("*", "")
        slug = slugify(plain, "-")
        found.add(slug if slug not in found else f"{slug}_1")
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_are_there(page: Path) -> None:
    pytest.importorskip("markdown", reason="markdown is not installed: pip install 'exo_fast[docs]'")
    wrong = []
    for picture, target in re.findall(r"(!?)\[(?:[^][]|\[[^][]*\])*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and not picture and anchor not in anchors(file):
            wrong.append(f"{target}: no such heading")
    assert not wrong, "\n".join(wrong)


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from leaves(value)

    listed = list(leaves(site["nav"]))
    assert len(listed) == len(set(listed))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert there - set(listed) == set()
    outside = {page for page in ("contributing.md", "changelog.md", "examples.md") if page in listed}  # docs/hooks.py
    assert set(listed) - there == outside
    assert site["theme"]["font"] is False  # nothing is loaded from elsewhere


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'exo_fast[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("index.html"))
    assert len(pages) > 20
    elsewhere = re.compile(r"<(?:script|img|iframe|link rel=.stylesheet.)[^>]*(?:src|href)=.https?:")
    assert [page for page in pages if elsewhere.search(page.read_text())] == []
    reviews = (tmp_path / "reviews" / "index.html").read_text()
    assert "<code>make reviews</code>" in reviews
    assert 'recipes/reviews.yaml"' not in reviews  # a link to a file that is no page


def test_pictures_are_used_and_small() -> None:
    used = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (DOCS / "images").rglob("*.*"):
        assert picture.stat().st_size < 250_000, picture
        assert picture.name in used, f"{picture} is on no page"


def test_numbers_of_the_concepts_are_those_of_its_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    page = " ".join((DOCS / "concepts.md").read_text().split())
    fits = pictures.best_fits()
    for loss_type, name in (("exo-rw", "EXO"), ("dpo-rw", "DPO")):
        fit = fits[loss_type]
        assert f"−{abs(fit['reward']):.1f} for {name}" in page
    assert f"leaves {fits['exo-rw']['valley']:.1%} of its mass" in page
    assert f"{fits['dpo-rw']['valley']:.0%} there, where the target has {fits['target']['valley']:.0%}" in page
    peaks = [max(sum(parts.values()) for _, _, parts in phases) for phases in pictures.schedules().values()]
    assert peaks[0] > 5 * peaks[1] == 5 * peaks[2]
    # Fewer sequences than in the picture: only the size counts.
    errors = pictures.rounding_errors(sequences=2)
    assert 0.1 < errors["logits in bf16"][4096] < 3
    assert errors["logits in float32"][4096] < 1e-3
    assert pictures.seen(pictures.pack(pictures.example_groups()), 0).any()


def test_figures_of_the_home_page_are_those_of_the_readme() -> None:
    """The table of steps is on both pages; another test holds the README's to the results."""
    rows = [line for line in (DOCS / "index.md").read_text().splitlines() if re.match(r"\|.*\d\.\d", line)]
    readme = (ROOT / "README.md").read_text()
    assert len(rows) == 5
    for row in rows:
        numbers = row.split("|")[2:]
        assert "|".join(numbers) in readme, row
