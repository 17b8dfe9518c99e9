"""Tiny idx files, a mirror on this machine, and no way to any other."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from bayes_svdo.data import fetch, images


def idx_bytes(values):
    """`values`, uint8, as an idx file."""
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def tiny_files(num_train=12, num_test=5):
    """The four files of an MNIST of a few rows, by name."""
    rng = np.random.default_rng(0)
    files = {}
    for part, rows in (("train", num_train), ("t10k", num_test)):
        pixels = rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
        labels = (np.arange(rows) % 10).astype(np.uint8)
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(pixels), mtime=0)
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(labels), mtime=0)
    return files


@pytest.fixture
def tiny():
    return tiny_files()


@pytest.fixture
def as_idx():
    return idx_bytes


@pytest.fixture
def lay_out():
    """Write files, by name, into a folder; None leaves one out."""

    def write(folder, files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if content is not None:
                (folder / name).write_bytes(content)
        return folder

    return write


@pytest.fixture
def dead_mirror():
    """An address that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


@pytest.fixture
def cache(tmp_path, monkeypatch, dead_mirror):
    """An empty user cache, no $BAYES_SVDO_DATA, and mirrors that are all dead."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(fetch, "user_cache", lambda: folder)
    monkeypatch.delenv(fetch.ENVIRONMENT_VARIABLE, raising=False)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")
    for name, files in images.IDX_SETS.items():
        offline = dataclasses.replace(files, mirrors=(dead_mirror,))
        monkeypatch.setitem(images.IDX_SETS, name, offline)
    return folder


@pytest.fixture(autouse=True)
def _isolated(cache):
    """Every test here: nothing outside tmp_path and this machine is reached."""


class Mirror:
    """A server of files; `requested` lists what it was asked for."""

    def __init__(self, files, cut_after=None):
        self.requested = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                mirror.requested.append(name)
                content = files.get(name)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:cut_after])

            def log_message(self, *args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def serve():
    """Start a mirror of some files; `cut_after` breaks every answer off after so many bytes."""
    mirrors = []

    def start(files, cut_after=None):
        mirrors.append(Mirror(files, cut_after))
        return mirrors[-1]

    yield start
    for mirror in mirrors:
        mirror.close()


@pytest.fixture
def publish(monkeypatch):
    """Declare files to be those of MNIST, with mirrors to have them from."""

    def declare(files, *mirrors, name="mnist"):
        published = dataclasses.replace(
            images.IDX_SETS[name],
            mirrors=mirrors or images.IDX_SETS[name].mirrors,
            sha256={file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
        )
        monkeypatch.setitem(images.IDX_SETS, name, published)
        return published

    return declare
