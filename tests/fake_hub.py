"""A server with the parts of the Hugging Face Hub that a model's upload and download use."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each with its files, and the commits' messages."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.messages = {}, []


@contextlib.contextmanager
def running_hub():
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, status, value=None, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", self.path)
        files = self.server.repositories.get(found[1]) if found else None
        if files is None:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif found[2] not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        else:
            body = files[found[2]]
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            self.answer(200, body, ETag=etag, X_Repo_Commit="0" * 40)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            exists = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            self.answer(409 if exists else 200, {"url": f"{self.server.url}/{name}"})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[found[1]][line["value"]["path"]] = content
                else:
                    self.server.messages.append(line["value"]["summary"])
            url = f"{self.server.url}/{found[1]}/commit/{'0' * 40}"
            self.answer(200, {"success": True, "commitUrl": url, "commitOid": "0" * 40})
        else:
            self.answer(404, {"error": self.path})
