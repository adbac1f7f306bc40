#!/bin/sh
# One archive for machines without internet: the committed checkout, a wheel of each package of requirements.lock, and model folders.
# Run from the root of the checkout: sh workflow/bundle.sh [MODEL_FOLDER ...]. The wheels fit machines with this operating system, processor and Python version.
set -eu
test -x .venv/bin/python || { echo "bundle: .venv/bin/python is missing; fix: make install"; exit 1; }
version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
name=elbowsynth-$(git rev-parse --short HEAD)-python$version
if [ -n "$(git status --porcelain --untracked-files=no)" ]; then echo "bundle: changes that are not committed are left out"; fi
for folder in "$@"; do
    if [ ! -d "$folder" ]; then echo "bundle: no such model folder: $folder; expected folders in the format of diffusers"; exit 1; fi
done
mkdir -p dist
part=dist/.$name
rm -rf "$part"
trap 'rm -rf "$part"' EXIT
mkdir -p "$part/$name/wheels"

git archive HEAD | tar -x -C "$part/$name"
echo "Downloading the packages of requirements.lock (about 3 GB) ..."
.venv/bin/python -m pip wheel -q --disable-pip-version-check --require-hashes --no-deps -r requirements.lock -w "$part/$name/wheels"
# Packages without a published wheel were built here, so the hashes are those of the wheels, not of the lock file
(cd "$part/$name/wheels" && for wheel in *.whl; do
    package=$(echo "$wheel" | cut -d- -f1)
    release=$(echo "$wheel" | cut -d- -f2)
    echo "$package==$release --hash=sha256:$(sha256sum "$wheel" | cut -d' ' -f1)"
done > requirements.txt)
for folder in "$@"; do
    mkdir -p "$part/$name/models"
    cp -rL "$folder" "$part/$name/models/"
done
tar -c -f "$part/$name.tar" -C "$part" "$name"
mv "$part/$name.tar" "dist/$name.tar"
size=$(du -m "dist/$name.tar" | cut -f1)
count=$(wc -l < "$part/$name/wheels/requirements.txt")
echo "dist/$name.tar: $size MB, $count packages, $# model folders. On the other machine, with Python $version: tar -xf $name.tar && cd $name && make install"
