"""A model on the Hugging Face Hub: its folder has the layout of a Hub repository.

Separate from the classifier, so that opening a model imports neither the Hub's client nor HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from cnn2gnn_dist.inference.copying import check_target, copy_model
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory import decisions

REPLACED = (
    *(f"{artefact.MEMORY}/{name}" for name in ("segments/*", "versions/*", decisions.FILE)),
    artefact.CALIBRATION,
)
"""Patterns of files of which an upload leaves only those that it contains."""


class HubFolder(ModelHubMixin):
    """The folder of a model, for the Hub's ``from_pretrained`` and ``push_to_hub``.

    Args:
        folder: of the model, on this disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Copy the model to a folder; a copy that is refused leaves the folder as it is.

        Args:
            save_directory: the folder.
            **options: see ``huggingface_hub.ModelHubMixin.save_pretrained``.

        Raises:
            UserError: see ``copy_model``.
        """
        check_target(
            self.folder, Path(save_directory)
        )  # the Hub's client removes config.json first
        found: str | None = super().save_pretrained(save_directory, **options)
        return found

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model, and delete what the repository has of an earlier memory: it may show forgotten images.

        The history of the repository keeps it nevertheless.

        Args:
            repo_id: name of the repository.
            **options: see ``huggingface_hub.ModelHubMixin.push_to_hub``.
        """
        given = options.pop("delete_patterns", None) or []
        patterns = [given] if isinstance(given, str) else list(given)
        found: str = super().push_to_hub(repo_id, delete_patterns=[*patterns, *REPLACED], **options)
        return found

    def _save_pretrained(self, save_directory: Path) -> None:
        copy_model(self.folder, save_directory)

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **_: Any,
    ) -> HubFolder:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        return cls(folder)
