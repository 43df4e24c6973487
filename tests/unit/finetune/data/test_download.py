"""Raw files are found in a folder by their names, or come from the hub; what is missing is said."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from koala_local.finetune.data.download import DownloadError, RawFilesMissing, fetch, find_raw, missing_files
from koala_local.finetune.data.sources import OWN, SOURCES


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return [folder / name for name in names]


# -- in a folder


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("hc3", ["all.jsonl"]),
        ("hc3", ["all.jsonl.xz"]),
        ("hc3", ["all.parquet"]),
        ("alpaca", ["alpaca_data.json.gz"]),
        ("alpaca", ["default/train/0000.parquet"]),
        ("oig", ["unified_poetry_2_song.jsonl", "unified_basic.jsonl.gz"]),
        ("hh", ["harmless-base/train.jsonl.gz", "harmless-base/test.jsonl", "helpful-base/train.jsonl.xz"]),
        ("sharegpt", ["sharegpt/a.json", "sharegpt/b/c.jsonl.gz", "sharegpt/d.parquet"]),
        ("hh", ["hh/harmless-base/train.jsonl.gz", "hh/helpful-base/train.jsonl.gz"]),
        ("summarization", ["summarization/any.jsonl"]),
        ("summarization", ["comparisons/train/0000.parquet"]),
        ("sharegpt", ["ShareGPT_V3_unfiltered_cleaned_split.json", "sharegpt/more.json"]),
        ("own", ["own/a.jsonl"]),
    ],
)
def test_files_are_found_by_their_names_or_in_the_folder_of_their_source(
    tmp_path: Path, key: str, names: list[str]
) -> None:
    expected = touch(tmp_path, *names)
    touch(tmp_path, "other.jsonl", "train.txt", f"{key}/README.md", f"{key}/.hidden.json", "elsewhere/all.jsonl")
    assert find_raw({**SOURCES, "own": OWN}[key], tmp_path) == expected


def test_two_sources_with_one_name_do_not_mix(tmp_path: Path) -> None:
    touch(tmp_path, "default/train/0000.parquet", "train.jsonl.gz", "0000.parquet")
    with pytest.raises(RawFilesMissing):
        find_raw(SOURCES["hh"], tmp_path)
    with pytest.raises(RawFilesMissing):
        find_raw(SOURCES["summarization"], tmp_path)


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("hc3", ["all.jsonl", "all.jsonl.gz"]),
        ("hc3", ["all.jsonl", "hc3/all.jsonl"]),
        ("hc3", ["hc3/all.jsonl", "hc3/all.parquet"]),
        ("alpaca", ["alpaca_data.json.gz", "alpaca_data.json.xz"]),
        ("hh", ["hh/harmless-base/train.jsonl", "harmless-base/train.jsonl.gz"]),
    ],
)
def test_a_file_that_is_there_twice_is_refused(tmp_path: Path, key: str, names: list[str]) -> None:
    paths = touch(tmp_path, *names)
    with pytest.raises(RawFilesMissing, match="have the name of one file") as caught:
        find_raw(SOURCES[key], tmp_path)
    assert all(str(path) in caught.value.message for path in paths)


@pytest.mark.parametrize("key", [key for key in SOURCES if key != "identity"])
def test_nothing_found_says_what_to_put_where(tmp_path: Path, key: str) -> None:
    (tmp_path / key).mkdir()
    with pytest.raises(RawFilesMissing, match="holds no raw files") as caught:
        find_raw(SOURCES[key], tmp_path)
    assert SOURCES[key].title in caught.value.message and str(tmp_path / key) in caught.value.hint
    with pytest.raises(RawFilesMissing, match="is no folder"):
        find_raw(SOURCES[key], tmp_path / "none")


OIG_FILES = [
    "unified_grade_school_math_instructions.jsonl",
    "unified_poetry_2_song.jsonl.xz",
    "unified_plot_screenplay_books_dialog.parquet",
    "unified_basic.jsonl.gz",
]


@pytest.mark.parametrize(
    ("key", "names", "missing"),
    [
        ("oig", OIG_FILES, []),
        ("oig", [f"oig/{name}" for name in OIG_FILES], []),
        ("oig", ["unified_basic.jsonl", "oig/more.jsonl"], list(SOURCES["oig"].files[:3])),
        ("oig", ["oig/mine.jsonl"], []),  # chosen by somebody
        ("hh", ["hh/harmless-base/train.jsonl.gz", "helpful-base/test.jsonl"],
         [name for name in SOURCES["hh"].files if name not in ("harmless-base/train.jsonl.gz",
                                                               "helpful-base/test.jsonl.gz")]),
        ("alpaca", ["default/train/0000.parquet"], []),
        ("summarization", ["comparisons/train/0000.parquet"], []),
        ("identity", [], []),
    ],
)  # fmt: skip
def test_published_files_that_are_not_there_are_told(
    tmp_path: Path, key: str, names: list[str], missing: list[str]
) -> None:
    touch(tmp_path, *names)
    assert missing_files(SOURCES[key], find_raw(SOURCES[key], tmp_path)) == missing


def test_the_identity_data_comes_with_the_program(tmp_path: Path) -> None:
    (path,) = find_raw(SOURCES["identity"], tmp_path)
    assert path.is_file() and [path] == fetch(SOURCES["identity"])


# -- from the hub


@dataclass
class Hub:
    """A stand-in for the hub: what it holds by path, and which error it gives in place of all else."""

    files: dict[str, bytes] = field(default_factory=dict)
    error: tuple[int, str] = (404, "EntryNotFound")
    fetched: list[str] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            data = state.files.get(self.path)
            if data is None:
                status, code = state.error
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                state.fetched.append(self.path)
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


HC3 = "/datasets/Hello-SimpleAI/HC3/resolve/main/all.jsonl"


def test_a_file_is_fetched_once_with_its_progress(tmp_path: Path, hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.files[HC3] = b'{"question": 1}\n' * 1000
    seen: list[tuple[str, int, int]] = []
    (path,) = fetch(SOURCES["hc3"], tmp_path, lambda *step: seen.append(step))
    assert path.read_bytes() == hub.files[HC3] and path.is_relative_to(tmp_path) and path.name == "all.jsonl"
    assert seen[-1] == ("all.jsonl", 16_000, 16_000)
    assert fetch(SOURCES["hc3"], tmp_path) == [path] and hub.fetched == [HC3]
    assert capfd.readouterr() == ("", "")


def test_the_hubs_parquet_is_taken_where_the_file_is_not_there(tmp_path: Path, hub: Hub) -> None:
    name = "/datasets/tatsu-lab/alpaca/resolve/refs%2Fconvert%2Fparquet/default/train/0000.parquet"
    hub.files[name] = b"PAR1"
    (path,) = fetch(SOURCES["alpaca"], tmp_path)
    assert path.read_bytes() == b"PAR1" and hub.fetched == [name]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((404, "EntryNotFound"), "has no all.jsonl"),
        ((404, "RepoNotFound"), "has no dataset Hello-SimpleAI/HC3"),
        ((401, "RepoNotFound"), "has no dataset Hello-SimpleAI/HC3"),
        ((403, "GatedRepo"), "log in and accept its terms"),
        ((418, ""), "cannot be fetched"),
    ],
)
def test_what_the_hub_refuses_is_said(tmp_path: Path, hub: Hub, error: tuple[int, str], message: str) -> None:
    hub.error = error
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(SOURCES["hc3"], tmp_path)
    assert "--raw" in caught.value.hint and "\n" not in caught.value.message


def test_without_a_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # it tries six times
    with pytest.raises(DownloadError, match="the hub is not reached") as caught:
        fetch(SOURCES["hc3"], tmp_path)
    assert "network" in caught.value.hint and "--raw" in caught.value.hint


def test_a_source_that_is_nowhere_at_the_hub() -> None:
    with pytest.raises(DownloadError, match="is not at the hub"):
        fetch(OWN)
