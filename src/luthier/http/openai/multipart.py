"""A form with one file in it, read as it comes: the file's bytes go to a sink, the other fields are small.

Source: RFC 7578 (multipart/form-data), parsed by python-multipart's streaming parser. Nothing but the fields
is held in memory, at most `BATCH_BYTES` of the file wait for the sink, and the sink (which bounds and writes
them) runs in a thread; what is not the file's, such as lines before the first boundary or after the last, is
bounded too. A body that is compressed is refused, never unpacked. It does not know what the file
is for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from luthier.http.exchange import ClientGone, TooSlow
from luthier.http.problems import RequestError, TooLarge

STALL_S = 30.0
BATCH_BYTES = 1 << 20
FIELD_BYTES = 16 * 1024
FIELDS = 16
BESIDE_BYTES = 2 * FIELDS * FIELD_BYTES  # of a body, all that is not the file's


@dataclass
class Form:
    """What a form said beside its file. `filename` is None as long as no file came."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


class Compressed(RequestError):
    """The body would have to be unpacked before anyone knows how large it is."""

    http_code = 415


class _Reader:
    """The parser's callbacks: where a byte belongs is decided by the name of its part."""

    def __init__(self, boundary: bytes, file_field: str) -> None:
        self.form = Form()
        self.ended = False
        self.waiting = bytearray()  # of the file, for the sink
        self.beside = 0  # bytes that are not the file's
        self._file_field = file_field
        self._headers: dict[bytes, bytes] = {}
        self._name = b""
        self._value = b""
        self._part = ""
        self._text = bytearray()
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headed,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._finished,
            },
        )

    def _begin(self) -> None:
        self._headers, self._name, self._value, self._part = {}, b"", b"", ""
        self._text = bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _headed(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._part = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not self._part:
            raise RequestError("each part of the form needs a name")
        if self._headers.get(b"content-transfer-encoding", b"binary").lower() not in (
            b"binary",
            b"8bit",
            b"7bit",
        ):
            raise RequestError("send the file's bytes as they are, without a transfer encoding")
        known = self.form.filename is not None if self._is_file() else self._part in self.form.fields
        if known:
            raise RequestError(f"`{self._part[:64]}` stands twice in the form", param=self._part[:64])
        if self._is_file():
            self.form.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        elif len(self.form.fields) >= FIELDS:
            raise RequestError("the form has too many fields")

    def _is_file(self) -> bool:
        return self._part == self._file_field

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file():
            self.waiting += data[start:end]
            self.beside -= end - start
            return
        self._text += data[start:end]
        if len(self._text) > FIELD_BYTES:
            raise RequestError(f"`{self._part[:64]}` is too long", param=self._part[:64])

    def _end(self) -> None:
        if not self._is_file():
            try:
                self.form.fields[self._part] = self._text.decode("utf-8")
            except UnicodeDecodeError:
                raise RequestError(f"`{self._part[:64]}` is not UTF-8", param=self._part[:64]) from None

    def _finished(self) -> None:
        self.ended = True


async def read(request: Request, file_field: str, sink: Callable[[bytes], None]) -> Form:
    """Read the whole form; each batch of the file's bytes is given to `sink` in a thread."""
    reader = _Reader(_boundary(request), file_field)
    try:
        stream = request.stream().__aiter__()
        while True:
            async with asyncio.timeout(STALL_S):
                chunk = await anext(stream, None)
            if chunk is None:
                break
            reader.beside += len(chunk)
            reader.parser.write(chunk)
            if reader.beside > BESIDE_BYTES:
                raise TooLarge("the form is larger than its file and fields", code="form_too_large")
            if len(reader.waiting) >= BATCH_BYTES:
                await _give(reader, sink)
    except TimeoutError:
        raise TooSlow(f"nothing of the body came for {STALL_S:g} s") from None
    except ClientDisconnect:
        raise ClientGone("the client left before its file was read") from None
    except FormParserError as error:
        raise RequestError(f"the form cannot be read: {str(error)[:200]}") from None
    await _give(reader, sink)
    if not reader.ended:
        raise RequestError("the form ends before its last boundary")
    if reader.form.filename is None:
        raise RequestError(f"`{file_field}` is missing", param=file_field)
    return reader.form


async def _give(reader: _Reader, sink: Callable[[bytes], None]) -> None:
    batch, reader.waiting = bytes(reader.waiting), bytearray()
    if batch:
        await run_in_threadpool(sink, batch)


def _boundary(request: Request) -> bytes:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Compressed("a compressed body is not taken; send it as it is", code="content_encoding")
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise RequestError("send the file as multipart/form-data")
    return boundary
