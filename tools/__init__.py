"""Tools, each run as python -m tools.NAME in the project's root; no file of the top level needs them."""
import configurator  # noqa: F401 - first, as it says how to install what is missing
