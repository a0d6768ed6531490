"""What pyproject.toml cannot say: two folders at the top of the repository are installed inside of the package.

A wheel holds `recipes/` as `ringattn.recipes` and `configs/` as `ringattn.configs`, one beside the other as here. The
other packages are found, which excludes naming these two beside them in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ringattn", "ringattn.*"]), "ringattn.recipes", "ringattn.configs"],
    package_dir={"ringattn.recipes": "recipes", "ringattn.configs": "configs"},
    package_data={"ringattn": ["py.typed"], "ringattn.training.page": ["*.jinja"], "ringattn.configs": ["**/*.yaml"]},
    include_package_data=False,
)
