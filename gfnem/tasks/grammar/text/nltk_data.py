"""Corpora that NLTK distributes.

NLTK only says where to look: its own readers refuse files that other accounts may write.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gfnem.errors import UserError
from gfnem.files import user_path


def find_corpus(name: str, what: str, dir: str | None = None) -> Path | zipfile.Path:
    """Find the folder of a corpus, which may be within its archive.

    name: NLTK's, such as treebank.
    what: the corpus is, for messages.
    dir: folder of NLTK's data. None looks in NLTK's search path, to which NLTK_DATA belongs, and
        then tries to download the corpus.

    Raises UserError where it is neither found nor downloaded, or damaged.
    """
    import nltk

    roots = [str(root) for root in nltk.data.path] if dir is None else [str(user_path(dir))]
    found = _below(roots, name)
    if found is None and dir is None:
        _download(name)
        found = _below(roots, name)
    if found is None:
        failed = " and cannot be downloaded" if dir is None else ""
        raise UserError(
            f"{what}, corpora/{name}.zip, is not in {', '.join(roots)}{failed}: "
            f"get it with `python -m nltk.downloader {name}` and set dir or NLTK_DATA to the "
            f"folder that it prints"
        )
    return found


def _below(roots: Iterable[str], name: str) -> Path | zipfile.Path | None:
    for root in roots:
        folder = Path(root, "corpora", name)
        if os.path.isdir(folder):
            return folder
        archive = Path(root, "corpora", f"{name}.zip")
        if os.path.isfile(archive):
            try:
                return zipfile.Path(archive, f"{name}/")
            except zipfile.BadZipFile:
                raise UserError(f"{archive} is damaged: delete it and get it again") from None
    return None


def _download(name: str) -> None:
    """Try to; without a network nothing happens."""
    import nltk

    with warnings.catch_warnings(), suppress(OSError, ValueError):
        warnings.simplefilter("ignore")
        nltk.download(name, quiet=True, print_error_to=io.StringIO())
