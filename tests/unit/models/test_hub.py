"""Downloads from a hub on this machine, with everything that can go wrong."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, scan_cache_dir

from koala_local.errors import KoalaError, ModelFileError
from koala_local.models import cache, hub, transfer
from koala_local.models.pull import Offer, bring, look, remove
from koala_local.models.reference import HubReference
from tests.hub_server import TOKEN, Hub, Repo, running

NAME = "owner/koala-GGUF"
FILE = "koala.Q4_K_M.gguf"
SIZE = 300_000
CONTENT = random.Random(1).randbytes(SIZE)
UNDER_WAY = transfer.WORKERS * (64 << 10)  # bytes: a part for each connection
MORE = {"koala.Q8_0.gguf": CONTENT * 2, "README.md": b"a card", "other.bin": b"a pickle"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository; parts are small, and nobody waits between tries."""
    with running(Hub({NAME: Repo({FILE: CONTENT, **MORE})})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transfer, "PART", UNDER_WAY // transfer.WORKERS)
        monkeypatch.setattr(transfer, "_PAUSE_S", 0.01)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def offer(text: str = f"{NAME}:Q4_K_M") -> Offer:
    name, _, choice = text.partition(":")
    choice, _, revision = choice.partition("@")
    return look(HubReference(name, choice or None, revision or None), lambda size: None)


def pull(text: str = f"{NAME}:Q4_K_M") -> Path:
    return bring(offer(text), lambda done, total, what: None)


def refused(text: str = f"{NAME}:Q4_K_M") -> KoalaError:
    with pytest.raises(KoalaError) as caught:
        pull(text)
    assert caught.value.hint
    return caught.value


def stop_midway(server: Hub, *, behind: int = 0, delay: float = 0.01) -> None:
    """A download that its user stops once more than `behind` bytes have come, from a server that waits `delay` seconds
    before each piece."""
    server.delay = delay

    def stop(done: int, total: int, what: str) -> None:
        if done > behind:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bring(offer(), stop)


def left_over() -> list[str]:
    return sorted(path.name for path in cache.folder().rglob("*") if ".koala." in path.name)


def test_a_file_comes_into_the_cache_that_all_tools_share(server: Hub) -> None:
    path = pull()
    assert path.read_bytes() == CONTENT
    assert huggingface_hub.hf_hub_download(NAME, FILE, local_files_only=True, cache_dir=cache.folder()) == str(path)
    (repository,) = scan_cache_dir(cache.folder()).repos
    assert (repository.repo_id, repository.size_on_disk, repository.nb_files) == (NAME, SIZE, 1)
    assert not scan_cache_dir(cache.folder()).warnings
    assert cache.find(HubReference(NAME)) == path
    assert left_over() == []
    assert server.served == SIZE


def test_parts_come_side_by_side(server: Hub) -> None:
    server.delay = 0.005
    pull()
    assert server.open_most > 1


def test_what_another_tool_downloaded_is_found_and_not_downloaded_again(server: Hub) -> None:
    theirs = huggingface_hub.hf_hub_download(NAME, FILE, endpoint=server.endpoint, cache_dir=cache.folder())
    before = server.served
    assert str(cache.find(HubReference(NAME, "Q4_K_M"))) == theirs
    assert str(pull()) == theirs
    assert server.served == before


def test_progress_ends_with_everything(server: Hub) -> None:
    seen: list[tuple[int, int, str]] = []
    bring(offer(), lambda done, total, what: seen.append((done, total, what)))
    assert seen[-1] == (SIZE, SIZE, f"checking {FILE}")
    assert all(done <= total == SIZE for done, total, _ in seen)


def test_the_missing_bytes_are_known_before(server: Hub) -> None:
    assert offer().missing == SIZE
    pull()
    assert offer().missing == 0


def test_cut_connections_go_on_where_they_ended(server: Hub) -> None:
    server.cut_after = 20_000
    assert pull().read_bytes() == CONTENT
    assert server.served == SIZE
    assert sum("GET /cdn" in request for request in server.requests) >= SIZE // 20_000


def test_a_connection_that_brings_nothing_is_given_up_and_taken_up_later(server: Hub) -> None:
    server.cut_after = 0
    error = refused()
    assert FILE in error.message and "goes on from here" in error.hint
    server.cut_after = None
    assert pull().read_bytes() == CONTENT


def test_servers_that_are_busy_for_a_moment(server: Hub) -> None:
    server.failures = 3
    assert pull().read_bytes() == CONTENT


def test_a_server_without_ranges(server: Hub) -> None:
    server.ranges = False
    assert pull().read_bytes() == CONTENT


def test_a_stopped_download_goes_on_from_what_is_there(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "WORKERS", 2)
    stop_midway(server, behind=SIZE // 3)
    assert any(name.endswith(".koala.incomplete") for name in left_over())
    assert cache.find(HubReference(NAME)) is None
    kept = SIZE - offer().missing
    assert kept > SIZE // 3
    time.sleep(0.1)  # what the server had sent already is counted, too
    server.served, server.delay = 0, 0.0
    assert pull().read_bytes() == CONTENT
    assert server.served == SIZE - kept
    assert left_over() == []


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b'{"size": 300000, "part": 0, "done": []}', b'{"size": 1}'])
def test_a_damaged_note_of_what_is_there_costs_a_download(server: Hub, state: bytes) -> None:
    blob = cache.repository_folder(NAME) / "blobs" / hashlib.sha256(CONTENT).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.koala.incomplete").write_bytes(b"x" * SIZE)
    blob.with_name(f"{blob.name}.koala.state").write_bytes(state)
    assert pull().read_bytes() == CONTENT


def test_a_wrong_note_of_what_is_there_is_found_by_the_hash(server: Hub) -> None:
    blob = cache.repository_folder(NAME) / "blobs" / hashlib.sha256(CONTENT).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.koala.incomplete").write_bytes(b"x" * SIZE)
    note = {"size": SIZE, "part": SIZE, "done": [SIZE]}
    blob.with_name(f"{blob.name}.koala.state").write_text(json.dumps(note))
    assert "hash" in refused().message
    assert pull().read_bytes() == CONTENT


def test_other_bytes_than_promised_are_removed(server: Hub) -> None:
    server.contents[FILE] = bytes(SIZE)
    error = refused()
    assert "hash" in error.message
    assert left_over() == []
    assert cache.find(HubReference(NAME)) is None
    assert not list((cache.repository_folder(NAME) / "blobs").iterdir())


def test_other_bytes_in_a_small_file_are_found_too(server: Hub) -> None:
    name = "owner/koala-GPTQ"
    server.repos[name] = Repo({"config.json": b"{}", "quantize_config.json": b"{}", "model.safetensors": CONTENT})
    server.contents["config.json"] = b"[]"
    assert "config.json" in refused(name).message
    assert cache.find(HubReference(name)) is None


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 10])
def test_a_server_that_lies_about_the_size(server: Hub, size: int) -> None:
    server.sizes[FILE] = size
    assert "changed" in refused().message
    server.sizes.clear()
    server.totals[FILE] = size
    assert str(size) in refused().message
    server.totals.clear()
    server.repos[NAME].listing[FILE] = {"lfs": {"sha256": "a" * 64, "size": size, "pointerSize": 130}}
    assert refused()
    assert server.served <= 3 * UNDER_WAY
    assert cache.find(HubReference(NAME)) is None


def test_a_server_that_sends_more_than_it_was_asked_for(server: Hub) -> None:
    server.extra = b"and more"
    assert "more" in refused().message


def test_a_server_that_sends_another_part(server: Hub) -> None:
    server.shift = 7
    assert "another part" in refused().message
    assert cache.find(HubReference(NAME)) is None


def test_content_that_is_shorter_than_promised(server: Hub) -> None:
    server.contents[FILE] = CONTENT[:1000]
    assert refused()
    assert cache.find(HubReference(NAME)) is None


def test_a_file_that_changes_on_the_hub(server: Hub) -> None:
    server.etags[FILE] = "b" * 64
    assert "changed" in refused().message
    assert server.served <= UNDER_WAY
    assert left_over() == []


def test_a_new_commit_replaces_main_and_the_old_one_stays_usable(server: Hub) -> None:
    old = pull()
    repo = server.repos[NAME]
    server.repos[NAME] = Repo({**repo.files, FILE: CONTENT[::-1]}, commit="c" * 40)
    assert cache.find(HubReference(NAME, "Q4_K_M")) == old
    new = pull()
    assert new.read_bytes() == CONTENT[::-1]
    assert cache.find(HubReference(NAME, "Q4_K_M")) == new
    assert cache.find(HubReference(NAME, "Q4_K_M", "a" * 40)) == old


def test_a_revision_is_pinned(server: Hub) -> None:
    server.repos[NAME].branches = ("main", "v1", "refs/pr/1")
    for revision in ("v1", "a" * 40, "refs/pr/1"):
        path = pull(f"{NAME}:Q4_K_M@{revision}")
        assert cache.find(HubReference(NAME, None, revision)) == path
    assert "no revision 'v2'" in refused(f"{NAME}:Q4_K_M@v2").message


def test_the_same_content_in_two_files_is_downloaded_once(server: Hub) -> None:
    server.repos[NAME].files["twin.Q4_K_S.gguf"] = CONTENT
    pull()
    assert offer(f"{NAME}:Q4_K_S").missing == 0
    pull(f"{NAME}:Q4_K_S")
    assert server.served == SIZE


def test_a_split_model_comes_as_a_whole(server: Hub) -> None:
    parts = {f"big.Q6_K-0000{number}-of-00003.gguf": CONTENT[number:] for number in (1, 2, 3)}
    server.repos[NAME].files |= parts
    first = pull(f"{NAME}:Q6_K")
    assert first.name == "big.Q6_K-00001-of-00003.gguf"
    assert {path.name: path.read_bytes() for path in first.parent.iterdir()} == parts
    (first.parent / "big.Q6_K-00002-of-00003.gguf").unlink()
    assert cache.find(HubReference(NAME, "Q6_K")) is None


def test_a_gptq_folder_comes_without_code_and_pickles(server: Hub) -> None:
    name = "owner/koala-GPTQ"
    wanted = {"config.json": b"{}", "quantize_config.json": b'{"bits": 4}', "model.safetensors": CONTENT}
    wanted["tokenizer.model"] = b"pieces"
    server.repos[name] = Repo({**wanted, "modeling_koala.py": b"import os", "pytorch_model.bin": b"pickle"})
    folder = pull(name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    assert cache.find(HubReference(name)) == folder
    assert cache.find(HubReference(name, "gptq")) == folder


def test_a_checkpoint_comes_with_its_weights_only(server: Hub) -> None:
    name = "owner/koala-HF"
    index = json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}).encode()
    wanted = {"config.json": b"{}", "pytorch_model-00001-of-00001.bin": CONTENT, "pytorch_model.bin.index.json": index}
    server.repos[name] = Repo({**wanted, "training_args.bin": b"pickle", "modeling_koala.py": b"import os"})
    assert offer(name).chosen.type == "PYTORCH"
    folder = pull(name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    assert cache.find(HubReference(name, "pytorch")) == folder
    (folder / "pytorch_model-00001-of-00001.bin").unlink()
    assert cache.find(HubReference(name)) is None


def test_the_hub_says_that_a_folder_is_quantized(server: Hub) -> None:
    files = {"config.json": b"{}", "model.safetensors": CONTENT}
    for config, expected in [
        ({"quantization_config": {"quant_method": "gptq"}}, "GPTQ"),
        ({"quantization_config": 7}, "SAFETENSORS"),
        ([], "SAFETENSORS"),
    ]:
        server.repos["owner/new"] = Repo(files, config=config)
        assert offer("owner/new").chosen.type == expected
    server.repos["owner/new"] = Repo(files, config={"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ModelFileError, match="quantized by 'awq'"):
        offer("owner/new")


def test_the_hub_is_asked_once_for_the_listing_and_once_for_each_part(server: Hub) -> None:
    pull()
    hub_alone = [request for request in server.requests if " /cdn/" not in request]
    parts = -(-SIZE // transfer.PART)
    assert len(hub_alone) == 1 + parts and all(request.startswith("GET ") for request in hub_alone)


def test_an_incomplete_folder_is_not_found(server: Hub) -> None:
    name = "owner/koala-GPTQ"
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, "quantize_config.json": b"{}"}
    server.repos[name] = Repo({**files, "model-1.safetensors": CONTENT, "model-2.safetensors": CONTENT[1:]})
    folder = pull(name)
    (folder / "model-2.safetensors").unlink()
    assert cache.find(HubReference(name)) is None


@pytest.mark.parametrize(
    "bad", ["../x.gguf", "/etc/x.gguf", "a\\..\\x.gguf", "a/../../x.gguf", "x\x1b[2J.gguf", "C:x.gguf"]
)
def test_hostile_names_are_refused_before_any_path_is_made(server: Hub, tmp_path: Path, bad: str) -> None:
    server.repos[NAME].files[bad] = b"GGUF"
    error = refused()
    assert "may lead out of its folder" in error.message
    assert error.message.isprintable()
    assert not cache.folder().exists()
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "entry",
    [
        {"lfs": {"sha256": "../../evil", "size": 5, "pointerSize": 1}},
        {"lfs": {"sha256": "a" * 40, "size": 5, "pointerSize": 1}},
        {"lfs": {"sha256": "a" * 64, "size": -5, "pointerSize": 1}},
        {"lfs": {"sha256": "a" * 64, "size": "5", "pointerSize": 1}},
        {"lfs": {"sha256": None, "size": 5, "pointerSize": 1}},
        {"lfs": None, "blobId": "x/y"},
        {"lfs": None, "size": None},
        {"lfs": 7},
        {"rfilename": None},
        {"rfilename": ["x.gguf"]},
    ],
)
def test_odd_entries_of_the_listing(server: Hub, entry: dict[str, Any]) -> None:
    server.repos[NAME].listing[FILE] = entry
    refused()
    assert not cache.folder().exists()


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", b"{}", b"null", b'{"id": "x"}', b'{"id": "x", "sha": "../x", "siblings": []}', b"\xff"]
)
def test_odd_answers(server: Hub, answer: bytes) -> None:
    server.answer = answer
    refused()
    assert not cache.folder().exists()


def test_a_web_page_in_place_of_an_answer_may_be_the_networks(server: Hub) -> None:
    server.answer = b"<html>Please sign in</html>"
    assert "sign-in page" in refused().hint


def test_a_gated_repository(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[NAME].gated = True
    for token in (None, "hf_of_someone_else"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        error = refused()
        assert "gated" in error.message and left_over() == []
        assert f"{server.endpoint}/{NAME}" in error.hint and "HF_TOKEN" in error.hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pull().read_bytes() == CONTENT
    assert not server.authorized_elsewhere


def test_a_missing_and_a_private_repository(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["owner/secret"] = Repo({FILE: CONTENT}, private=True)
    for name in ("owner/nothing", "owner/secret"):
        assert f"no model {name}" in refused(name).message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pull("owner/secret").read_bytes() == CONTENT


def test_a_missing_type_or_file_says_which_there_are(server: Hub) -> None:
    for choice in ("Q5_K_M", "koala.Q5_K_M.gguf", "README.md"):
        error = refused(f"{NAME}:{choice}")
        assert f"no '{choice}'" in error.message
        assert error.hint == "it has Q4_K_M, Q8_0"


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"koala-13B.ggmlv3.q4_0.bin": b"x"}, "ggmlv3"),
        ({"config.json": b"{}", "koala-13b-4bit-128g.pt": b"x"}, "pickles"),
        ({"big-00001-of-00002.gguf": b"x"}, "no whole model"),
        ({"README.md": b"x"}, "no model"),
        ({}, "no model"),
    ],
)
def test_repositories_without_a_model_say_why(server: Hub, files: dict[str, bytes], what: str) -> None:
    server.repos["owner/other"] = Repo(files)
    assert what in refused("owner/other").message


def test_old_and_pickled_files_are_refused_by_name(server: Hub) -> None:
    server.repos[NAME].files["koala.ggmlv3.q4_0.bin"] = b"x"
    assert "ggmlv3" in refused(f"{NAME}:koala.ggmlv3.q4_0.bin").message
    assert "pickle" in refused(f"{NAME}:other.bin").message


def test_no_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pull()
    server.port = 9  # nobody listens there
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(hub.UnreachableError) as caught:
        offer()
    assert "cannot be reached" in caught.value.message and "koala list" in caught.value.hint
    assert cache.find(HubReference(NAME)) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.UnreachableError, match="HF_HUB_OFFLINE"):
        offer()


def test_no_space(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=SIZE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = refused()
    assert "only 0.3 MB are free" in error.message
    assert server.served == 0


def test_two_at_once_download_it_once(server: Hub) -> None:
    server.delay = 0.002
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pull())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert server.served == SIZE


def test_remove_one_type_then_the_last(server: Hub) -> None:
    small, large = pull(), pull(f"{NAME}:Q8_0")
    assert remove(HubReference(NAME, "Q8_0")) == 2 * SIZE
    assert small.exists() and not large.exists()
    with pytest.raises(ModelFileError, match="not in the cache"):
        remove(HubReference(NAME, "Q8_0"))
    assert remove(HubReference(NAME)) == SIZE
    assert not cache.repository_folder(NAME).exists()
    assert cache.repositories() == []


def test_remove_leaves_another_repository_of_the_same_commit_alone(server: Hub) -> None:
    server.repos["owner/fork-GGUF"] = Repo({FILE: CONTENT})
    mine, fork = pull(), pull("owner/fork-GGUF:Q4_K_M")
    assert mine.parent.name == fork.parent.name
    assert remove(HubReference("owner/fork-GGUF")) == SIZE
    assert mine.read_bytes() == CONTENT
    assert cache.repositories() == [NAME]


def test_a_disk_that_fills_up_keeps_what_has_come(server: Hub) -> None:
    stop_midway(server, delay=0.05)
    server.delay, missing = 0.0, offer().missing
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))  # what a full disk does, but for the reason
    try:
        error = refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in error.message and "make room there; the same command" in error.hint
    assert not [name for name in left_over() if name.endswith(".partial")]
    assert offer().missing <= missing < SIZE
    assert pull().read_bytes() == CONTENT


def test_whoever_waits_for_another_download_is_told(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_LOOK_S", 0.02)
    server.delay, told = 0.02, list[str]()
    first = threading.Thread(target=pull)
    first.start()
    while not server.served:
        time.sleep(0.001)
    bring(offer(), lambda done, total, what: told.append(what))
    first.join()
    assert f"waiting for another program that downloads {FILE}" in told
    assert server.served == SIZE


def test_remove_takes_what_a_stopped_download_left(server: Hub) -> None:
    stop_midway(server)
    (name,) = (name for name in left_over() if name.endswith(".state"))
    (cache.repository_folder(NAME) / "blobs" / f"{name}.partial").touch()  # killed while it noted where it was
    assert remove(HubReference(NAME)) >= 0
    assert left_over() == []
    with pytest.raises(ModelFileError):
        remove(HubReference(NAME))
