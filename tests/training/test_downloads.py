"""Downloads are checked, damaged ones are replaced, and no path in an archive is ever followed. No network."""

import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from exo_fast.training import downloads, files
from exo_fast.training.downloads import Asset
from exo_fast.training.errors import InputError


def make_wheel(folder: Path, content: str = "the real thing") -> tuple[Path, Asset]:
    """A wheel that pip accepts, and the asset that pins it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "exo_demo_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        info = "exo_demo_asset-1.0.dist-info"
        wheel.writestr("exo_demo_asset/data.txt", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: exo-demo-asset\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path, Asset("exo-demo-asset==1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 1)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_download_is_checked_and_reused(index: Path, tmp_path: Path) -> None:
    wheel, asset = make_wheel(index)
    said: list[str] = []
    path = downloads.fetch(asset, tmp_path / "cache", said.append)
    assert path.read_bytes() == wheel.read_bytes()
    wheel.unlink()  # what is cached needs no index
    assert downloads.fetch(asset, tmp_path / "cache", said.append) == path
    assert said[-1] == f"reusing {path}"
    assert [p.name for p in path.parent.iterdir()] == [asset.filename]


def test_a_damaged_file_is_deleted_and_fetched_again(index: Path, tmp_path: Path) -> None:
    wheel, asset = make_wheel(index)
    path = tmp_path / "cache" / asset.filename
    path.parent.mkdir()
    path.write_bytes(b"half a file")
    said: list[str] = []
    downloads.fetch(asset, path.parent, said.append)
    assert path.read_bytes() == wheel.read_bytes()
    assert "damaged" in said[0]


def test_pip_refuses_another_file_under_the_pinned_name(index: Path, tmp_path: Path) -> None:
    _, asset = make_wheel(tmp_path / "elsewhere")
    make_wheel(index, "something else")
    with pytest.raises(InputError, match=r"offers another file for exo-demo-asset==1\.0"):
        downloads.fetch(asset, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_our_own_check_catches_what_pip_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, asset = make_wheel(tmp_path / "elsewhere")

    def careless_pip(asset: Asset, folder: Path, *, by_hand: Path) -> None:
        (folder / asset.filename).write_bytes(b"something else")

    monkeypatch.setattr(downloads, "_pip_download", careless_pip)
    with pytest.raises(InputError, match=f"{asset.sha256} is needed"):
        downloads.fetch(asset, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_offline_says_what_to_do(index: Path, tmp_path: Path) -> None:
    _, asset = make_wheel(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="Is this machine offline") as caught:
        downloads.fetch(asset, tmp_path / "cache")
    assert str(tmp_path / "cache" / asset.filename) in str(caught.value)  # where to put the file by hand
    assert not list((tmp_path / "cache").iterdir())


def test_an_interpreter_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, asset = make_wheel(tmp_path / "elsewhere")
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(InputError, match=r"has no pip; run .*ensurepip"):
        downloads.fetch(asset, tmp_path / "cache")


def make_tar(path: Path, **members: bytes | None) -> Path:
    """A tar archive; a member of None becomes a symbolic link to /etc/passwd."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_members_are_read_by_their_exact_name(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", **{"pkg__data.txt": b"right", "..__data.txt": b"wrong"})
    assert downloads.read_member(archive, "pkg/data.txt") == b"right"
    assert not (tmp_path.parent / "data.txt").exists()
    with pytest.raises(InputError, match=r"has no file pkg/other\.txt"):
        downloads.read_member(archive, "pkg/other.txt")


def test_a_link_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", **{"pkg__data.txt": None})
    with pytest.raises(InputError, match="is a link"):
        downloads.read_member(archive, "pkg/data.txt")


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(InputError, match=r"a\.tar\.gz: not a readable tar archive"):
        downloads.read_member(tmp_path / "a.tar.gz", "pkg/data.txt")


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil", "a/b", "..", "", "a\\b"])
def test_only_plain_names_are_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="a plain file name is needed"):
        files.write_file(tmp_path / "folder", name, b"x")
    assert not list(tmp_path.rglob("*evil*"))


def test_reviews_and_oracle_come_out_of_the_source_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = "1\t2.5\tThe film is ''good''.\r\n2\t-1.0\tA bad film.\r\n"
    ratings = "hutto_ICWSM_2014__movieReviewSnippets_GroundTruth.txt"
    inner = make_tar(tmp_path / "inner.tar.gz", **{ratings: table.encode()})
    scorer = (
        "class SentimentIntensityAnalyzer:\n"
        "    def polarity_scores(self, text):\n"
        "        return {'compound': text.count('good') - text.count('bad')}\n"
    )
    root = "vaderSentiment-3.3.2__"
    sdist = make_tar(
        tmp_path / "sdist.tar.gz",
        **{
            f"{root}additional_resources__hutto_ICWSM_2014.tar.gz": inner.read_bytes(),
            f"{root}vaderSentiment__vaderSentiment.py": scorer.encode(),
            f"{root}vaderSentiment__vader_lexicon.txt": b"",
            f"{root}vaderSentiment__emoji_utf8_lexicon.txt": b"",
        },
    )
    monkeypatch.setattr(downloads, "fetch", lambda *args: sdist)
    assert downloads.get_reviews(tmp_path) == [
        downloads.Snippet('The film is "good".', 2.5),
        downloads.Snippet("A bad film.", -1.0),
    ]
    oracle = downloads.get_oracle(tmp_path)
    assert (oracle("good good"), oracle("bad")) == (2.0, -1.0)


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXO_FAST_CACHE", "/somewhere")
    assert downloads.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("EXO_FAST_CACHE")
    assert downloads.cache_dir() == Path.home() / ".cache" / "exo_fast"
