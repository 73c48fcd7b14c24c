"""A real HTTP server on 127.0.0.1 that answers as the Hugging Face Hub does, as far as a download of a model asks it.

`FakeHub(files)` holds one model, acme/tiny, at one commit with the branch main and the tag v1. `gated` wants a token;
`cut` names a file whose bytes end early. `requests` lists (method, path) of what was asked, `tokens` the tokens sent.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "acme/tiny"
TOKEN = "hf_" + "x" * 34


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: "FakeHub"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes, promised: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if promised is None else promised))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        if self.command == "GET" and promised is not None:
            self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b"{}", X_Error_Code=code, X_Error_Message=f"{code}, says the server")

    def do_GET(self) -> None:
        fake = self.fake
        path = self.path.partition("?")[0]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        fake.requests.append((self.command, path))
        fake.tokens.add(token)
        if f"/{NAME}/" not in path + "/":
            return self.refuse(404 if token else 401, "RepoNotFound")
        if path.startswith("/api/models/"):
            _, _, what = path.partition(f"{NAME}/")
            kind, _, revision = what.partition("/")
            if revision not in ("main", "v1", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            if kind == "revision":
                return self.reply(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
            rows = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in fake.files.items()
            ]
            return self.reply(200, json.dumps(rows).encode(), Content_Type="application/json")
        if fake.gated and token != TOKEN:
            return self.refuse(401, "GatedRepo")
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if name not in fake.files:
            return self.refuse(404, "EntryNotFound")
        body = fake.files[name]
        cut = name == fake.cut and self.command == "GET"
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        shown = body[: len(body) // 2] if cut else body
        self.reply(200, shown, len(body) if cut or self.command == "HEAD" else None, ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


class FakeHub:
    """Use as a context manager. url: what goes into HF_ENDPOINT."""

    def __init__(self, files: dict[str, bytes], gated: bool = False, cut: str = "") -> None:
        self.files, self.gated, self.cut = files, gated, cut
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
