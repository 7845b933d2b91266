"""Model files as read-only memory maps, and whether they are still what was mapped."""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelFormatError


@dataclass(frozen=True)
class MappedFile:
    """A file as it was when it was mapped: what is read through the mapping is whatever the file holds by then."""

    path: Path
    device: int
    inode: int
    size: int
    mtime_ns: int

    def require_unchanged(self) -> None:
        """Compares the file with what was mapped. A file replaced by rename, or removed, is no change: the mapping
        holds the old one.

        Raises:
            ModelFormatError: it was written in place. Pages that it lost would end the process when read (SIGBUS).
        """
        try:
            now = self.path.stat()
        except OSError:
            return
        if (now.st_dev, now.st_ino) != (self.device, self.inode):
            return
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ModelFormatError(
                f"{self.path}: was changed in place while a model runs from it ({self.size} bytes when loaded, "
                f"{now.st_size} now); load the model again, and replace files by renaming new ones over them"
            )


def map_file(path: Path) -> tuple[MappedFile, mmap.mmap]:
    """Maps a file; its bytes stay mapped for as long as a view of them lives.

    Raises:
        ModelFormatError: the file is empty or cannot be read, or is a pipe or the like, which would be waited for.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise ModelFormatError(f"{path}: cannot be read (no regular file); save what it gives in a file first")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise damaged(path, "the file is empty")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelFormatError(f"{path}: cannot be read ({why}); check the path and its permissions") from None
    mapped = MappedFile(path.absolute(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return mapped, mapping


def damaged(path: Path, what: str) -> ModelFormatError:
    """The error for a file whose bytes do not fit together."""
    return ModelFormatError(f"{path}: {what}. The file is damaged or incomplete; download or convert it again.")
