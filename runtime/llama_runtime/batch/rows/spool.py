"""Rows from a stream, kept in a file, so that the job can go on when the stream is gone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from llama_runtime.batch.rows.source import Source
from llama_runtime.errors import CaravanError, RequestError

_READ_BYTES = 2**20


class Spool:
    """Copies a stream.

    Args:
        source: the stream.
        path: where the copy goes.

    Attributes:
        num_bytes: how many have been read.
    """

    def __init__(self, source: Source, path: Path) -> None:
        self._source = source
        self._path = path
        self.num_bytes = 0

    def copied(self, stream: BinaryIO, *, anew: bool) -> Source:
        """Read the stream to its end.

        Args:
            stream: open for reading bytes.
            anew: whether to replace a copy that is there. Otherwise the stream must be that copy
                again, or empty.

        Returns:
            The copy.

        Raises:
            RequestError: the stream differs from the copy.
            CaravanError: it can't be read, or the copy can't be written.
        """
        kept = Source(self._path, name=str(self._source))
        part = self._path.with_suffix(".part")
        digest = hashlib.sha256()
        resumed = self._path.exists() and not anew
        try:
            with open(os.devnull if resumed else part, "wb") as file:
                while data := stream.read(_READ_BYTES):
                    self.num_bytes += len(data)
                    digest.update(data)
                    file.write(data)
                file.flush()
                if not resumed:
                    os.fsync(file.fileno())
                    os.replace(part, self._path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise CaravanError(f"{self._source} can't be kept: {error.strerror}") from error
        if resumed and self.num_bytes and digest.hexdigest() != kept.fingerprint()["sha256"]:
            raise RequestError(
                f"{self._source} holds other rows than those that the job was begun with: give the "
                "same ones or none, or --force to begin anew",
                param="file",
            )
        return kept
