"""A stand-in for ModelScope and Hugging Face on loopback, which speaks the protocols of both.

It lists the data set as it is today, as it was until 2026-04-01, or as nobody knows it, and serves
files of a few hundred kilobytes under these names. By hand, from the repository's root:

    python -m tests.support.hubs --listing former --port 8008
    MODELSCOPE_ENDPOINT=http://127.0.0.1:8008 HF_ENDPOINT=http://127.0.0.1:8008 \
        HF_HUB_DISABLE_XET=1 python -m dataset.download --output_dir /tmp/data
"""
import argparse
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

from benchmarks.loopback import JsonHandler

TEXT = '{"text": "床前明月光，疑是地上霜。"}\n'.encode()
CHAT = ('{"conversations": [{"role": "user", "content": "你是谁"}, '
        '{"role": "assistant", "content": "我是缘梦。"}]}\n').encode()
LISTINGS = {
    "today": {
        "README.md": b"# minimind_dataset\n",
        "agent_rl.jsonl": CHAT * 30,
        "agent_rl_math.jsonl": CHAT * 20,
        "dpo.jsonl": CHAT * 40,
        "pretrain_t2t.jsonl": TEXT * 20_000,
        "pretrain_t2t_mini.jsonl": TEXT * 10_000,
        "rlaif.jsonl": CHAT * 10,
        "sft_t2t.jsonl": CHAT * 6_000,
        "sft_t2t_mini.jsonl": CHAT * 4_000,
    },
    "former": {
        "README.md": b"# minimind_dataset\n",
        "dpo.jsonl": CHAT * 40,
        "lora_identity.jsonl": CHAT * 5,
        "pretrain_hq.jsonl": TEXT * 11_000,
        "sft_1024.jsonl": CHAT * 5_000,
        "sft_mini_512.jsonl": CHAT * 3_000,
    },
    "unknown": {
        ".gitattributes": b"*.jsonl filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": b"# minimind_dataset\n",
        "pretrain_2028.jsonl": TEXT * 9_000,
        "sft_2028.jsonl": CHAT * 2_000,
    },
}
LARGE_BYTES = 1000  # a larger file is kept as the hubs keep large files (LFS)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODELSCOPE = "/api/v1/datasets/gongjy/minimind_dataset"
HUGGING_FACE = "datasets/jingyaogong/minimind_dataset"


class StandInHub(ThreadingHTTPServer):
    """Serves one of `LISTINGS`; can be told to break off, to refuse, or to lie."""

    daemon_threads = True

    def __init__(self, listing: str = "today", port: int = 0):
        super().__init__(("127.0.0.1", port), StandInHandler)
        self.files = dict(LISTINGS[listing])
        self.ranges: list[tuple[str, str | None]] = []  # (file, Range header) of each request
        self.tokens: dict[str, set[str | None]] = {}  # Authorization headers, hub's and storage's
        self.listed_size_offset = 0
        self.break_off_after: int | None = None  # bytes after which connections are cut
        self.break_offs_left = 0
        self.is_down_after_break = False  # no file comes from the first cut on
        self.corrupt = False  # the first byte of each file is another one
        self.refuse_listing: int | None = None  # an HTTP status
        self.refuse_files: int | None = None
        self.is_web_page = False  # answers everything as a captive portal does
        self.ignores_ranges = False
        self.stall_after: int | None = None  # bytes after which a file waits for `go_on`
        self.stalled, self.go_on = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def entry(self, name: str) -> tuple[int, str, str]:
        """Size, SHA-256 and git's number of a file, as a listing has them."""
        body = self.files[name]
        git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        return len(body) + self.listed_size_offset, hashlib.sha256(body).hexdigest(), git


class StandInHandler(JsonHandler):
    server: StandInHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlparse(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        kind = "storage" if path.startswith("/storage/") else "hub"
        if "minimind_dataset" in path or kind == "storage":
            self.server.tokens.setdefault(kind, set()).add(self.headers.get("Authorization"))
        if self.server.is_web_page:
            self.reply(200, b"<html>Log in to the hotel's network</html>",
                       {"Content-Type": "text/html"})
        elif path.startswith(f"{MODELSCOPE}/repo"):
            self.modelscope(path, query)
        elif found := re.fullmatch(f"/api/{HUGGING_FACE}/(revision|tree)/([^/]+)", path):
            self.hugging_face_listing(*found.groups())
        elif found := re.fullmatch(f"/{HUGGING_FACE}/resolve/([^/]+)/(.+)", path):
            self.hugging_face_file(*found.groups())
        elif path.startswith("/storage/"):  # where Hugging Face sends one for large files
            self.send_file(path.removeprefix("/storage/"))
        else:
            self.reply_json({"Code": 404, "Message": f"no {path}"}, 404)

    # ---- ModelScope: one endpoint for the listing, one for files ---------------------------------

    def modelscope(self, path: str, query: dict[str, list[str]]) -> None:
        is_listing = path.endswith("/tree")
        status = self.server.refuse_listing if is_listing else self.server.refuse_files
        if query.get("Revision") != ["master"]:
            status = 404
        if status:
            return self.reply_json({"Code": status, "Message": "no", "Success": False}, status)
        if not is_listing:
            return self.send_file(query["FilePath"][0])
        page, size = (int(query.get(name, [default])[0])
                      for name, default in (("PageNumber", 1), ("PageSize", 100)))
        files = []
        for name in list(self.server.files)[(page - 1) * size:page * size]:
            size, sha256, _ = self.server.entry(name)
            files.append({"Path": name, "Name": name, "Type": "blob", "Size": size,
                          "Sha256": sha256, "IsLFS": size > LARGE_BYTES, "Revision": COMMIT})
        self.reply_json({"Code": 200, "Success": True, "Data": {"Files": files},
                         "TotalCount": len(self.server.files)})

    # ---- Hugging Face: repository info or tree, and `resolve` with its redirect ------------------

    def hugging_face_listing(self, kind: str, revision: str) -> None:
        if not self.hugging_face_allows(revision, self.server.refuse_listing):
            return
        siblings, tree = [], []
        for name in self.server.files:
            size, sha256, git = self.server.entry(name)
            siblings.append({"rfilename": name, "size": size, "blobId": git})
            tree.append({"type": "file", "path": name, "size": size, "oid": git})
            if size > LARGE_BYTES:
                siblings[-1]["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
                tree[-1]["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
        self.reply_json(tree if kind == "tree" else {
            "id": HUGGING_FACE.removeprefix("datasets/"), "sha": COMMIT, "private": False,
            "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "lastModified": "2026-04-01T00:00:00.000Z", "siblings": siblings})

    def hugging_face_file(self, revision: str, name: str) -> None:
        if not self.hugging_face_allows(revision, self.server.refuse_files):
            return
        if name not in self.server.files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        size, sha256, git = self.server.entry(name)
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if size <= LARGE_BYTES:
            return self.send_file(name, headers | {"ETag": f'"{git}"'})
        self.reply(302, b"", headers | {
            # Another name, so another origin: as with the real one, no token may go there.
            "Location": f"http://localhost:{self.server.server_port}/storage/{name}",
            "X-Linked-Size": str(size), "X-Linked-Etag": f'"{sha256}"', "ETag": f'"{git}"'})

    def hugging_face_allows(self, revision: str, status: int | None) -> bool:
        if status:
            self.reply(status, b'{"error": "no"}', {401: {}, 403: {"X-Error-Code": "GatedRepo"}}
                       .get(status, {"X-Error-Message": "no"}))
        elif revision not in ("main", COMMIT):
            self.reply(404, b'{"error": "no"}', {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    # ---- Both ------------------------------------------------------------------------------------

    def send_file(self, name: str, headers: dict[str, str] | None = None) -> None:
        body = self.server.files[name]
        if self.server.corrupt:
            body = b"X" + body[1:]
        asked = None if self.server.ignores_ranges else self.headers.get("Range")
        if self.command == "GET":
            self.server.ranges.append((name, self.headers.get("Range")))
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked or "bytes=0-").groups()
        start, end = int(first), min(int(last or len(body)) + 1, len(body))
        headers = headers or {}
        if asked and start >= len(body):
            return self.reply(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        if asked:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        cut = None
        if self.command == "GET" and self.server.break_offs_left:
            self.server.break_offs_left -= 1
            cut = self.server.break_off_after
            if self.server.is_down_after_break:
                self.server.refuse_files = 503
        self.reply(206 if asked else 200, body[start:end], headers, cut)

    def reply_json(self, content: dict | list, status: int = 200) -> None:
        self.reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str],
              cut: int | None = None) -> None:
        """Answer; with `cut` only so many bytes of the body, as when the line breaks."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            stall = self.server.stall_after
            self.wfile.write(body[:cut if stall is None else stall])
            if stall is not None and stall < len(body):
                self.wfile.flush()
                self.server.stalled.set()
                self.server.go_on.wait()
                with suppress(OSError):  # who asked may be gone
                    self.wfile.write(body[stall:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving_hub(listing: str = "today") -> Iterator[StandInHub]:
    """The stand-in in a thread, on a free port."""
    server = StandInHub(listing)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a stand-in for both hubs on loopback.")
    parser.add_argument("--listing", choices=list(LISTINGS), default="today")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    options = parser.parse_args()
    server = StandInHub(options.listing, options.port)
    print(f"Listing {options.listing} on {server.url}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
