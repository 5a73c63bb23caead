# Sourced by the other scripts: make .venv once, install what the file named in $1 lists, and put it first on PATH.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv || { echo "error: python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 1; }
fi
export PATH="$PWD/.venv/bin:$PATH"
stamp=.venv/.$(basename "$1")
if ! cmp -s "$1" "$stamp"; then
    pip install --quiet --disable-pip-version-check -r requirements.txt -r "$1" && cp "$1" "$stamp" || exit 1
fi
