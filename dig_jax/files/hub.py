"""Files of the Hugging Face Hub."""

import contextlib
import pathlib
import re
from collections.abc import Iterator
from types import ModuleType

from dig_jax.errors import CheckpointError, install_command, one_line

PREFIX = "hf://"
"""What models of the Hub begin with where a local path is also possible."""

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_repository(name: str) -> bool:
    """Return whether a name has the form of a repository id, owner/name."""
    return bool(_REPOSITORY.fullmatch(name))


def repository_of(url: str) -> str:
    """Return the repository id of hf://owner/name.

    Raises:
        CheckpointError: anything else.
    """
    repository = url.removeprefix(PREFIX)
    if not is_repository(repository):
        raise CheckpointError(f"invalid model of the Hugging Face Hub: got {url}; expected hf://OWNER/NAME")
    return repository


def download(repository: str, file: str) -> pathlib.Path:
    """Return the path of a file in the Hub's local cache, after downloading it if necessary.

    Raises:
        CheckpointError: the package huggingface_hub is missing, or the download failed. The message neither
            names the repository nor starts a sentence.
    """
    library = _library("a download from the Hugging Face Hub")
    try:
        return pathlib.Path(library.hf_hub_download(repository, file))
    except Exception as error:  # raised by the network, the Hub or its cache
        raise CheckpointError(f"the download from the Hugging Face Hub failed ({_reason(error)})") from error


def upload(repository: str, folder: pathlib.Path, message: str, keep: str) -> str:
    """Upload the files of a folder as one commit; a new repository is created.

    Args:
        repository: owner/name.
        folder: the files.
        message: first line of the commit's message.
        keep: file that is not replaced if the repository has it.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the package huggingface_hub is missing, or the upload failed.
    """
    library = _library("an upload to the Hugging Face Hub")
    with _naming(f"cannot upload to {PREFIX}{repository}"):
        api = library.HfApi()
        api.create_repo(repository, exist_ok=True)
        ignored = [keep] if api.file_exists(repository, keep) else []
        made = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=ignored
        )
    return str(made.commit_url)


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # raised by the network or the Hub
        raise CheckpointError(f"{what}: {_reason(error)}") from error


def _library(what: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{what} needs the package huggingface_hub: {install_command('latents')}"
        ) from error
    return huggingface_hub


def _reason(error: Exception) -> str:
    """Return why a request failed, in one line; the library's own messages have several."""
    name = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if name == "GatedRepoError":
        return "the repository is gated; accept its terms on the Hub, then run `hf auth login`"
    if name in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
        return "no such file in the repository"
    if status == 404:
        return "no such repository, or it is private; then run `hf auth login`"
    if status in (401, 403) or name == "LocalTokenNotFoundError":
        return "no permission; run `hf auth login` or set HF_TOKEN to a token that may do this"
    if name in ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout"):
        return "the Hub is unreachable, or HF_HUB_OFFLINE is set, and the file is not in the cache"
    return one_line(error)
