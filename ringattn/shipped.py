"""Where recipes and configurations are: an installed package holds them, in a checkout they stand beside it."""

from pathlib import Path

PACKAGE = Path(__file__).parent
INSTALLED = (PACKAGE / "recipes").is_dir()
HOME = PACKAGE if INSTALLED else PACKAGE.parent
CONFIGS = HOME / "configs"
