"""Models and routers on the hub: pushed to and fetched from a server that answers as the hub does.

What is said when the hub says no is one line.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from drllm.errors import CheckpointError
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.files import find_routers
from drllm.models.routers.stack import RouterStack

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NO_PUSH = {
    "no-rights": (403, {"error": "You don't have the rights to create a model under this"}),
    "read-only": (403, {"error": "This token can't make repositories."}),
    "bad-token": (401, {"error": "Invalid username or password."}),
    "too-much": (402, {"error": "Your plan is used up.\nBuy more."}),
    "unreachable": (0, {}),
}
NO_FETCH = {
    "gated": (403, {}, "GatedRepo"),
    "forbidden": (403, {"error": "Not from this network."}),
    "unreachable": (0, {}),
}
"""Owner → status, answer and code of the error."""


class Hub(BaseHTTPRequestHandler):
    """Keeps repositories in memory; some owners have none and are refused."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    requests: list[tuple[str, str, Any]] = []  # noqa: RUF012
    fetched: list[tuple[str, str, Any]] = []  # noqa: RUF012
    # A pull request's too, which older versions of the library ask for before they commit to it.
    revisions: set[str] = {"main", COMMIT, "refs%2Fpr%2F1"}  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        lines = [json.loads(line) for line in body.splitlines() if line]
        self.requests.append((self.path, self.headers.get("Authorization", ""), lines))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            return self.create(lines[0]["organization"], lines[0]["name"])
        _, _, _, owner, name, action, *_ = self.path.split("/")
        if action == "branch":
            self.revisions.add(self.path.rpartition("/")[2])
            return self.answer(200, {})
        if action == "preupload":
            files = [file["path"] for file in lines[0]["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer(200, {"files": [{"path": path, **regular} for path in files]})
        assert action == "commit", self.path
        for line in lines:
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.repositories[f"{owner}/{name}"][line["value"]["path"]] = content
        address = f"http://{self.headers['Host']}/{owner}/{name}/commit/{COMMIT}"
        return self.answer(200, {"success": True, "commitUrl": address, "commitOid": COMMIT})

    def create(self, owner, name):
        address = f"http://{self.headers['Host']}/{owner}/{name}"
        if owner in NO_PUSH:
            return self.answer(*NO_PUSH[owner])
        if f"{owner}/{name}" in self.repositories:
            return self.answer(409, {"error": "You already created it", "url": address})
        self.repositories[f"{owner}/{name}"] = {".gitattributes": b""}
        return self.answer(200, {"url": address})

    def do_GET(self):
        self.fetched.append((self.path, self.headers.get("Authorization", ""), None))
        where = self.path.split("?")[0].split("/")
        is_about = where[1] == "api"
        repo = "/".join(where[3:5] if is_about else where[1:3])
        what, revision = (where[5:6], where[6:7]) if is_about else (where[5:6], where[4:5])
        if repo.split("/")[0] in NO_FETCH:
            return self.answer(*NO_FETCH[repo.split("/")[0]])
        files = self.repositories.get(repo)
        if files is None:
            return self.answer(401, {}, "RepoNotFound")
        if not self.revisions.issuperset(revision):
            return self.answer(404, {}, "RevisionNotFound")
        hashes = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
        if is_about and what == ["tree"]:
            tree = [
                {"type": "file", "path": path, "size": len(files[path]), "oid": oid}
                for path, oid in hashes.items()
            ]
            return self.answer(200, tree)
        if is_about:
            about = {"id": repo, "sha": COMMIT, "private": repo.startswith("hidden/"), "tags": []}
            return self.answer(200, {**about, "siblings": [{"rfilename": path} for path in files]})
        if what[0] not in files:
            return self.answer(404, {}, "EntryNotFound")
        return self.answer(200, files[what[0]], etag=hashes[what[0]])

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status, body, code="", etag=""):
        if not status:
            self.close_connection = True  # hang up without a word
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"X-Error-Code": code, "ETag": etag and f'"{etag}"'}
        for name, value in (headers | {"X-Repo-Commit": etag and COMMIT}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        """Say nothing."""


CHILD = """
import json, sys, time, warnings
time.sleep = lambda seconds: None  # between the hub library's retries
import torch
import drllm
from drllm.config import ModelConfig
from drllm.errors import DrllmError
from drllm.model.load import load
from drllm.model.places import check_model
from drllm.models.check import make_tiny
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.routers.files import find_routers

model = make_tiny("llama", num_hidden_layers=3)
routed = drllm.RoutedModel(model, RouterStack(RouterConfig(num_layers=3, hidden_size=32)))
said = {}

def note(name, action):
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            said[name] = str(action())
        said[name + " warned"] = [str(warning.message) for warning in warned]
    except DrllmError as error:
        said[name] = f"{type(error).__name__}: {error}"

def push(repo, **options):
    return lambda: routed.push_to_hub(repo, **{"token": "hf_secret", **options})

def load_model(name, revision=None):
    return lambda: load(name, revision=revision, device="cpu")

def look_up(name, revision=None):
    return lambda: check_model(ModelConfig(model=name, revision=revision))

model.name_or_path = "org/tiny"
note("pushed", push("someone/routers", commit_message="First routers"))
said["again"] = routed.save_pretrained(
    "saved", push_to_hub=True, repo_id="someone/routers", token="hf_secret"
)
note("nowhere", lambda: routed.save_pretrained("saved", push_to_hub=True))
note("unasked", lambda: routed.save_pretrained("saved", token="hf_secret"))
note("branch", push("someone/routers", revision="v2"))
note("request", push("someone/routers", revision="refs/pr/1"))
note("hidden", push("hidden/routers", private=True))
note("not hidden", push("someone/routers", private=True))
model.name_or_path = "/home/me/models/tiny"
note("local", push("someone/local"))
for name in ("no-rights", "bad-token", "too-much", "unreachable", "read-only"):
    note(name, push(name + "/routers"))
note("no token", push("someone/routers", token=None))
for name in ("routers", "a/b/c", "some one/routers", "-someone/routers", "someone/x--y", ""):
    note(f"name {name}", push(name))

model.name_or_path = "org/tiny"
weights = routed.routers.state_dict()
fetched = drllm.RoutedModel.from_pretrained("someone/routers", routed.detach())
said["fetched"] = all(torch.equal(weights[k], w) for k, w in fetched.routers.state_dict().items())
note("fetched folder", lambda: find_routers("someone/routers"))
options = {"cache_dir": "own-cache", "token": "hf_reader"}
note("fetched elsewhere", lambda: find_routers("someone/routers", **options))
local = {"cache_dir": "own-cache", "local_files_only": True}
note("local only", lambda: find_routers("someone/local", **local))
load_base = lambda: drllm.load("someone/absent", **options, local_files_only=True)
note("base local only", load_base)
note("fetched at a commit", lambda: find_routers("someone/routers", COMMIT))
for name in ("gated", "absent", "forbidden", "unreachable"):
    note(f"fetch {name}", lambda: find_routers(name + "/routers"))
    note(f"model looked up {name}", look_up(name + "/model"))
    note(f"model {name}", load_model(name + "/model"))
note("fetch other revision", lambda: find_routers("someone/routers", "v9"))
note("fetch a base model", lambda: find_routers("someone/model"))
note("model looked up", look_up("someone/model", COMMIT))
note("model looked up other revision", look_up("someone/model", "v9"))
note("model other revision", load_model("someone/model", "v9"))
note("model without a config", load_model("someone/notes"))
note("model that is routers", load_model("someone/routers"))
print(json.dumps(said))
""".replace("COMMIT", repr(COMMIT))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a process that pushes and fetches was answered."""
    Hub.repositories["someone/notes"] = {"README.md": b"# Notes"}
    Hub.repositories["someone/model"] = {"config.json": b"{}", "README.md": b"# A model"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HOME": str(tmp_path_factory.mktemp("hub")),
            "NO_PROXY": "127.0.0.1",
        }
        child = subprocess.run(
            [sys.executable, "-c", CHILD],
            env=environment,
            cwd=tmp_path_factory.mktemp("empty"),
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert (child.returncode, child.stderr) == (0, "")
    yield json.loads(child.stdout)
    Hub.repositories.clear()
    Hub.requests.clear()
    Hub.fetched.clear()


def requests_to(path):
    return [(token, lines) for where, token, lines in Hub.requests if where == path]


def test_a_pushed_repository_holds_the_four_files(said):
    assert said["pushed"].endswith(f"/someone/routers/commit/{COMMIT}")
    assert said["pushed warned"] == []
    files = Hub.repositories["someone/routers"]
    assert set(files) - {".gitattributes"} == {
        "README.md",
        "config.json",
        "router_config.json",
        "routers.safetensors",
    }
    assert json.loads(files["router_config.json"])["base_model"] == "org/tiny"
    card = files["README.md"].decode()
    assert 'drllm.RoutedModel.from_pretrained("someone/routers")' in card
    assert "`org/tiny`: LlamaForCausalLM, 3 layers" in card


def test_token_and_message_reach_the_hub(said):
    [(token, lines), *later] = requests_to("/api/models/someone/routers/commit/main")
    assert token == "Bearer hf_secret"
    assert lines[0]["value"]["summary"] == "First routers"
    assert later[0][1][0]["value"]["summary"] == "Upload routers"


def test_pushing_again_and_to_a_branch_works(said):
    for name in ("again", "branch", "request"):
        assert said[name].endswith(COMMIT)
    assert len(requests_to("/api/models/someone/routers/branch/v2")) == 1
    assert len(requests_to("/api/models/someone/routers/commit/v2")) == 1
    assert len(requests_to("/api/models/someone/routers/commit/refs%2Fpr%2F1")) == 1


def test_a_private_repository_is_made_private(said):
    assert said["hidden"].endswith(COMMIT)
    asked = [lines[0] for _, lines in requests_to("/api/repos/create")]
    [hidden] = [request for request in asked if request["organization"] == "hidden"]
    others = [request for request in asked if request["name"] == "local"]
    assert hidden.get("visibility") == "private" or hidden.get("private") is True
    assert others[0].get("visibility") == "public" or others[0].get("private") is False


def test_nothing_is_pushed_to_a_public_repository_that_should_be_private(said):
    assert "someone/routers is public already and private=True can't change" in said["not hidden"]
    commits = [path for path, *_ in Hub.requests if "/someone/routers/commit/" in path]
    assert len(commits) == 4  # those of the tests above


def test_the_name_of_a_folder_on_this_machine_is_not_pushed(said):
    [warning] = said["local warned"]
    assert "'/home/me/models/tiny' isn't a hub id, so the pushed routers don't name" in warning
    files = Hub.repositories["someone/local"]
    assert json.loads(files["router_config.json"])["base_model"] == ""
    assert all(b"/home/me" not in content for content in files.values())
    assert b'from_pretrained("someone/local", base=model)' in files["README.md"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no-rights", "the token has no write access (You don't have the rights to create a mod"),
        ("no-rights", "give a token with write access to no-rights, or a repository of your own"),
        ("read-only", "the token has no write access (This token can"),
        ("bad-token", "the hub doesn't accept the token; make a token with write access in"),
        ("too-much", "the hub refused: Your plan is used up"),
        ("unreachable", "the hub can't be reached ("),
        ("no token", "on the hub without a token: make a token with write access in your settings"),
        ("no token", "then pass it as token=... or set HF_TOKEN"),
        ("name routers", "'routers' can't be a repository on the hub; give OWNER/NAME"),
        ("name a/b/c", "'a/b/c' can't be a repository on the hub; give OWNER/NAME"),
        ("name some one/routers", "can't be a repository on the hub; give OWNER/NAME"),
        ("name -someone/routers", "can't be a repository on the hub: Repo id must use alphanum"),
        ("name someone/x--y", "can't be a repository on the hub: Cannot have -- or .. in repo_id"),
        ("name ", "'' can't be a repository on the hub; give OWNER/NAME"),
        ("nowhere", "push_to_hub=True and repo_id='OWNER/NAME' go together"),
        ("unasked", "push_to_hub=True and repo_id='OWNER/NAME' go together"),
        ("model gated", "is gated: accept the terms on its hub page, then set HF_TOKEN"),
        ("model absent", "isn't on the hub, or is private (then set HF_TOKEN)"),
        ("model other revision", "'someone/model' has no revision 'v9'"),
        ("model without a config", "has no config.json, so it isn't a transformers model"),
        ("model that is routers", "'someone/routers' holds routers, not a model; give them as --r"),
        ("model looked up gated", "is gated: accept the terms on its hub page, then set HF_TOKEN"),
        ("model looked up absent", "isn't on the hub, or is private (then set HF_TOKEN)"),
        ("model looked up other revision", "'someone/model' has no revision 'v9'"),
        (
            "model looked up unreachable",
            "isn't in the local cache, and the hub can't be reached; connect",
        ),
        ("model unreachable", "isn't in the local cache, and the hub can't be reached; connect"),
        ("model forbidden", "if it needs a login, set HF_TOKEN"),
        ("fetch gated", "'gated/routers' is gated: accept the terms on its hub page, then set HF"),
        ("fetch absent", "'absent/routers' isn't on the hub, or is private (then set HF_TOKEN)"),
        ("fetch absent", "there is no folder 'absent/routers' either"),
        ("fetch forbidden", "'forbidden/routers': Not from this network; if it needs a login, set"),
        ("fetch unreachable", "'unreachable/routers' isn't in the local cache, and the hub can't"),
        ("fetch other revision", "'someone/routers' has no revision 'v9'; give a branch, tag or c"),
        ("fetch a base model", "'someone/model' has no router_config.json; is it a base model?"),
    ],
)
def test_each_refusal_is_one_line(said, name, expected):
    kinds = {"model": "ModelError", "nowhere": "ConfigError", "unasked": "ConfigError"}
    kind = kinds.get(name.split()[0], "CheckpointError")
    assert said[name].startswith(f"{kind}: ")
    assert expected in said[name]
    assert "\n" not in said[name]


def test_a_push_offline_is_refused_before_anything_is_sent(tiny_llama):
    assert constants.HF_HUB_OFFLINE
    routers = RouterStack(RouterConfig(num_layers=3, hidden_size=32))
    with pytest.raises(CheckpointError, match="to someone/routers: HF_HUB_OFFLINE is set; unset"):
        RoutedModel(tiny_llama(num_layers=3), routers).push_to_hub("someone/routers", token="x")


def test_fetched_routers_are_those_that_were_pushed(said):
    assert said["fetched"] is True
    assert said["fetched folder"].endswith(f"models--someone--routers/snapshots/{COMMIT}")
    assert said["fetched at a commit"] == said["fetched folder"]
    assert "config.json" in {Path(path).name for path, _, _ in Hub.fetched}, "counts a download"


def test_token_and_cache_are_passed_through(said):
    assert "own-cache/models--someone--routers/" in said["fetched elsewhere"]
    tokens = {token for path, token, _ in Hub.fetched if "/someone/routers/" in path}
    assert "Bearer hf_reader" in tokens
    for name in ("local only", "base local only"):
        assert "isn't in the local cache, and local_files_only is set; connect" in said[name]


def test_routers_that_arent_cached_are_refused_offline():
    with pytest.raises(CheckpointError, match="isn't in the local cache, and HF_HUB_OFFLINE is"):
        find_routers("someone/absent")


@pytest.mark.parametrize("place", ["x--y/z", "-a/b"])
def test_a_name_that_cant_be_a_hub_id_is_refused(place):
    with pytest.raises(CheckpointError, match=f"'{place}' can't be a hub id"):
        find_routers(place)


@pytest.mark.parametrize("place", ["routers", "./a/b", "../routers", "a/b/c", "/no/such", "a/b/"])
def test_a_place_that_is_no_hub_id_is_left_to_the_reader_of_folders(place):
    assert find_routers(place) == Path(place)


def test_a_model_that_the_hub_has_or_does_not_show_is_not_refused_before_it_is_loaded(said):
    assert said["model looked up"] == "None"
    assert said["model looked up forbidden"] == "None"
