#!/bin/sh
# Install requirements.lock into .venv with uv (which pip installs if it is missing), else with pip. Run from the root of the checkout.
set -eu
for p in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$p" -c 'import sys; sys.exit(not (3,11)<=sys.version_info[:2]<=(3,13))' 2>/dev/null; then python=$p; break; fi
done
if [ -z "${python:-}" ]; then echo "elbowsynth requires Python 3.11, 3.12 or 3.13; not found as python3, python3.13, python3.12 or python3.11; fix: set PYTHON=/path/to/python"; exit 1; fi
start=$(date +%s)
echo "Installing into .venv with $("$python" --version) (once; about a minute on a fast connection, 6 GB on disk) ..."
"$python" -m venv --clear .venv || { echo "$python cannot create environments; fix: on Debian and Ubuntu install python3-venv"; exit 1; }
if [ -d wheels ]; then                              # the archive of `make bundle`: no internet is needed
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-index --find-links wheels --no-deps --require-hashes -r wheels/requirements.txt
else
    if command -v uv >/dev/null 2>&1; then uv=uv; else
        uv=.venv/bin/uv
        sed -n '/^uv==/,/[^\\]$/p' requirements.lock > .venv/uv.txt      # the locked version, with its hashes
        .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r .venv/uv.txt >/dev/null 2>&1 || uv=
    fi
    if [ -n "$uv" ] && "$uv" --version >/dev/null 2>&1
    then VIRTUAL_ENV="$PWD/.venv" "$uv" pip install -q --require-hashes -r requirements.lock
    else .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
    fi
fi
.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --use-pep517 -e .
.venv/bin/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" >/dev/null 2>&1 || :    # it would request news from the web
mkdir -p .venv/share/jupyter/lab/settings           # JupyterLab lists the start page directly below the folders
echo '{"@jupyterlab/filebrowser-extension:browser": {"sortNotebooksFirst": true}}' > .venv/share/jupyter/lab/settings/overrides.json
echo "$(($(date +%s)-start))" > .venv/installed
echo "Installed in $(cat .venv/installed) s."
