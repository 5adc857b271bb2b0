"""Files of the Hugging Face Hub."""

import pathlib
import re

from dig_jax.errors import CheckpointError, install_command, one_line

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_repository(name: str) -> bool:
    """Return whether a name has the form of a repository id, owner/name."""
    return bool(_REPOSITORY.fullmatch(name))


def download(repository: str, file: str) -> pathlib.Path:
    """Return the path of a file in the Hub's local cache, after downloading it if necessary.

    Raises:
        CheckpointError: the package huggingface_hub is missing, or the download failed. The message neither
            names the repository nor starts a sentence.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            "a download from the Hugging Face Hub needs the package huggingface_hub:"
            f" {install_command('latents')}"
        ) from error
    try:
        return pathlib.Path(hf_hub_download(repository, file))
    except Exception as error:  # raised by the network, the Hub or its cache
        raise CheckpointError(f"the download from the Hugging Face Hub failed ({one_line(error)})") from error
