"""From a model's name to a directory: a path, a short name of the registry, or a repository on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .errors import DownloadError, ModelFormatError
from .families import REPOSITORIES, repository_of
from .gguf_file import is_gguf

METADATA = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def repository(name: str) -> str | None:
    """The repository a name stands for: itself, or the registry's; None for anything else."""
    if "/" in name:
        return name if _REPO_ID.match(name) else None
    return repository_of(name)


def resolve(name: str | Path, *, metadata_only: bool = False, also: Sequence[str] = ()) -> Path:
    """The local directory or GGUF file of a model, downloaded when it is not there yet.

    Args:
        name: a directory, a *.gguf file, a short name such as llama-3.2-1b, or a repo id such as org/model.
        metadata_only: fetch configuration and tokenizer but no weights.
        also: patterns of further files to fetch, such as those of another loader's tokenizers.

    Raises:
        ModelFormatError: nothing of this name exists.
        DownloadError: the hub could not deliver; says why and what to do.
    """
    directory = Path(name).expanduser()
    if directory.is_dir() or (is_gguf(directory) and directory.is_file()):
        return directory
    repo = repository(str(name))
    if repo is None or str(name).startswith((".", "/", "~")):
        raise ModelFormatError(
            f"no such model: {str(name)!r} is neither a directory, nor a *.gguf file, nor a repo id (org/name), nor a known short name "
            f"({', '.join(sorted(REPOSITORIES)[:4])}, ...); `specfast suggest` lists families"
        )
    return _download(repo, (*METADATA, *also, *(() if metadata_only else WEIGHTS)))


def _download(repo: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, and local models never need it
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        directory = Path(snapshot_download(repo, allow_patterns=list(patterns)))
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
    if WEIGHTS[0] in patterns and not any(directory.glob(WEIGHTS[0])):
        raise DownloadError(
            f"{repo}: no *.safetensors file arrived. Either it has only pickled weights, which are refused: choose another "
            "version of the model; or an earlier download stopped: run the command again with the hub in reach"
        )
    return directory


def _http_status(error: BaseException | None) -> int | None:
    """The HTTP status an error or one of its causes carries."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None
