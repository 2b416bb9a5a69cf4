#!/usr/bin/env bash
# Make .track-env, the landmark detector's own environment (about 400 MB), and try it.
#
# mediapipe 0.10.21 is the last release with the face models inside its wheel. It declares numpy < 2 and jax (800 MB)
# that face mesh and selfie segmentation do not use, so it is installed without its dependencies beside those it does
# use, and called as a subprocess: no version here meets the project's own.
#
# usage: bash tools/make_track_env.sh [folder]        PYTHON=/path/to/python3.12 overrides the interpreter
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
env=${1:-$root/.track-env}
worker=$root/src/geodiff4d/tracking/mediapipe_worker.py

packages=(
  absl-py==2.3.1
  attrs==25.4.0
  cffi==2.0.0
  contourpy==1.3.3
  cycler==0.12.1
  flatbuffers==25.9.23
  fonttools==4.60.1
  kiwisolver==1.4.9
  matplotlib==3.10.7
  numpy==2.2.6
  opencv-python-headless==4.12.0.88
  packaging==25.0
  pillow==12.0.0
  protobuf==4.25.8
  pycparser==2.23
  pyparsing==3.2.5
  python-dateutil==2.9.0.post0
  six==1.17.0
  sounddevice==0.5.3
)
mediapipe=mediapipe==0.10.21

# The stamp is the list itself: another list, or a run that was cut short, installs again.
wanted=$(printf '%s\n' "$mediapipe" "${packages[@]}")
if [[ -x $env/bin/python && -f $env/stamp && $(cat "$env/stamp") == "$wanted" ]]; then
  echo "$env is up to date"
else
  found=
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
      found=$candidate
      break
    fi
  done
  if [[ -z $found && -x $root/.venv/bin/python ]]; then found=$root/.venv/bin/python; fi
  if [[ -z $found ]]; then
    echo "make_track_env: Python 3.11 or 3.12 with the venv module is needed: install one, or set PYTHON=/path/to/python3.12" >&2
    exit 1
  fi
  echo "setting up $env with $("$found" --version)"
  rm -rf "$env"
  "$found" -m venv "$env"
  "$env/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps "$mediapipe" "${packages[@]}"
fi

# The models talk on stderr even when all is well.
if ! "$env/bin/python" "$worker" --self-test 2> "$env/self-test.log"; then
  tail -n 20 "$env/self-test.log" >&2
  echo "make_track_env: the detector was installed but does not run: see $env/self-test.log" >&2
  exit 1
fi
printf '%s\n' "$wanted" > "$env/stamp"
