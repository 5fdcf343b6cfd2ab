"""What is told of a failure says nothing of where things lie."""

from __future__ import annotations

from repository.hosts.failures import without_paths


def test_texts_lose_absolute_paths_and_keep_what_only_looks_like_one(tmp_path):
    assert without_paths(f"no {tmp_path}/a/b.bin", str(tmp_path)) == "no a/b.bin"
    assert without_paths("in /etc/ssl/cert.pem: no") == "in cert.pem: no"
    assert without_paths("node '/layer1/conv/Conv' 3/4 a/b") == "node '/layer1/conv/Conv' 3/4 a/b"
