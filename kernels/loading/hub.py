"""A Hugging Face repository id -> a local folder, from the Hub's cache or, where there is a network, the Hub.

Only what we read is fetched: safetensors, configs, tokenizer, chat template; never pickles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ...protocol.errors import ModelNotFound

PATTERNS: Final = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer.json", "*.jinja")


def fetch_repository(repository: str) -> Path:
    """The folder of a repository's files, fetched if need be. Raises ModelNotFound, offline too."""
    # Imported here: it costs 0.3 s and is needed by nobody who gives a file.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = list(PATTERNS)
    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=patterns, local_files_only=True)
        if (Path(folder) / "config.json").exists():
            return Path(folder)
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as exc:
        raise ModelNotFound(f"{repository!r} is no repository id: {exc}") from exc
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except LocalEntryNotFoundError as exc:
        raise ModelNotFound(
            f"{repository!r} is neither a local path nor in the Hugging Face cache, and the Hub cannot be reached: "
            "check the spelling and the network, or give a folder or a .gguf file"
        ) from exc
    except (HfHubHTTPError, OSError) as exc:
        first_line = str(exc).strip().partition("\n")[0]
        raise ModelNotFound(
            f"{repository!r} cannot be fetched from the Hugging Face Hub: {first_line}; check the name, and that "
            "you have access (hf auth login)"
        ) from exc
