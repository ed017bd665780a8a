#!/bin/sh
# Compares today's curves with those recorded on this device, or records them where there are none yet. To accept a
# change, delete the workflow's cache of the curves.
# Usage: .github/curves.sh GLM4FT MODEL FILE
set -eu
if [ -f "$3" ]; then
  "$1" baseline compare "$3" --keep "$(dirname "$3")/today"
else
  "$1" baseline record --model "$2" --seeds 5 --output "$3"
fi
