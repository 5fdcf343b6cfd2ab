"""What may be a name, a version and a place is said once, and everything else is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository.errors import ConfigError, InvalidNameError
from repository.names import check_name, check_version, contain, shown
from repository.sizes import human, parse_bytes

GOOD = [
    "digits", "org/name", "ViT-L/14", "a.b_c+d@e=f-g", "_x", "0digit", "v1.2", "a/b/c/d/e/f/g/h",
    "versions", "infer", "x" * 200, "a..b",
]  # fmt: skip
BAD = [
    "", "/", "a/", "/a", "a//b", ".", "..", "../x", "a/../b", "a/./b", ".hidden", "a/.hidden", "%2e%2e",
    "a%2fb", "a\\b", "a b", "a\n", "a\0", "\x7f", "ü", "a\u202eb", "-a", "+a", "1", "14", "status",
    "load", "unload", "unload-all", "sleep", "wake", "pin", "stats", "a/versions/1", "a/infer",
    "infer/a", "a/ready",
    "a/config", "a/generate_stream", "a/trace", "x" * 201, "a/b/c/d/e/f/g/h/i", "~", "a:1", "a?b",
    "a#b", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_an_allowed_name_is_returned_as_it_is(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_any_other_name_is_refused_with_a_printable_reason(name: str) -> None:
    with pytest.raises(InvalidNameError) as refused:
        check_name(name)
    text = str(refused.value)
    assert text.isprintable()
    text.encode()


@settings(deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"[a/.%\\0-9]{1,12}", fullmatch=True))
def test_a_name_that_passes_stays_in_its_folder_and_means_itself_in_a_url(name: str) -> None:
    try:
        check_name(name)
    except InvalidNameError:
        return
    assert os.path.normpath(os.path.join("/r", name)) == f"/r/{name}"
    assert not set(name) & set("%\\?#:&; \n\0")


@pytest.mark.parametrize(
    ("text", "number"), [("1", 1), ("20260101", 20260101), ("2147483647", 2**31 - 1)]
)
def test_a_version_is_a_positive_whole_number(text: str, number: int) -> None:
    assert check_version(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "01",
        "-1",
        "+1",
        "1.0",
        "",
        " 1",
        "1\n",
        "1_0",
        "2147483648",
        "9" * 400,
        "one",
        "²",
        "\u0661",
    ],
)
def test_any_other_version_is_refused(text: str) -> None:
    with pytest.raises(InvalidNameError):
        check_version(text)


def test_a_link_that_stays_inside_is_followed_and_one_that_leaves_is_refused(
    tmp_path: Path,
) -> None:
    root, other = tmp_path / "repo", tmp_path / "repo-other"
    for folder in (root / "a", other):
        folder.mkdir(parents=True)
    (root / "stays").symlink_to("a")
    (root / "leaves").symlink_to(other)
    assert contain(root, root / "stays") == (root / "a").resolve()
    assert contain(root, root) == root.resolve()
    for path in (
        root / "leaves",
        root / ".." / "repo-other",
        root / "a" / ".." / "..",
        Path("/etc"),
    ):
        with pytest.raises(InvalidNameError) as refused:
            contain(root, path)
        assert str(tmp_path) not in str(refused.value)


def test_a_root_that_is_a_link_itself_contains_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    assert (
        contain(tmp_path / "link", tmp_path / "link" / "m") == (tmp_path / "real" / "m").resolve()
    )


@given(st.text(max_size=200))
def test_whatever_is_shown_can_be_printed_and_encoded(text: str) -> None:
    assert shown(text).isprintable()
    shown(text).encode()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31),
        ("1.5 gb", 1_500_000_000),
        ("4096", 4096),
        ("300MiB", 300 * 2**20),
        ("0", 0),
        ("7b", 7),
    ],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "2G", "1e9", "9" * 30, "1 2", "nan", "1.2.3MB", "99999999TiB"]
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


@given(st.integers(0, 2**50))
def test_a_size_for_people_is_within_a_twentieth_of_the_truth(size: int) -> None:
    assert abs(parse_bytes(human(size)) - size) <= size / 19
    assert human(-size).lstrip("-") == human(size)
