"""A name of the Hugging Face Hub, as a user writes it where a path may stand: ORG/NAME[@REVISION][:FILE]."""

import re
from dataclasses import dataclass

_WORD = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repository>{_WORD}/{_WORD})(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>[^:\s]+))?", re.ASCII)
_FILES = (".gguf", ".safetensors", ".onnx", ".json", ".bin", ".git")  # endings of files, never of repositories


# of a page, or of a file; a path has one slash where an address has two
_ADDRESS = re.compile(
    rf"(?:https?:/+[^/]+|hf:)/+(?P<repository>{_WORD}/{_WORD})"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#\s]+)(?:/(?P<file>[^?#\s]+))?)?/?(?:[?#].*)?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubName:
    """A repository of models, and what of it is wanted. `str` gives the name back."""

    repository: str
    revision: str | None = None
    """A branch, a tag or a commit; None: the main branch."""
    file: str | None = None
    """The file that holds the weights, by its path in the repository; None: the only one there is."""

    @classmethod
    def parse(cls, text: str) -> "HubName | None":
        """The name that `text` is, or None if it cannot be one."""
        found = _NAME.fullmatch(text)
        if found is None or found["repository"].endswith(_FILES) or any(x in found["repository"] for x in ("--", "..")):
            return None
        if found["file"] and (found["file"].startswith("/") or ".." in found["file"].split("/")):
            return None
        return cls(found["repository"], found["revision"], found["file"])

    @classmethod
    def of_address(cls, text: str) -> "HubName | None":
        """The name of what is at an address of the Hub's pages; None if it is no such address."""
        found = _ADDRESS.fullmatch(text)
        return None if found is None else cls(found["repository"], found["revision"], found["file"])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{f':{self.file}' if self.file else ''}"
