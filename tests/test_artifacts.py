"""Artefacts: equal content has one name, and no change to a sealed folder goes unseen or unnamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import artifacts
from luthier.errors import StoreError

NAMES = st.text("abcXYZ019-_.é🎻 ", min_size=1, max_size=8).filter(lambda name: name.strip(".") != "")
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
# Hundreds of fsyncs; a disk would be slow.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
CONTENT = st.binary(max_size=64)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcé", max_size=3), inner, max_size=4)
    ),
    max_leaves=10,
)  # fmt: skip


def _is_tree(files: dict[str, bytes]) -> bool:
    """No path may be both a file and a folder, and the manifest's own name is taken."""
    folders = {"/".join(path.split("/")[:n]) for path in files for n in range(1, path.count("/") + 1)}
    return not folders & files.keys() and "manifest.json" not in files.keys() | folders


TREES = st.dictionaries(PATHS, CONTENT, min_size=1, max_size=5).filter(_is_tree)


@contextmanager
def sealed(files: dict[str, bytes], name: str = "out") -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as parent:
        folder = Path(parent) / name
        lay(folder, files)
        artifacts.seal(folder)
        yield folder


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


# ---- canonical JSON and keys -----------------------------------------------------------------------------


@given(JSON)
def test_canonical_json_is_a_fixed_point(value: object) -> None:
    data = artifacts.canonical(value)
    assert artifacts.canonical(json.loads(data)) == data


@given(st.dictionaries(st.text("abcé", max_size=3), JSON, max_size=5), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, object], random: object) -> None:
    items = list(value.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    assert artifacts.digest_of(dict(items)) == artifacts.digest_of(value)


@pytest.mark.parametrize(
    "bad", [float("nan"), [float("inf")], {"a": object()}, {"a": "\ud800"}, {1: "a", "b": 2}, b"x"]
)
def test_what_has_no_canonical_json_is_refused(bad: object) -> None:
    with pytest.raises(StoreError, match="no canonical JSON"):
        artifacts.canonical(bad)


def test_the_digest_of_a_known_value_never_changes() -> None:
    """Homes in the field depend on it: if this fails, every artefact ever made is unreachable."""
    assert artifacts.canonical({"b": [1, 1.5, None], "a": "é"}) == '{"a":"é","b":[1,1.5,null]}'.encode()
    assert artifacts.digest_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


ASKED = {"stage": "data", "section": {"x": 1}, "versions": {"data": 1}, "inputs": {"rows": "a"}, "seed": 17}
OTHER = {"stage": "model", "section": {"x": 2}, "versions": {"data": 2}, "inputs": {"rows": "b"}, "seed": 18}


@pytest.mark.parametrize("part", sorted(ASKED))
def test_a_stage_key_depends_on_everything_that_was_asked(part: str) -> None:
    key = artifacts.stage_key(**ASKED)  # type: ignore[arg-type]
    assert key == artifacts.stage_key(**dict(reversed(ASKED.items())))  # type: ignore[arg-type]
    assert key != artifacts.stage_key(**{**ASKED, part: OTHER[part]})  # type: ignore[arg-type]


# ---- files -------------------------------------------------------------------------------------------------


@given(JSON)
@settings(max_examples=30, deadline=None)
def test_json_comes_back_as_it_went_in(value: object) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        artifacts.write_json(Path(folder) / "a.json", value)
        artifacts.write_jsonl(Path(folder) / "a.jsonl", iter([value, value]))
        assert artifacts.read_json(Path(folder) / "a.json") == value
        assert artifacts.read_jsonl(Path(folder) / "a.jsonl") == [value, value]
        assert sorted(os.listdir(folder)) == ["a.json", "a.jsonl"]


def test_a_line_separator_inside_a_value_does_not_tear_a_row(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u0085c\r\nd"}]
    artifacts.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert artifacts.read_jsonl(tmp_path / "rows.jsonl") == rows


def test_a_damaged_file_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a":1}\n{"a":\n')
    with pytest.raises(StoreError, match=r"rows\.jsonl:2: .*not valid JSON"):
        artifacts.read_jsonl(tmp_path / "rows.jsonl")
    (tmp_path / "a.json").write_bytes(b"\xff")
    with pytest.raises(StoreError, match=r"a\.json: "):
        artifacts.read_json(tmp_path / "a.json")
    with pytest.raises(StoreError, match=r"none\.json: cannot read it: No such file"):
        artifacts.read_json(tmp_path / "none.json")


def test_a_failing_row_leaves_the_old_file_and_no_temp(tmp_path: Path) -> None:
    artifacts.write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    with pytest.raises(StoreError):
        artifacts.write_jsonl(tmp_path / "rows.jsonl", iter([{"a": 2}, {"a": float("nan")}]))
    assert artifacts.read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}] and os.listdir(tmp_path) == [
        "rows.jsonl"
    ]


# ---- seal and verify ---------------------------------------------------------------------------------------


@given(TREES)
@settings(max_examples=40, deadline=None)
def test_a_sealed_folder_verifies_and_sealing_again_changes_nothing(files: dict[str, bytes]) -> None:
    with sealed(files) as folder:
        digest, manifest = artifacts.verify(folder), (folder / "manifest.json").read_bytes()
        assert artifacts.verify(folder, deep=False) == digest == artifacts.seal(folder)
        assert (folder / "manifest.json").read_bytes() == manifest


@given(TREES, NAMES)
@settings(max_examples=30, deadline=None)
def test_the_digest_knows_neither_folder_name_nor_time_nor_what_was_observed(
    files: dict[str, bytes], name: str
) -> None:
    files = {path: content for path, content in files.items() if not path.startswith("observed/")}
    observed = {"observed/host.json": b"{}", "observed/deep/t.jsonl": b"1\n"}
    with sealed(files) as plain, sealed(files | observed, name) as other:
        for path in files:
            os.utime(other / path, (1, 1))
        (other / "empty").mkdir()
        assert artifacts.seal(other) == artifacts.verify(plain)


@given(TREES, TREES)
@settings(max_examples=40, deadline=None)
def test_folders_that_differ_have_different_digests(one: dict[str, bytes], two: dict[str, bytes]) -> None:
    def named(files: dict[str, bytes]) -> dict[str, bytes]:
        return {path: content for path, content in files.items() if not path.startswith("observed/")}

    with sealed(one) as first, sealed(two) as second:
        assert (artifacts.verify(first) == artifacts.verify(second)) == (named(one) == named(two))


@given(TREES, st.data())
@settings(max_examples=60, deadline=None)
def test_any_flipped_byte_is_detected_and_its_file_named(
    files: dict[str, bytes], data: st.DataObject
) -> None:
    files = {**files, "observed/host.json": b'{"cores": 2}'}
    with sealed(files) as folder:
        full = sorted(path for path, content in files.items() if content)
        path = data.draw(st.sampled_from([*full, "manifest.json"]))
        content = bytearray((folder / path).read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        (folder / path).write_bytes(content)
        with pytest.raises(StoreError) as caught:
            artifacts.verify(folder)
        # A flip inside the manifest may put the blame on the file whose entry it changed: still an alarm.
        assert path in str(caught.value) or path == "manifest.json"


@given(TREES, st.data())
@settings(max_examples=60, deadline=None)
def test_truncated_removed_added_and_renamed_files_are_detected_and_named(
    files: dict[str, bytes], data: st.DataObject
) -> None:
    with sealed({**files, "whole": b"not empty"}) as folder:
        path = data.draw(st.sampled_from(sorted([*(p for p in files if files[p]), "whole"])))
        victim, harm = folder / path, data.draw(st.sampled_from(["truncate", "remove", "add", "rename"]))
        named = [path]
        if harm == "truncate":
            os.truncate(victim, data.draw(st.integers(0, victim.stat().st_size - 1)))
        elif harm == "remove":
            victim.unlink()
        elif harm == "add":
            named = [f"{path}.extra"]
            (folder / named[0]).write_bytes(b"")
        else:
            named.append(f"{path}.moved")
            victim.rename(folder / named[1])
        for deep in (True, False):
            with pytest.raises(StoreError) as caught:
                artifacts.verify(folder, deep=deep)
            assert all(name in str(caught.value) for name in named)


def test_a_folder_that_was_never_sealed_or_lost_its_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="never sealed"):
        artifacts.verify(lay(tmp_path / "out", {"a": b"1"}))
    with pytest.raises(StoreError, match="never sealed"):
        artifacts.verify(tmp_path / "none")
    with pytest.raises(StoreError):
        artifacts.seal(tmp_path / "none")


@pytest.mark.parametrize(
    "manifest",
    [b"", b"[]", b"null", b"{}", b'{"luthier":1}', b'{"luthier":1,"files":{},"observed":{},"digest":NaN}',
     b'{"luthier":1,"files":{"a":1},"observed":{},"digest":"x"}', b'{"luthier":2,"files":{}}', b"\xff"],
)  # fmt: skip
def test_a_nonsense_manifest_is_refused_by_name(tmp_path: Path, manifest: bytes) -> None:
    lay(tmp_path, {"a": b"1", "manifest.json": manifest})
    with pytest.raises(StoreError, match=r"manifest\.json"):
        artifacts.verify(tmp_path)


def test_links_and_pipes_have_no_place_in_an_artefact(tmp_path: Path) -> None:
    plants: tuple[Callable[[Path], None], ...] = (
        lambda path: path.symlink_to("/etc/passwd"),
        lambda path: path.symlink_to("/etc"),
        os.mkfifo,
    )
    for n, plant in enumerate(plants):
        folder = lay(tmp_path / f"out{n}", {"a": b"1"})
        plant(folder / "odd")
        with pytest.raises(StoreError, match=r"odd: a .* has no place in an artefact"):
            artifacts.seal(folder)
        assert not (folder / "manifest.json").exists()
        with pytest.raises(StoreError):
            artifacts.link_tree(folder, tmp_path / "copy")


def test_a_link_planted_after_sealing_is_refused_even_if_its_content_agrees(tmp_path: Path) -> None:
    folder = lay(tmp_path / "out", {"a": b"1"})
    artifacts.seal(folder)
    shutil.move(folder / "a", tmp_path / "elsewhere")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        artifacts.verify(folder)


# ---- publish and link_tree ---------------------------------------------------------------------------------


def test_publishing_moves_the_folder_and_publishing_its_twin_drops_the_twin(tmp_path: Path) -> None:
    one, two = (lay(tmp_path / name, {"a": b"1", f"observed/{name}": b""}) for name in ("one", "two"))
    digest = artifacts.seal(one)
    assert artifacts.seal(two) == digest
    target = tmp_path / "artifacts" / digest
    artifacts.publish(one, target)
    artifacts.publish(two, target)
    assert not one.exists() and not two.exists()
    assert artifacts.verify(target) == digest and (target / "observed/one").exists()


def test_publishing_over_other_content_is_refused(tmp_path: Path) -> None:
    one, two = lay(tmp_path / "one", {"a": b"1"}), lay(tmp_path / "two", {"a": b"2"})
    artifacts.seal(one), artifacts.seal(two)
    artifacts.publish(one, tmp_path / "target")
    with pytest.raises(StoreError, match="another artefact is already here"):
        artifacts.publish(two, tmp_path / "target")
    assert (tmp_path / "target/a").read_bytes() == b"1" and (two / "a").exists()


def test_publishing_over_a_damaged_artefact_sets_the_damage_aside(tmp_path: Path) -> None:
    one, two = lay(tmp_path / "one", {"a": b"1"}), lay(tmp_path / "two", {"a": b"1"})
    digest = artifacts.seal(one)
    artifacts.seal(two)
    artifacts.publish(one, tmp_path / "target")
    (tmp_path / "target/a").write_bytes(b"0")
    artifacts.publish(two, tmp_path / "target")
    assert artifacts.verify(tmp_path / "target") == digest
    assert [path.name[:15] for path in tmp_path.glob("target.*")] == ["target.damaged-"]


def test_an_unsealed_folder_cannot_be_published(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="never sealed"):
        artifacts.publish(lay(tmp_path / "out", {"a": b"1"}), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_eight_threads_publish_one_artefact_and_all_are_content(tmp_path: Path) -> None:
    folders = [lay(tmp_path / f"w{n}", {"a": b"1" * 1000, "b/c": b"2"}) for n in range(8)]
    digest = {artifacts.seal(folder) for folder in folders}.pop()
    target, gate, errors = tmp_path / "artifacts" / digest, threading.Barrier(8), []

    def put(folder: Path) -> None:
        gate.wait()
        try:
            artifacts.publish(folder, target)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=put, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and artifacts.verify(target) == digest
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts"] and len(
        list(target.parent.iterdir())
    ) == 1


def test_link_tree_shares_the_bytes_and_can_be_run_again(tmp_path: Path) -> None:
    source = lay(tmp_path / "src", {"a": b"1", "deep/er/b": b"2"})
    for _ in range(2):
        artifacts.link_tree(source, tmp_path / "dst/base")
    assert (tmp_path / "dst/base/deep/er/b").samefile(source / "deep/er/b")
    artifacts.write_bytes(tmp_path / "dst/base/a", b"new")
    assert (source / "a").read_bytes() == b"1", "replacing a linked file leaves the other name alone"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system to copy to")
def test_link_tree_copies_where_it_cannot_link(tmp_path: Path) -> None:
    source = lay(tmp_path / "src", {"a": b"1", "deep/b": b"2"})
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        artifacts.link_tree(source, Path(other) / "dst")
        assert (Path(other) / "dst/deep/b").read_bytes() == b"2"
        artifacts.seal(source)
        with pytest.raises(StoreError, match="one file system"):
            artifacts.publish(source, Path(other) / "target")
        assert artifacts.verify(source)
