"""Models from the hub, with a hub of our own on this machine: HF_ENDPOINT is read when a process starts, so each test starts one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from simpletuner.models.identity import digest_files
from tests.builders.single_file import write_auraflow

COMMITS = {"main": "c" * 40, "v2": "d" * 40}
STEM = "diffusion_pytorch_model"


class Hub(ThreadingHTTPServer):
    """As much of the hub as its client asks for: the list of a repository's files, and the files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.changed: dict[str, bytes] = {}
        """What revision v2 has in place of the files of main."""
        self.sent: list[str] = []
        self.status, self.error_code = 200, ""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        if self.server.status != 200:
            return self._send(self.server.status, b"", {"X-Error-Code": self.server.error_code}, with_body)
        if not path.startswith(("/api/models/maker/small/", "/maker/small/")):
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
        revision = next((name for name, commit in COMMITS.items() if f"/{name}" in path or commit in path), "main")
        if "/v9" in path:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
        files = {**self.server.files, **(self.server.changed if revision == "v2" else {})}
        if path.startswith("/api/models/maker/small/tree/"):
            tree = [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40} for name, content in files.items()]
            return self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, with_body)
        if path.startswith("/api/"):
            info = {"id": "maker/small", "sha": COMMITS[revision], "siblings": [{"rfilename": name} for name in files]}
            return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, with_body)
        name = path.split("/", 5)[5]
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMITS[revision]}, with_body)
        content = files[name]
        if with_body:
            self.server.sent.append(name)
        return self._send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMITS[revision]}, with_body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    files = {path.relative_to(tiny).as_posix(): path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    files[f"transformer/{STEM}.fp16.safetensors"] = b"half"
    files["checkpoint.safetensors"] = b"a single file that nobody should fetch"
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(code: str, home: Path, endpoint: str, **environment: str) -> str:
    """Run code on a `source` of the hub in a process of its own; its output, or the error it ended in."""
    setting = f"""
        from simpletuner.errors import SimpleTunerError
        from simpletuner.models.identity import digest_files
        from simpletuner.models.source import Source
        from simpletuner.options.models import Models

        def source(**options):
            options = {{"pretrained_model_name_or_path": "maker/small", **options}}
            return Source(Models(model_family="auraflow", **options), {{"small": "maker/small"}})

        try:
{textwrap.indent(textwrap.dedent(code), " " * 12)}
        except SimpleTunerError as error:
            print(type(error).__name__, error.message)
    """
    variables = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(setting)], capture_output=True, text=True, env=variables, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_an_assistant_is_fetched_by_its_repository_or_by_the_name_of_its_file(hub, tmp_path):
    hub.files |= {"pytorch_lora_weights.safetensors": b"usual", "other.safetensors": b"other"}
    code = """
        from simpletuner.training.assistant import fetched
        for place in ("maker/small", "maker/small/other.safetensors"):
            print(fetched(place).read_text())
        fetched("maker/small/none.safetensors")
    """

    said = ask(code, tmp_path, f"http://127.0.0.1:{hub.server_port}").splitlines()

    assert said[:2] == ["usual", "other"] and "maker/small has no none.safetensors" in said[2]


def test_only_the_files_of_a_part_are_fetched_and_the_second_time_none(hub, tiny, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    code = """
        part = source().part("transformer")
        print(*part.files(), digest_files(part.files()), part.config()["patch_size"])
    """

    first = ask(code, tmp_path, endpoint)

    weights = {name: tiny / "transformer" / name for name in ("config.json", f"{STEM}.safetensors")}
    assert sorted(hub.sent) == ["transformer/config.json", f"transformer/{STEM}.safetensors"]
    assert first == f"config.json {STEM}.safetensors {digest_files(weights)} 2"
    assert ask(code, tmp_path, endpoint) == first and len(hub.sent) == 2
    assert ask(code, tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1") == first


def test_a_variant_is_fetched_where_there_is_one_and_the_plain_file_where_not(hub, tmp_path):
    code = """
        for name in ("transformer", "vae"):
            print(source(variant="fp16").part(name).weights())
    """

    said = ask(code, tmp_path, f"http://127.0.0.1:{hub.server_port}")

    assert said.splitlines() == [f"('fp16', ['{STEM}.fp16.safetensors'])", f"(None, ['{STEM}.safetensors'])"]
    assert f"transformer/{STEM}.safetensors" not in hub.sent


def test_a_revision_is_the_one_whose_files_are_read(hub, tmp_path):
    config = json.loads(hub.files["transformer/config.json"])
    hub.changed = {"transformer/config.json": json.dumps({**config, "patch_size": 4}).encode(), f"transformer/{STEM}.safetensors": b"of v2"}
    code = """
        for revision in (None, "v2"):
            part = source(revision=revision).part("transformer")
            print(part.config()["patch_size"], part.files()["diffusion_pytorch_model.safetensors"].stat().st_size)
    """

    said = ask(code, tmp_path, f"http://127.0.0.1:{hub.server_port}")

    assert said.splitlines() == [f"2 {len(hub.files[f'transformer/{STEM}.safetensors'])}", "4 5"]
    assert ask("source(revision='v9').index", tmp_path, f"http://127.0.0.1:{hub.server_port}") == "ConfigError maker/small has no revision 'v9'"


def test_a_single_file_comes_by_its_address_and_leaves_the_weights_of_its_base_where_they_are(hub, tiny, tmp_path):
    hub.files["folder/aura flow.safetensors"] = write_auraflow(tiny, tmp_path / "aura.safetensors").read_bytes()
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    code = f"""
        chosen = source(pretrained_model_name_or_path="{endpoint}/maker/small/blob/main/folder/aura%20flow.safetensors")
        print(chosen.is_here, chosen.knows("vae"))
        print(chosen.base, *chosen.part("vae").files(), chosen.part("vae").checkpoint.path.name, chosen.knows("vae"))
    """

    said = ask(code, tmp_path / "home", endpoint)

    assert said.splitlines() == ["False False", "maker/small config.json checkpoint.safetensors aura flow.safetensors True"]
    assert sorted(hub.sent) == ["folder/aura flow.safetensors", "vae/config.json"]


def test_a_replaced_part_is_looked_for_in_its_folder_and_then_at_the_root(hub, tmp_path):
    hub.files = {name.removeprefix("vae/"): content for name, content in hub.files.items()}
    code = """
        part = source(pretrained_vae_model_name_or_path="maker/small").part("vae")
        print(*part.files(), part.config()["_class_name"])
    """

    assert ask(code, tmp_path, f"http://127.0.0.1:{hub.server_port}") == f"config.json {STEM}.safetensors AutoencoderKL"
    assert sorted(hub.sent) == ["config.json", f"{STEM}.safetensors"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("source(pretrained_model_name_or_path='maker/none').index", "ConfigError 'maker/none' is neither a folder here nor a repository on the hub"),
        ("source().part('unet').folder()", "ConfigError maker/small has no unet: there is no unet/config.json"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_our_words(hub, tmp_path, code, expected):
    assert ask(code, tmp_path, f"http://127.0.0.1:{hub.server_port}") == expected


@pytest.mark.parametrize(
    ("status", "error_code", "expected"),
    [
        (403, "GatedRepo", "ConfigError maker/small is gated: its owner wants its licence accepted"),
        (404, "RevisionNotFound", "ConfigError maker/small has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_said_in_our_words(hub, tmp_path, status, error_code, expected):
    hub.status, hub.error_code = status, error_code

    assert ask("source(revision='v9').index", tmp_path, f"http://127.0.0.1:{hub.server_port}") == expected


@pytest.mark.parametrize("is_offline", [True, False], ids=["offline and not in the cache", "refused by the hub"])
def test_files_that_do_not_come_are_no_mistake_in_the_configuration(hub, tmp_path, is_offline):
    hub.status = 403
    environment = {"HF_HUB_OFFLINE": "1"} if is_offline else {}

    said = ask("source().index", tmp_path, f"http://127.0.0.1:{hub.server_port}", **environment)

    assert said.startswith("SimpleTunerError maker/small cannot be downloaded: ")


def test_of_a_repository_that_is_all_a_t5_only_the_encoders_weights_and_the_tokenizer_are_fetched(hub, tiny, tmp_path):
    names = ("text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
    hub.files = {Path(name).name: (tiny / name).read_bytes() for name in names}
    hub.files |= {"pytorch_model.bin": b"pickle", "tf_model.h5": b"tensorflow", "README.md": b"# T5", "spiece.model": b"pieces"}
    code = """
        chosen = Source(Models(model_family="auraflow", pretrained_t5_model_name_or_path="maker/small"), {"x": "x/y"}, ("text_encoder", "tokenizer"))
        print(*(name for part in ("text_encoder", "tokenizer") for name in chosen.part(part).files()), chosen.class_of("text_encoder").__name__)
    """

    found = ask(code, tmp_path / "home", f"http://127.0.0.1:{hub.server_port}").split()

    tokenizer = ["spiece.model", "tokenizer.json", "tokenizer_config.json"]
    assert found == ["config.json", "model.safetensors", *tokenizer, "UMT5EncoderModel"]
    assert sorted(hub.sent) == sorted(["config.json", "model.safetensors", *tokenizer])
