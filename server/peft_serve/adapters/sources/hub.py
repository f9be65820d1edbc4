"""Repositories of the Hugging Face hub, through the library's own client.

The token is the server's (`HF_TOKEN`, or what `hf auth login` left), the address `HF_ENDPOINT`, and files land in the
hub's cache, where `HF_HUB_OFFLINE` finds them again. A revision becomes its commit before anything is read, so that
all files are of one commit and the record says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from peft_serve.adapters.members import WANTED
from peft_serve.adapters.sources.folder import Mark
from peft_serve.adapters.sources.locator import Locator
from peft_serve.errors import FetchFailed, Forbidden, NotFound, PayloadTooLarge, ServeError

_LOOK_S: Final = 20.0
_DEFAULT_BRANCH: Final = "main"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoState:
    """A repository at one commit: its files by their whole path."""

    commit: str
    files: Mapping[str, Mark]


class Hub(Protocol):
    """What is asked of the hub. Methods block and raise what huggingface_hub and its HTTP library raise."""

    def look(self, repo: str, revision: str | None, paths: Iterable[str]) -> RepoState:
        """The commit of a revision and its files; where there is no network, those of `paths` in the cache."""
        ...

    def download(
        self, repo: str, revision: str | None, commit: str, path: str, on_bytes: Callable[[int], None]
    ) -> Path:
        """Where a file of a commit, which the revision was just now, lies on this machine."""
        ...


class HuggingFaceHub:
    """The hub as huggingface_hub knows it."""

    def look(self, repo: str, revision: str | None, paths: Iterable[str]) -> RepoState:
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_LOOK_S)
        except OfflineModeIsEnabled:
            return _look_in_cache(repo, revision, paths)
        commit = info.sha or ""
        marks = {each.rfilename: Mark(each.size or 0, each.blob_id or "") for each in info.siblings or ()}
        return RepoState(commit=commit, files=marks)

    def download(
        self, repo: str, revision: str | None, commit: str, path: str, on_bytes: Callable[[int], None]
    ) -> Path:
        told = _told(on_bytes)
        # By its own name first: the cache then remembers what the name meant, for when there is no network.
        place = Path(hf_hub_download(repo, path, revision=revision or _DEFAULT_BRANCH, tqdm_class=told))
        if commit in place.parts:
            return place
        return Path(hf_hub_download(repo, path, revision=commit, tqdm_class=told))


def _look_in_cache(repo: str, revision: str | None, paths: Iterable[str]) -> RepoState:
    """The files that were downloaded before, of the commit that the revision was then."""
    found = {path: try_to_load_from_cache(repo, path, revision=revision or _DEFAULT_BRANCH) for path in paths}
    places = {path: Path(place) for path, place in found.items() if isinstance(place, str)}
    if not places:
        raise LocalEntryNotFoundError("nothing of it is in the cache")
    path, place = next(iter(places.items()))
    commit = place.parents[path.count("/")].name
    return RepoState(commit=commit, files={path: Mark(place.stat().st_size, commit) for path, place in places.items()})


def _told(on_bytes: Callable[[int], None]) -> type[Any]:
    """A progress bar that shows nothing and tells `on_bytes`, made for the one download that it is given to."""

    class Told(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            on_bytes(max(0, int(n or 0)))
            return None

    return Told


class HubFolder:
    """The folder of a locator in its repository."""

    def __init__(self, locator: Locator, hub: Hub) -> None:
        self._locator = locator
        self._hub = hub
        self._state: RepoState | None = None

    @property
    def provenance(self) -> str:
        """`hf://org/repo@<commit>/folder`."""
        if self._state is None:
            return str(self._locator)
        pinned = Locator(kind=self._locator.kind, steps=self._locator.steps, revision=self._state.commit)
        return str(pinned)

    def listing(self) -> Mapping[str, Mark]:
        """Asked for once: a commit does not change."""
        if self._state is None:
            self._state = self._asked(self._look)
        here = {
            path.removeprefix(self._prefix): mark
            for path, mark in self._state.files.items()
            if path.startswith(self._prefix)
        }
        listing = {name: mark for name, mark in here.items() if "/" not in name}
        if not listing:
            raise NotFound(f"source {self._locator}: there is no such folder in the repository")
        return listing

    def read(self, name: str, max_bytes: int, on_bytes: Callable[[int], None]) -> bytes:
        assert self._state is not None, "it is listed before it is read"
        repo, revision, commit = self._locator.repo, self._locator.revision, self._state.commit
        place = self._asked(lambda: self._hub.download(repo, revision, commit, self._prefix + name, on_bytes))
        with place.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise PayloadTooLarge(f"{name} has more than {max_bytes} bytes, which is what this server accepts")
        return content

    @property
    def _prefix(self) -> str:
        return "".join(f"{step}/" for step in self._locator.steps[2:])

    def _look(self) -> RepoState:
        wanted = [self._prefix + name for name in WANTED]
        return self._hub.look(self._locator.repo, self._locator.revision, wanted)

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except ServeError:
            raise
        except Exception as error:  # the library's HTTP errors differ from release to release
            raise _refusal(str(self._locator), error) from error


def _refusal(source: str, error: Exception) -> ServeError:
    what = f"source {source}"
    if isinstance(error, GatedRepoError):
        return Forbidden(f"{what}: the repository is gated; ask for access with the account of the server's HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return NotFound(
            f"{what}: there is no such repository, or it is private and needs an HF_TOKEN that the server has not"
        )
    if isinstance(error, RevisionNotFoundError):
        return NotFound(f"{what}: the repository has no such revision")
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        why = (
            "the server is offline (HF_HUB_OFFLINE) and"
            if constants.HF_HUB_OFFLINE
            else "the hub cannot be reached and"
        )
        return FetchFailed(f"{what}: {why} the hub's cache on this machine does not hold it", retry_after_s=30.0)
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return FetchFailed(f"{what}: the hub answered {status}; try later", retry_after_s=30.0)
    return FetchFailed(f"{what}: the hub cannot be read ({type(error).__name__}); try later", retry_after_s=30.0)
