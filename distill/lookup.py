"""Finding what a person meant: a config by its bare name, a word by its nearest spelling. No heavy imports here."""

import difflib
from pathlib import Path


def find_config(name: str) -> str:
    """Find a config: as given, else in `configs/` here, else in the `configs/` beside the package.

    Raises:
        FileNotFoundError: there is none; the message lists near names.
    """
    folders = [Path(), Path("configs"), Path(__file__).parent.parent / "configs"]
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    known = sorted({path.name for folder in folders[1:] for path in folder.glob("*.yaml")})
    raise FileNotFoundError(f"no config '{name}' here or in configs/{did_you_mean(name, known)}; there are {', '.join(known) or 'none'}")


def did_you_mean(word: str, known: tuple[str, ...] | list[str]) -> str:
    """Give `. Did you mean 'x'?` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f". Did you mean '{near[0]}'?" if near else ""
