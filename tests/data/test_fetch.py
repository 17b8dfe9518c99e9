"""Files are taken from where the caller says; else downloaded, checked, and never half-written."""

import gzip
import re

import pytest

from bayes_svdo.data import CorruptDataError, DataNotFoundError
from bayes_svdo.data.fetch import ENVIRONMENT_VARIABLE, obtain, user_cache

FIRST = "train-images-idx3-ubyte.gz"


def contents(paths):
    return {name: path.read_bytes() for name, path in paths.items()}


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_files_are_downloaded_to_the_user_cache(tiny, publish, serve, cache):
    mirror = serve(tiny)
    paths = obtain(publish(tiny, mirror.url))
    assert contents(paths) == tiny
    assert {path.parent for path in paths.values()} == {cache / "mnist"}
    assert files_below(cache) == sorted(tiny)  # no temporary file stays


def test_user_cache_is_a_folder_of_our_own():
    assert "bayes_svdo" in user_cache().parts
    assert user_cache().is_absolute()


def test_second_call_downloads_nothing(tiny, publish, serve):
    mirror = serve(tiny)
    published = publish(tiny, mirror.url)
    obtain(published)
    obtain(published)
    assert sorted(mirror.requested) == sorted(tiny)


def test_root_receives_the_download_and_the_cache_nothing(tiny, publish, serve, cache, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    paths = obtain(publish(tiny, serve(tiny).url), root)
    assert {path.parent for path in paths.values()} == {root / "mnist"}
    assert not cache.exists()


def test_missing_file_on_the_first_mirror_comes_from_the_second(tiny, publish, serve):
    first = serve({name: tiny[name] for name in tiny if name != FIRST})
    second = serve(tiny)
    assert contents(obtain(publish(tiny, first.url, second.url))) == tiny
    assert second.requested == [FIRST]


def test_refused_connection_on_the_first_mirror_falls_back(tiny, publish, serve, dead_mirror):
    assert contents(obtain(publish(tiny, dead_mirror, serve(tiny).url))) == tiny


def test_wrong_bytes_from_the_first_mirror_fall_back(tiny, publish, serve):
    first = serve(dict.fromkeys(tiny, b"<html>Please log in</html>"))
    assert contents(obtain(publish(tiny, first.url, serve(tiny).url))) == tiny


def test_broken_transfer_falls_back_and_leaves_nothing(tiny, publish, serve, cache):
    first = serve(tiny, cut_after=10)
    assert contents(obtain(publish(tiny, first.url, serve(tiny).url))) == tiny
    assert files_below(cache) == sorted(tiny)


def test_wrong_bytes_everywhere_are_refused_by_name_and_not_kept(tiny, publish, serve, cache):
    mirror = serve(tiny | {FIRST: gzip.compress(b"something else")})
    with pytest.raises(CorruptDataError, match=rf"{FIRST}.*SHA256.*does not match") as caught:
        obtain(publish(tiny, mirror.url))
    assert mirror.url + FIRST in str(caught.value)
    assert files_below(cache) == []


def test_interrupted_download_is_completed_where_it_began(tiny, publish, serve, cache, lay_out):
    began = lay_out(cache / "MNIST/raw", {FIRST: tiny[FIRST]})
    mirror = serve(tiny)
    paths = obtain(publish(tiny, mirror.url))
    assert contents(paths) == tiny
    assert {path.parent for path in paths.values()} == {began}
    assert FIRST not in mirror.requested


def test_file_that_is_already_there_is_never_replaced(tiny, publish, serve, tmp_path, lay_out):
    own = b"not the published bytes"
    lay_out(tmp_path / "root/mnist", {FIRST: own})
    paths = obtain(publish(tiny, serve(tiny).url), tmp_path / "root")
    assert contents(paths) == tiny | {FIRST: own}


def test_without_network_and_files_the_error_says_what_to_put_where(
    tiny, publish, cache, tmp_path, monkeypatch, dead_mirror
):
    named = tmp_path / "named"
    named.mkdir()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(named))
    with pytest.raises(DataNotFoundError) as caught:
        obtain(publish(tiny))
    message = str(caught.value)
    for expected in [*tiny, named / "mnist", cache / "mnist", dead_mirror, "$BAYES_SVDO_DATA"]:
        assert str(expected) in message
    assert isinstance(caught.value, FileNotFoundError)
    assert re.search(r"Put the 4 files .* into .*cache/mnist", message)


def test_error_names_the_files_that_a_folder_lacks(tiny, publish, cache, lay_out):
    lay_out(cache / "mnist", tiny | {FIRST: None})
    with pytest.raises(DataNotFoundError, match=rf"mnist: lacks {FIRST}\n"):
        obtain(publish(tiny))


def test_failed_download_leaves_no_empty_folder(tiny, publish, tmp_path, dead_mirror):
    (tmp_path / "root").mkdir()
    with pytest.raises(DataNotFoundError, match="Tried to download"):
        obtain(publish(tiny, dead_mirror), tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_folder_that_cannot_be_written_is_named(tiny, publish, serve, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataNotFoundError, match=r"could not be downloaded[\s\S]*cache"):
        obtain(publish(tiny, serve(tiny).url))


@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw", "."])
@pytest.mark.parametrize("compressed", [True, False], ids=["gz", "plain"])
def test_root_may_hold_the_files_in_any_of_the_usual_ways(
    tiny, publish, tmp_path, lay_out, folder, compressed
):
    expected = tiny if compressed else {name: gzip.decompress(tiny[name]) for name in tiny}
    lay_out(
        tmp_path / "root" / folder,
        {name if compressed else name.removesuffix(".gz"): expected[name] for name in tiny},
    )
    assert contents(obtain(publish(tiny), tmp_path / "root")) == expected


def test_root_may_start_at_the_home_folder(tiny, publish, tmp_path, lay_out, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    lay_out(tmp_path / "mine/mnist", tiny)
    assert contents(obtain(publish(tiny), "~/mine")) == tiny


def test_root_is_searched_before_and_instead_of_all_else(
    tiny, publish, tmp_path, lay_out, cache, monkeypatch
):
    lay_out(cache / "mnist", tiny)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(cache))
    (tmp_path / "root").mkdir()
    with pytest.raises(DataNotFoundError, match="root"):
        obtain(publish(tiny), tmp_path / "root")


def test_environment_is_searched_before_the_cache(
    tiny, publish, tmp_path, lay_out, cache, monkeypatch
):
    named = lay_out(tmp_path / "named/mnist", tiny)
    lay_out(cache / "mnist", tiny)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "named"))
    assert {path.parent for path in obtain(publish(tiny)).values()} == {named}


def test_cache_serves_when_the_environment_has_only_a_part(
    tiny, publish, tmp_path, lay_out, cache, monkeypatch
):
    lay_out(tmp_path / "named/mnist", tiny | {FIRST: None})
    cached = lay_out(cache / "mnist", tiny)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "named"))
    assert {path.parent for path in obtain(publish(tiny)).values()} == {cached}


def test_local_files_need_not_have_the_published_checksum(tiny, publish, tmp_path, lay_out):
    published = publish(dict.fromkeys(tiny, b"other"))
    lay_out(tmp_path / "root/mnist", tiny)
    assert contents(obtain(published, tmp_path / "root")) == tiny


def test_missing_root_is_an_error_that_names_it(tiny, publish, tmp_path):
    with pytest.raises(DataNotFoundError, match=r"root is '.*nowhere'.*not an existing folder"):
        obtain(publish(tiny), tmp_path / "nowhere")


def test_missing_environment_folder_is_an_error_that_names_it(tiny, publish, tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(DataNotFoundError, match=r"\$BAYES_SVDO_DATA is '.*nowhere'"):
        obtain(publish(tiny))
