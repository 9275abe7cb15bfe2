"""A Google Cloud Storage of one bucket, in memory: of its JSON API what gcsfs, google-cloud-storage and TensorStore ask for."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit


class Bucket(ThreadingHTTPServer):
    """At `url`, on a thread of its own. Only what is inside one request is atomic, as with the real one."""

    daemon_threads = True
    handle_error = lambda self, *_: None  # a client that is killed hangs up

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects, self.uploads, self.changes, self.lock = (
            {},
            [],
            0,
            threading.Lock(),
        )  # name -> (generation, bytes)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def put(self, name: str, data: bytes) -> dict:
        self.changes += 1
        self.objects[name] = self.changes, data
        return self.facts(name)

    def facts(self, name: str) -> dict:
        generation, data = self.objects[name]
        digest = base64.b64encode(hashlib.md5(data).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(data)),
            "md5Hash": digest,
            "generation": str(generation),
            "metageneration": "1",
            "updated": "2020-01-01T00:00:00.000Z",
        }

    def listed(self, prefix="", delimiter="", startOffset="", endOffset="\U0010ffff", **_) -> dict:
        items, folders = [], set()
        for name in sorted(self.objects):
            if name.startswith(prefix) and startOffset <= name < endOffset:
                first, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                folders.add(prefix + first + found) if found else items.append(self.facts(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}

    def download(self, directory: Path) -> None:
        for name, (_, data) in self.objects.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            code, found, *headers = self.act(url.path, dict(parse_qsl(url.query)), body)
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(code)
        for name, value in [("Content-Length", str(len(data))), *headers]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def act(self, path: str, query: dict, body: bytes) -> tuple:
        bucket = self.server
        if path == "/upload/storage/v1/b/bucket/o":
            return self.upload(query, body)
        if path == "/storage/v1/b/bucket":
            return (
                200,
                {"kind": "storage#bucket", "name": "bucket"},
                ("Content-Type", "application/json"),
            )
        if path == "/storage/v1/b/bucket/o":
            return 200, bucket.listed(**query)
        form = r"(?:/download)?/storage/v1/b/bucket/o/([^/]+)(?:/(rewriteTo|moveTo)(?:/b/bucket)?/o/([^/]+))?"
        name, verb, target = map(unquote, re.fullmatch(form, path).groups(""))
        if name not in bucket.objects:
            return 404, {"error": {"code": 404, "message": "Not Found"}}
        generation, data = bucket.objects[name]
        if verb:
            facts = bucket.put(target, data)
            if verb == "moveTo":
                del bucket.objects[name]
                return 200, facts
            return 200, {
                "done": True,
                "resource": facts,
                "objectSize": str(len(data)),
                "totalBytesRewritten": str(len(data)),
            }
        if self.command == "DELETE":
            del bucket.objects[name]
            return 204, b""
        if query.get("alt") != "media":
            return 200, bucket.facts(name)
        stamp = "x-goog-generation", str(generation)
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", stamp
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, data, stamp
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        return (
            206,
            data[first : last + 1],
            stamp,
            ("Content-Range", f"bytes {first}-{last}/{len(data)}"),
        )

    def upload(self, query: dict, body: bytes) -> tuple:
        """At once, or in parts that follow each other."""
        bucket, kind = self.server, query["uploadType"]
        if kind == "media":
            wanted = query.get("ifGenerationMatch")
            if wanted is not None and int(wanted) != bucket.objects.get(query["name"], (0, b""))[0]:
                return 412, {"error": {"code": 412, "message": "conditionNotMet"}}
            return 200, bucket.put(query["name"], body)
        if "upload_id" not in query:
            bucket.uploads.append((query["name"], bytearray()))
            return (
                200,
                {},
                (
                    "Location",
                    f"{bucket.url}/upload/storage/v1/b/bucket/o?uploadType={kind}&upload_id={len(bucket.uploads) - 1}",
                ),
            )
        name, data = bucket.uploads[int(query["upload_id"])]
        data += body
        if self.headers["Content-Range"].endswith("/*"):
            return 308, b"", ("Range", f"bytes=0-{len(data) - 1}")
        return 200, bucket.put(name, bytes(data))
