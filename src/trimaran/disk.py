"""What has to reach the disk before anything relies on it."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Asks the disk to keep a file or folder now, so that a rename after it cannot outrun the content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
