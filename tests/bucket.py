"""A Google Cloud Storage of one bucket, in memory.

It has the parts of the JSON API that gcsfs, google-cloud-storage and TensorStore use.
"""

import base64
import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

UPLOAD_PATH = "/upload/storage/v1/b/bucket/o"
BUCKET_PATH = "/storage/v1/b/bucket"
OBJECTS_PATH = "/storage/v1/b/bucket/o"
OBJECT_PATH = re.compile(
    r"(?:/download)?/storage/v1/b/bucket/o/(?P<name>[^/]+)"
    r"(?:/(?P<verb>rewriteTo|moveTo)(?:/b/bucket)?/o/(?P<target>[^/]+))?"
)
LAST_NAME = "\U0010ffff"  # sorts after all names


@dataclasses.dataclass(frozen=True)
class Stored:
    """The contents of an object, and the number of the change that made it."""

    generation: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Upload:
    """An upload in parts that has begun."""

    name: str
    data: bytearray


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer to a request; a body that is not bytes is sent as JSON."""

    status: int
    body: object
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


class Bucket(ThreadingHTTPServer):
    """The server, at `url`, on a thread of its own.

    Only what happens inside one request is atomic, as with the real one.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects: dict[str, Stored] = {}
        self.uploads: list[Upload] = []
        self.changes = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Ignore a client that was killed and hangs up."""

    def put(self, name: str, data: bytes) -> dict:
        """Store an object and return its description."""
        self.changes += 1
        self.objects[name] = Stored(self.changes, data)
        return self.describe(name)

    def describe(self, name: str) -> dict:
        """Return an object's description as the API gives it."""
        stored = self.objects[name]
        digest = base64.b64encode(hashlib.md5(stored.data).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(stored.data)),
            "md5Hash": digest,
            "generation": str(stored.generation),
            "metageneration": "1",
            "updated": "2020-01-01T00:00:00.000Z",
        }

    def list_objects(self, query: dict[str, str]) -> dict:
        """Return the objects with a prefix, and their folders if there is a delimiter."""
        prefix = query.get("prefix", "")
        delimiter = query.get("delimiter") or "\0"  # no name contains it
        items = []
        folders = set()
        for name in sorted(self.objects):
            in_range = query.get("startOffset", "") <= name < query.get("endOffset", LAST_NAME)
            if not (name.startswith(prefix) and in_range):
                continue
            first, separator, _ = name.removeprefix(prefix).partition(delimiter)
            if separator:
                folders.add(prefix + first + separator)
            else:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}

    def download(self, directory: Path) -> None:
        """Write all objects as files below a directory."""
        for name, stored in self.objects.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(stored.data)


class Request(BaseHTTPRequestHandler):
    """One request to the bucket."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            reply = self.reply_to(url.path, query, body)
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def reply_to(self, path: str, query: dict[str, str], body: bytes) -> Reply:
        if path == UPLOAD_PATH:
            return self.upload(query, body)
        if path == BUCKET_PATH:
            description = {"kind": "storage#bucket", "name": "bucket"}
            return Reply(200, description, {"Content-Type": "application/json"})
        if path == OBJECTS_PATH:
            return Reply(200, self.server.list_objects(query))
        match = OBJECT_PATH.fullmatch(path)
        name = unquote(match["name"])
        if name not in self.server.objects:
            return Reply(404, {"error": {"code": 404, "message": "Not Found"}})
        if match["verb"]:
            return self.copy(name, unquote(match["target"]), match["verb"])
        if self.command == "DELETE":
            del self.server.objects[name]
            return Reply(204, b"")
        if query.get("alt") == "media":
            return self.read(name, query)
        return Reply(200, self.server.describe(name))

    def copy(self, name: str, target: str, verb: str) -> Reply:
        """Copy an object, or move it."""
        data = self.server.objects[name].data
        description = self.server.put(target, data)
        if verb == "moveTo":
            del self.server.objects[name]
            return Reply(200, description)
        size = str(len(data))
        done = {"objectSize": size, "totalBytesRewritten": size}
        return Reply(200, {"done": True, "resource": description, **done})

    def read(self, name: str, query: dict[str, str]) -> Reply:
        """Return an object's data, or the range of it that the client asks for."""
        stored = self.server.objects[name]
        headers = {"x-goog-generation": str(stored.generation)}
        if query.get("ifGenerationNotMatch") == str(stored.generation):
            return Reply(304, b"", headers)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return Reply(200, stored.data, headers)
        size = len(stored.data)
        first = int(match[1])
        last = min(int(match[2] or size), size - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Reply(206, stored.data[first : last + 1], headers)

    def upload(self, query: dict[str, str], body: bytes) -> Reply:
        """Take an object at once, or in parts that follow each other."""
        bucket = self.server
        kind = query["uploadType"]
        if kind == "media":
            return self.upload_at_once(query, body)
        if "upload_id" not in query:
            number = len(bucket.uploads)
            bucket.uploads.append(Upload(query["name"], bytearray()))
            location = f"{bucket.url}{UPLOAD_PATH}?uploadType={kind}&upload_id={number}"
            return Reply(200, {}, {"Location": location})
        upload = bucket.uploads[int(query["upload_id"])]
        upload.data.extend(body)
        if self.headers["Content-Range"].endswith("/*"):
            return Reply(308, b"", {"Range": f"bytes=0-{len(upload.data) - 1}"})
        return Reply(200, bucket.put(upload.name, bytes(upload.data)))

    def upload_at_once(self, query: dict[str, str], body: bytes) -> Reply:
        """Take an object, if it still is in the generation that the client expects."""
        expected = query.get("ifGenerationMatch")
        current = self.server.objects.get(query["name"], Stored(0, b""))
        if expected is not None and int(expected) != current.generation:
            return Reply(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        return Reply(200, self.server.put(query["name"], body))
