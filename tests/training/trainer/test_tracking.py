"""TensorBoard and Weights & Biases get the metrics under TRL's names; publishing sends the model and nothing else."""

import hashlib
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from exo_fast.training.arguments import parse_config
from exo_fast.training.errors import InputError, RunError
from exo_fast.training.stages.align import AlignConfig, align

Settings = Callable[..., dict[str, Any]]
METRICS = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "group_accuracy", "kl", "entropy")
SHORT = {"num_train_epochs": 1, "engine": "torch"}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's tokens, caches or settings."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


# Where logs go


def test_tensorboard_has_the_metrics_of_trl(settings: Settings) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard"
    )
    options = settings(**SHORT, report_to="tensorboard")
    align(AlignConfig(**options))
    (folder,) = {path.parent for path in Path(options["output_dir"]).rglob("events.out.tfevents*")}
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert {f"{split}/{name}" for split in ("train", "eval") for name in METRICS} <= set(events.Tags()["scalars"])
    history = json.loads(Path(options["output_dir"], "trainer_state.json").read_text())["log_history"]
    logged = [entry["rewards/margins"] for entry in history if "rewards/margins" in entry]
    assert [event.value for event in events.Scalars("train/rewards/margins")] == pytest.approx(logged)


def test_wandb_writes_an_offline_run(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    try:
        summary = align(AlignConfig(**settings(**SHORT, report_to=["tensorboard", "wandb"], run_name="a name")))
        found = dict(wandb.run.summary)
        assert wandb.run.name == "a name"
        assert wandb.run.config["loss_type"] == "exo-rw"
    finally:
        wandb.finish()
    assert {f"{split}/{name}" for split in ("train", "eval") for name in METRICS} <= found.keys()
    assert found["eval/kl"] == pytest.approx(summary["metrics"]["eval"]["last"]["eval_kl"])
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert run.stat().st_size > 0


REPORTS = {
    "two": (["tensorboard", "wandb"], ["tensorboard", "wandb"]),
    "with a comma": (["tensorboard,wandb"], ["tensorboard", "wandb"]),
    "none": (["none"], []),
}


@pytest.mark.parametrize(("words", "expected"), REPORTS.values(), ids=REPORTS.keys())
def test_report_to_takes_several_names(settings: Settings, words: list[str], expected: list[str]) -> None:
    if "wandb" in expected:
        pytest.importorskip("wandb", reason="pip install wandb")
    options = settings()
    needed = [f"--{name}={options[name]}" for name in ("model_name_or_path", "data", "output_dir")]
    config = parse_config(AlignConfig, [*needed, "--report_to", *words, "--run_name", "x"], prog="exo-fast align")
    assert [name for name in config.report_to if name != "kubeflow"] == expected
    assert config.run_name == "x"


def test_a_tracker_that_is_not_there_is_said_before_work_starts(settings: Settings) -> None:
    if importlib.util.find_spec("comet_ml") is None:
        with pytest.raises(InputError, match="report_to='comet_ml': needs comet-ml: pip install comet-ml"):
            AlignConfig(**settings(report_to="comet_ml"))
    with pytest.raises(InputError, match="did you mean 'tensorboard'"):
        AlignConfig(**settings(report_to=["tensorbord"]))
    assert not Path(settings()["output_dir"]).exists()


# The Hub


class FakeHub(ThreadingHTTPServer):
    """The requests of huggingface_hub to make a repository and commit files to it, kept; a refusal of commits
    while `broken`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.requests: list[tuple[str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.commits: list[tuple[str, list[str]]] = []  # (message, names)
        self.tokens: set[str | None] = set()
        self.content: dict[str, str] = {}  # sha256 of what was uploaded as a large file
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        self._note()
        self._answer({"name": "someone", "id": "1", "sha": "0" * 40, "siblings": [], "type": "user"})

    def do_PUT(self) -> None:
        self._note()
        body = self._body()
        self.server.content[self.path.rpartition("/")[2]] = hashlib.sha256(body).hexdigest()
        self._answer({})

    def do_POST(self) -> None:
        self._note()
        body = self._body()
        if self.path.endswith("/repos/create"):
            asked = json.loads(body)
            self.server.created.append(asked)
            self._answer({"url": f"{self.server.url}/someone/{asked['name']}"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            answers = [{"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")]} for f in files]
            self._answer({"files": [{**answer, "shouldIgnore": False} for answer in answers]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/store/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        elif "/commit/" in self.path and self.server.broken:
            self._answer({"error": "no space for you"}, status=403)
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            names = sorted(line["value"]["path"] for line in lines if line["key"] in ("file", "lfsFile"))
            self.server.commits.append((lines[0]["value"]["summary"], names))
            self._answer({"commitUrl": f"{self.server.url}/someone/x/commit/{'a' * 40}", "commitOid": "a" * 40})
        else:
            self._answer({})

    def _note(self) -> None:
        self.server.requests.append((self.command, self.path))
        if not self.path.startswith("/store/"):
            self.server.tokens.add(self.headers.get("Authorization"))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content: dict[str, Any], kind: str = "application/json", status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield server
        server.shutdown()
        thread.join()


MODEL = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]


def test_the_model_is_published_and_nothing_else(settings: Settings, hub: FakeHub) -> None:
    options = settings(
        save_strategy="steps", save_steps=4, push_to_hub=True, hub_model_id="someone/policy", hub_private_repo=True
    )
    summary = align(AlignConfig(**options, hub_token="hf_secret"))
    output = Path(options["output_dir"])
    assert hub.created[0] == {"name": "policy", "organization": "someone", "visibility": "private"} or (
        hub.created[0]["name"] == "policy" and hub.created[0].get("private", True)
    )
    assert hub.tokens == {"Bearer hf_secret"}
    last_message, last_names = hub.commits[-1]
    assert last_message == "align: the model after 8 steps"
    assert last_names == sorted([*MODEL, *TOKENIZER])
    assert [message for message, _ in hub.commits[:-1]] == [
        f"Training in progress, checkpoint-{step}" for step in (4, 8)
    ]
    for _, names in hub.commits[:-1]:
        assert names == sorted([*MODEL[1:], *TOKENIZER])
    digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    assert hub.content[digest] == digest
    assert summary["hub"] == {"repository": "someone/policy", "commit": "a" * 40}
    for path in ("summary.json", "report.html", "README.md", "settings.json"):
        assert "hf_secret" not in (output / path).read_text()


def test_adapters_are_published_alone_at_the_end(settings: Settings, hub: FakeHub) -> None:
    options = settings(**SHORT, lora_r=2, push_to_hub=True, hub_strategy="end", save_strategy="epoch", hub_token="x")
    align(AlignConfig(**options))
    assert len(hub.commits) == 1
    assert hub.commits[0][1] == sorted(["README.md", "adapter_config.json", "adapter_model.safetensors", *TOKENIZER])


def test_an_upload_that_failed_is_tried_again(settings: Settings, hub: FakeHub) -> None:
    options = settings(**SHORT, push_to_hub=True, hub_token="x", hub_strategy="end")
    hub.broken = True
    with pytest.raises(RunError, match=r"finished and saved in .* was not uploaded.* The same command tries again"):
        align(AlignConfig(**options))
    weights = Path(options["output_dir"], "model.safetensors")
    before = weights.stat().st_mtime_ns
    hub.broken = False
    summary = align(AlignConfig(**options))
    assert weights.stat().st_mtime_ns == before  # it was not trained again
    assert len(hub.commits) == 1
    assert summary["hub"]["repository"] == "someone/run"
    align(AlignConfig(**options))
    assert len(hub.commits) == 1
    align(AlignConfig(**options, hub_model_id="someone/else"))  # a finished run is published later
    assert len(hub.commits) == 2


BAD = {
    "no token": ({}, "no token for the Hub; run `hf auth login`"),
    "states": ({"hub_token": "x", "hub_strategy": "checkpoint"}, "would publish the optimizer's state"),
    "name": ({"hub_token": "x", "hub_model_id": "a/b/c"}, "hub_model_id='a/b/c'"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_publishing_that_cannot_work_is_refused_before_work(
    settings: Settings, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        AlignConfig(**settings(push_to_hub=True, **options))
    assert not Path(settings()["output_dir"]).exists()


def test_a_hub_that_is_not_there_ends_the_run_before_training(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of discard, where nobody listens
    with pytest.raises(InputError, match="push_to_hub=True: 'run' cannot be made or reached"):
        align(AlignConfig(**settings(push_to_hub=True, hub_token="x")))
    assert not Path(settings()["output_dir"], "settings.json").exists()
