"""Uploaded files: whole or not at all, a tenant's own, bounded, and gone when they are deleted."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, update

from luthier import uploads
from luthier.home import Home
from luthier.incoming import DiskFull, UploadRefused
from luthier.schema.jobs import JOBS
from luthier.schema.uploads import UPLOADS
from luthier.store import Store
from luthier.uploads import Label, Limits, NoUpload, Uploads, labelled
from tests.faults.small_disk import mounted

DATA = b'{"messages": []}\n'
LABEL = Label("train.jsonl", "fine-tune")


def opened(folder: Path, **limits: int) -> Uploads:
    home = Home.at(folder / "home")
    return Uploads(Store.open(home.path), home, Limits(**limits))


def put(files: Uploads, data: bytes = DATA, tenant: str = "a", label: Label = LABEL) -> uploads.Upload:
    return files.put(tenant, label, io.BytesIO(data))


def names(files: Uploads) -> list[str]:
    return sorted(path.name for path in files.folder.iterdir())


def test_a_file_comes_back_byte_for_byte_with_its_digest(tmp_path: Path) -> None:
    import hashlib

    files = opened(tmp_path)
    data = os.urandom(3_000_000)
    upload = put(files, data)
    assert (upload.bytes, upload.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert files.open(upload).read() == data
    assert files.get("a", upload.id) == files.get(None, upload.id) == upload
    assert uploads.ID.fullmatch(upload.id) and names(files) == [upload.id]
    assert files.path(upload).stat().st_mode & 0o077 == 0


def test_another_tenants_file_and_one_that_never_was_are_the_same_refusal(tmp_path: Path) -> None:
    files = opened(tmp_path)
    upload = put(files)
    never = "file-" + "0" * 24
    for act in (files.get, files.delete):
        with pytest.raises(NoUpload) as foreign:
            act("b", upload.id)
        with pytest.raises(NoUpload) as unknown:
            act("b", never)
        assert str(foreign.value).replace(upload.id, never) == str(unknown.value)
    with pytest.raises(NoUpload):
        files.list("b", after=upload.id)
    assert files.list("b") == ([], False)
    assert files.get("a", upload.id) == upload


def test_lists_are_paged_in_either_order_and_by_purpose(tmp_path: Path) -> None:
    files = opened(tmp_path)
    ids = [put(files, label=Label(f"{n}", "batch" if n == 3 else "fine-tune")).id for n in range(6)]
    seen: list[str] = []
    after: str | None = None
    while True:
        page, more = files.list("a", after=after, limit=4)
        seen += [upload.id for upload in page]
        if not more:
            break
        after = seen[-1]
        if len(seen) == 4:
            files.delete("a", after)  # a cursor outlives its file
    assert seen == ids[::-1]
    assert [upload.id for upload in files.list("a", order="asc", limit=2)[0]] == ids[:2]
    assert [upload.id for upload in files.list("a", purpose="batch")[0]] == [ids[3]]


def test_a_deleted_file_leaves_its_row_and_no_bytes_and_a_reader_reads_on(tmp_path: Path) -> None:
    files = opened(tmp_path)
    upload = put(files)
    reader = files.open(upload)
    files.delete("a", upload.id)
    assert reader.read() == DATA and names(files) == []
    with pytest.raises(NoUpload):
        files.get("a", upload.id)
    with pytest.raises(NoUpload):
        files.open(upload)
    with pytest.raises(NoUpload):
        files.delete("a", upload.id)


def test_a_file_goes_when_its_time_is_over(tmp_path: Path) -> None:
    files = opened(tmp_path)
    upload = put(files, label=Label("x", "fine-tune", keep_s=3600))
    assert upload.expires_at == upload.created_at + 3600
    assert put(files, label=Label("x", "batch")).expires_at  # OpenAI's default: 30 days
    with files._store.writing() as connection:
        connection.execute(
            update(UPLOADS).where(UPLOADS.c.id == upload.id).values(expires_at=int(time.time()))
        )
    with pytest.raises(NoUpload):
        files.get("a", upload.id)
    files.sweep()
    assert upload.id not in names(files) and len(names(files)) == 1


def test_a_file_too_large_for_its_bound_or_its_tenants_room_leaves_nothing(tmp_path: Path) -> None:
    files = opened(tmp_path, file_bytes=1000, tenant_bytes=1500, tenant_files=3)
    with pytest.raises(UploadRefused) as large:
        put(files, bytes(1001))
    assert (large.value.http_code, large.value.code) == (413, "file_too_large")
    put(files, bytes(1000))
    with pytest.raises(UploadRefused):
        put(files, bytes(501))
    put(files, bytes(500))
    with pytest.raises(UploadRefused, match="1500 of 1500 bytes") as full:
        put(files, b"x")
    assert full.value.code == "storage_quota_exceeded"
    put(files, bytes(1000), tenant="b")
    assert len(names(files)) == 3
    for upload in files.list("a")[0]:
        files.delete("a", upload.id)
    for _ in range(3):
        put(files)
    with pytest.raises(UploadRefused, match="3 of 3"):
        put(files)


def test_two_files_at_once_cannot_both_take_the_last_room(tmp_path: Path) -> None:
    files = opened(tmp_path, tenant_bytes=1500)
    with files.incoming("a") as one, files.incoming("a") as two:
        one.write(bytes(1000))
        two.write(bytes(1000))
        files.keep("a", LABEL, one)
        with pytest.raises(UploadRefused):
            files.keep("a", LABEL, two)
    assert len(names(files)) == 1


def test_only_so_many_files_come_at_once(tmp_path: Path) -> None:
    files = opened(tmp_path, incoming=1)
    with files.incoming("a"), files.incoming("b"):
        with pytest.raises(UploadRefused) as busy, files.incoming("a"):
            pass
        assert busy.value.http_code == 429
    put(files)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("train.jsonl", "train.jsonl"), ("../../etc/passwd", "passwd"), ("C:\\x\\y.jsonl", "y.jsonl"),
        ("a\0b\n\x1b[31mc", "ab[31mc"), ("", "file"), ("..", "file"), ("x" * 999, "x" * 255), ("/", "file"),
        ("\u202egpj.exe", "gpj.exe"), ("\ud800.jsonl", "?.jsonl"),
    ],
)  # fmt: skip
def test_a_file_name_is_a_harmless_label(given: str, kept: str) -> None:
    assert labelled(Label(given, "fine-tune")).filename == kept


@given(st.text())
def test_no_file_name_breaks_its_label(name: str) -> None:
    kept = labelled(Label(name, "batch")).filename
    assert 0 < len(kept) <= 255 and kept.isprintable() and not set("/\\") & set(kept)


@pytest.mark.parametrize("purpose", ["assistants", "vision", "", "fine-tune\0"])
def test_other_purposes_are_refused_by_name(purpose: str) -> None:
    with pytest.raises(UploadRefused, match="is not one of: fine-tune, fine-tune-results, batch"):
        labelled(Label("x", purpose))


@pytest.mark.parametrize("keep_s", [0, 3599, 2_592_001])
def test_a_file_is_kept_between_an_hour_and_thirty_days(keep_s: int) -> None:
    with pytest.raises(UploadRefused, match="between 3600 and 2592000"):
        labelled(Label("x", "batch", keep_s))


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    store = Store.open(home.path)
    with mounted(home.path / "uploads", 512):
        files = Uploads(store, home)
        with pytest.raises(DiskFull) as full:
            put(files, bytes(1 << 20))
        assert full.value.http_code == 507
        assert names(files) == [] and files.list("a") == ([], False)
        put(files)


VICTIM = """
import os, signal, sys
from pathlib import Path
from luthier import uploads
from luthier.home import Home
from luthier.store import Store
home = Home(Path(sys.argv[1]))
files = uploads.Uploads(Store.open(home.path), home)
with files.incoming("a") as file:
    file.write(b"half")
    if sys.argv[2] == "settled":
        file.settle(files.folder / ("file-" + "1" * 24))
    print("now", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("when", ["writing", "settled"])
def test_what_a_killed_upload_leaves_is_swept_but_not_while_it_is_written(tmp_path: Path, when: str) -> None:
    files = opened(tmp_path)
    kept = put(files)
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(tmp_path / "home"), when],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert victim.stdout is not None and victim.stdout.readline() == "now\n"
    assert len(names(files)) == 2 and files.sweep() == 0
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert len(names(files)) == 2 and files.list("a")[0] == [kept]
    (files.folder / "notes.txt").write_text("not ours")
    assert files.sweep() == 1
    assert names(files) == sorted([kept.id, "notes.txt"])
    assert json.loads(files.open(kept).read()) == {"messages": []}


def test_a_file_that_an_unfinished_job_reads_is_kept(tmp_path: Path) -> None:
    files = opened(tmp_path)
    upload = put(files)
    job = {column.name: 0 for column in JOBS.c if column.name != "seq"} | {
        "id": "ftjob-1", "tenant": "a", "base": "tiny", "model": "ft:tiny:a::1", "asked": "{}",
        "section": "{}", "status": "queued", "training_file": "file-x", "training_sha256": "",
        "validation_file": upload.id,
    }  # fmt: skip
    with files._store.writing() as connection:
        connection.execute(insert(JOBS), job)
    with pytest.raises(UploadRefused, match="read by job ftjob-1") as held:
        files.delete("a", upload.id)
    assert held.value.code == "file_in_use" and files.open(upload).read() == DATA
    with files._store.writing() as connection:
        connection.execute(update(JOBS).values(status="succeeded"))
    files.delete("a", upload.id)
