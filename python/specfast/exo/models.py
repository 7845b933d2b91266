"""Models where exo keeps them: exo's registry and downloads for target and draft, the hub for what exo does not know."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import hub
from ..errors import DownloadError, SpecfastError
from .contract import CLASS_NAME

ENGINE_CLASSES = {"mlx": "MLXDynamicShardInferenceEngine", "tinygrad": "TinygradDynamicShardInferenceEngine"}
NOT_TEXT = ("stable-diffusion", "llava")


def model_cards() -> dict[str, dict[str, Any]]:
    """exo's registry: by model id the number of layers and, by engine class, the repository."""
    cards: dict[str, dict[str, Any]] = importlib.import_module("exo.models").model_cards
    return cards


def register_models(engine: str | None) -> None:
    """Gives every text model of exo's registry the repository that the speculative engine reads.

    Args:
        engine: "mlx" or "tinygrad", whose checkpoints are taken where a model has both; None is "mlx".
    """
    for name, card in model_cards().items():
        repositories = card["repo"]
        if not name.startswith(NOT_TEXT) and (source := _source(repositories, engine)):
            repositories[CLASS_NAME] = repositories[source]


def _source(repositories: Mapping[str, str], engine: str | None) -> str | None:
    """The class of the engine whose checkpoints are taken: the one asked for, else mlx, else tinygrad."""
    first = ENGINE_CLASSES.get(engine or "mlx", ENGINE_CLASSES["mlx"])
    return next((name for name in (first, *ENGINE_CLASSES.values()) if name in repositories), None)


class ExoModels:
    """Finds a model's directory as `hub.resolve` does, in exo's downloads first.

    Called from the thread that loads models, never from exo's event loop.

    Args:
        downloader: exo's ShardDownloader.
        draft_engine: whose checkpoints drafts come from.
        loop: exo's event loop.
        targets: directories exo has delivered already, by model id.
    """

    def __init__(
        self, downloader: Any, draft_engine: str | None, loop: asyncio.AbstractEventLoop, targets: Mapping[str, Path]
    ) -> None:
        self._downloader, self._draft_engine, self._loop, self._targets = downloader, draft_engine, loop, targets

    def __call__(self, name: str, *, metadata_only: bool = False) -> Path:
        """The directory of a model.

        Raises:
            ModelFormatError: nothing of this name exists.
            DownloadError: neither exo nor the hub could deliver it.
        """
        if name in self._targets:
            return self._targets[name]
        card = model_cards().get(name)
        source = _source(card["repo"], self._draft_engine) if card else None
        if card is None and "/" in name and hub.repository(name) and is_complete(self._folder(name)):
            return self._folder(name)  # exo has it under a name of its own
        if card is None or source is None:
            return hub.resolve(name, metadata_only=metadata_only)
        repository = card["repo"][source]
        directory = self._folder(repository)
        if metadata_only:
            there = all((directory / file).is_file() for file in ("config.json", "tokenizer.json"))
            return directory if there else hub.resolve(repository, metadata_only=True)
        return directory if is_complete(directory) else self._download(name, card["layers"], source)

    def _folder(self, repository: str) -> Path:
        """Where exo downloads a repository to."""
        return Path(self._wait(_downloads())) / repository.replace("/", "--")

    def metadata(self, name: str, *, metadata_only: bool = True) -> Path:
        """The directory of a model that will not run: its weights are not fetched."""
        del metadata_only
        return self(name, metadata_only=True)

    def _download(self, name: str, layers: int, source: str) -> Path:
        shard = importlib.import_module("exo.inference.shard").Shard(name, 0, layers - 1, layers)
        try:
            return Path(self._wait(self._downloader.ensure_shard(shard, source)))
        except SpecfastError:
            raise
        except Exception as error:  # whatever exo's downloader raises
            raise DownloadError(
                f"exo could not download {name} ({type(error).__name__}: {error}); try again"
            ) from error

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


async def _downloads() -> Path:
    return Path(await importlib.import_module("exo.download.new_shard_download").ensure_downloads_dir())


def is_complete(directory: Path) -> bool:
    """Whether a download has everything a model needs; what is half there is left to exo to finish."""
    if not (directory / "config.json").is_file() or any(directory.glob("*.partial")):
        return False
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return (directory / "model.safetensors").is_file()
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(isinstance(file, str) and (directory / file).is_file() for file in files)
