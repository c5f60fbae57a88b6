#!/usr/bin/env bash
# Download one of the pix2pix datasets to ./datasets/NAME; without a NAME the names are listed.
#
#   bash datasets/download_pix2pix_dataset.sh facades
#
# IMAGE_TRANSLATION_MIRROR=http://... takes the files from another server of the same layout.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# -I: modules of the folder util/ must not stand in for those of the standard library
exec "${PYTHON:-python3}" -I "$root/util/get_data.py" dataset pix2pix "$@"
