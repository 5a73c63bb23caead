"""Tools, each run as python -m tools.NAME in the project's root; no file of the top level needs them."""
