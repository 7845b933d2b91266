"""From a model's name to a directory: a path, a short name of the registry, or a repository on the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import DownloadError, ModelFormatError
from .families import REPOSITORIES, repository_of
from .gguf_file import is_gguf

METADATA = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_GGUF = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(/(?P<file>.+\.gguf)|:(?P<tag>[\w.-]+))$")


def repository(name: str) -> str | None:
    """The repository a name stands for: itself, or the registry's; None for anything else."""
    if "/" in name:
        return name if _REPO_ID.match(name) else None
    return repository_of(name)


def resolve(name: str | Path, *, metadata_only: bool = False, also: Sequence[str] = ()) -> Path:
    """The local directory or GGUF file of a model, downloaded when it is not there yet.

    Args:
        name: a directory, a *.gguf file, a short name such as llama-3.2-1b, a repo id such as org/model, or a GGUF file of a
            repository, as org/model/file.gguf or by how its name ends, as org/model:Q4_K_M.
        metadata_only: fetch configuration and tokenizer but no weights, which are in one file for GGUF.
        also: patterns of further files to fetch, such as those of another loader's tokenizers.

    Raises:
        ModelFormatError: nothing of this name exists.
        DownloadError: the hub could not deliver; says why and what to do.
    """
    directory = Path(name).expanduser()
    if directory.is_dir() or (is_gguf(directory) and directory.is_file()):
        return directory
    gguf = _GGUF.match(str(name))
    if gguf:
        try:
            return _download_gguf(**gguf.groupdict())
        except DownloadError as error:
            raise DownloadError(f"no file {str(name)!r} is here, and on the hub: {error}") from None
    repo = repository(str(name))
    if repo is None or str(name).startswith((".", "/", "~")):
        raise ModelFormatError(
            f"no such model: {str(name)!r} is neither a directory, nor a *.gguf file, nor a repo id (org/name, for GGUF "
            "org/name/file.gguf or org/name:Q4_K_M), nor a known short name "
            f"({', '.join(sorted(REPOSITORIES)[:4])}, ...); `specfast suggest` lists families"
        )
    directory = _download(repo, (*METADATA, *also, *(() if metadata_only else WEIGHTS)))
    if not metadata_only and not any(directory.glob(WEIGHTS[0])):
        raise DownloadError(
            f"{repo}: no *.safetensors file arrived. Either it has none, but GGUF files: name one, as {repo}/file.gguf or "
            f"{repo}:Q4_K_M; or it has only pickled weights, which are refused: choose another version of the model; or an earlier "
            "download stopped: run the command again with the hub in reach"
        )
    return directory


def _download_gguf(repo: str, file: str | None, tag: str | None) -> Path:
    ends = {tag, tag.lower(), tag.upper()} if tag else ()
    patterns = [glob.escape(file)] if file else [f"*[-._]{end}.gguf" for end in sorted(ends)]
    directory = _download(repo, (*patterns, METADATA[1]), ignore=("mmproj*",))  # projectors of images are no models
    found = sorted(path for path in directory.rglob("*.gguf") if any(path.match(pattern) for pattern in patterns))
    if not found:
        raise DownloadError(
            f"{repo} has no GGUF file {file or f'whose name ends in -{tag}.gguf'}, or an earlier download stopped; look at its list "
            "of files, and name one as org/name/file.gguf"
        )
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(directory)) for path in found)
        raise DownloadError(f"{repo}:{tag} stands for {names}; name one, as {repo}/{found[0].relative_to(directory)}")
    return found[0]


def _download(repo: str, patterns: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, and local models never need it
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), ignore_patterns=list(ignore)))
    except GatedRepoError:
        raise DownloadError(
            f"{repo} is gated: accept its licence on the hub and log in with `hf auth login` or HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise DownloadError(
            f"{repo} is not on the hub, or is private: check the name, or log in with `hf auth login`"
        ) from None
    except Exception as error:  # transport errors belong to whichever HTTP library the hub's client uses
        status = _http_status(error)
        if status in (401, 403):
            raise DownloadError(
                f"{repo}: the hub refused access (status {status}); log in with `hf auth login` or HF_TOKEN"
            ) from None
        if status is not None:
            raise DownloadError(f"{repo}: the hub answered with status {status}; try again later") from None
        if isinstance(error, LocalEntryNotFoundError):
            raise DownloadError(
                f"{repo} is not in the local cache and the hub cannot be reached: check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
            ) from None
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DownloadError(
            f"{repo} could not be downloaded ({cause}); run the command again, it resumes where it stopped"
        ) from None


def _http_status(error: BaseException | None) -> int | None:
    """The HTTP status an error or one of its causes carries."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None
