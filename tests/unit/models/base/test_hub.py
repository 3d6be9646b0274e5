"""What is said when the hub says no: checked against a server that answers as the hub does."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a model's config.json."""

    ANSWERS = {  # noqa: RUF012
        "gated": (403, "GatedRepo"),
        "absent": (401, "RepoNotFound"),
        "other-revision": (404, "RevisionNotFound"),
        "no-config": (404, "EntryNotFound"),
        "forbidden": (403, ""),
        "unreachable": (0, ""),
    }

    def do_HEAD(self):
        status, code = self.ANSWERS[self.path.split("/")[2]]
        if not status:
            self.close_connection = True  # hang up without a word
            return
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *arguments):
        """Say nothing."""


CHILD = """
import json, sys, time
time.sleep = lambda seconds: None  # between the hub library's retries
from drllm.config import ModelConfig
from drllm.errors import ModelError
from drllm.models.base.load import load

messages = {}
for name in sys.argv[1:]:
    revision = "v9" if name == "other-revision" else None
    try:
        load(ModelConfig(model="someone/" + name, revision=revision, device="cpu"))
    except ModelError as error:
        messages[name] = str(error)
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def hub_says(tmp_path_factory):
    """What we say to each answer of a hub on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HOME": str(tmp_path_factory.mktemp("hub")),
            "NO_PROXY": "127.0.0.1",
        }
        child = subprocess.run(
            [sys.executable, "-c", CHILD, *Hub.ANSWERS],
            env=environment,
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert (child.returncode, child.stderr) == (0, "")
    messages: dict[str, str] = json.loads(child.stdout)
    return messages


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gated", "is gated: accept the terms on its hub page, then set HF_TOKEN"),
        ("absent", "isn't on the hub, or is private (then set HF_TOKEN)"),
        ("other-revision", "'someone/other-revision' has no revision 'v9'"),
        ("no-config", "has no config.json, so it isn't a transformers model"),
        ("unreachable", "isn't in the local cache, and the hub can't be reached; connect"),
        ("forbidden", "if it needs a login, set HF_TOKEN"),
    ],
)
def test_each_refusal_of_the_hub_is_one_line(hub_says, name, said):
    assert said in hub_says[name]
    assert "\n" not in hub_says[name]
