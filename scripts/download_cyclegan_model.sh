#!/usr/bin/env bash
# Download released cyclegan weights to ./checkpoints/NAME_pretrained; without a NAME, list them.
#
#   bash scripts/download_cyclegan_model.sh facades_label2photo
#
# IMAGE_TRANSLATION_MIRROR=http://... takes the files from another server of the same layout.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# -I: modules of the folder util/ must not stand in for those of the standard library
exec "${PYTHON:-python3}" -I "$root/util/get_data.py" model cyclegan "$@"
