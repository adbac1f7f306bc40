#!/bin/sh
# requirements.lock: every package of settings.ini with its hashes, for Linux and macOS and all Python versions that setup.py allows.
set -eu
.venv/bin/python - > .venv/requirements.in <<'END'
from configparser import ConfigParser
c = ConfigParser(delimiters=['='])
c.read('settings.ini')
print('\n'.join((c['DEFAULT']['requirements']+' '+c['DEFAULT']['dev_requirements']).split()))
END
.venv/bin/uv pip compile -q --universal --generate-hashes --python-version 3.11 --no-annotate --custom-compile-command "make lock" .venv/requirements.in -o requirements.lock
