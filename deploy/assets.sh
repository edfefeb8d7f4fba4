#!/bin/sh
# The parts of /docs and /redoc that others wrote: taken from npm at these versions, compressed, put where they are served.
#   deploy/assets.sh            write vserve/api/static
# A new version: change it here with its integrity (npm view NAME@VERSION dist.integrity), run this, run the browser tests.
set -eu
SWAGGER_UI=5.35.0
SWAGGER_UI_INTEGRITY="sha512-U06rpMtW9V3XPGOBeamTUSr0Z09jMX4IJuANpE/EZbAhw0G8CgwrzU4YmXkn/h0wCDNsXdGarTNNHC3sU8yVUQ=="
REDOC=2.5.3
REDOC_INTEGRITY="sha512-bBbat+Sx6xKWdyoCGTtA0BWeTEW9Vs4VnEja7q7ZLOk4IM7cHQLrf+kDxWF6dKeKxT8kOBnoy/OsNXCeLttpyQ=="

static=$(cd "$(dirname "$0")/../vserve/api/static" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

take() { # NAME VERSION INTEGRITY
  archive=$(cd "$folder" && npm pack --silent "$1@$2")
  found="sha512-$(openssl dgst -sha512 -binary "$folder/$archive" | openssl base64 -A)"
  [ "$found" = "$3" ] || { echo "$1@$2 is not what it was: $found" >&2; exit 1; }
  mkdir "$folder/$1"
  tar -xzf "$folder/$archive" -C "$folder/$1" --strip-components 1
}

pack() { # FILE: compressed without a name and a time, so that the same file gives the same bytes
  sed -e '/^\/[/*]# sourceMappingURL=/d' "$folder/$1" | gzip -9 -n > "$static/$(basename "$1").gz"
}

take swagger-ui-dist "$SWAGGER_UI" "$SWAGGER_UI_INTEGRITY"
take redoc "$REDOC" "$REDOC_INTEGRITY"

# Redoc shows a logo from its makers' server.  Nothing may leave the server's own origin, so the link to them has no picture.
bundle="$folder/redoc/bundles/redoc.standalone.js"
logo=https://cdn.redoc.ly/redoc/logo-mini.svg
blank='data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7'
[ "$(grep -o "$logo" "$bundle" | wc -l)" = 1 ] || { echo "redoc@$REDOC: the logo is not where it was" >&2; exit 1; }
sed -i "s|$logo|$blank|" "$bundle"

pack swagger-ui-dist/swagger-ui-bundle.js
pack swagger-ui-dist/swagger-ui.css
pack redoc/bundles/redoc.standalone.js
{
  echo "Swagger UI $SWAGGER_UI (swagger-ui-bundle.js, swagger-ui.css)"; echo
  cat "$folder/swagger-ui-dist/NOTICE" "$folder/swagger-ui-dist/LICENSE"
  printf '\n\nParts of swagger-ui-bundle.js\n\n'
  cat "$folder/swagger-ui-dist/swagger-ui-bundle.js.LICENSE.txt"
  printf '\n\nRedoc %s (redoc.standalone.js; the address of a logo in it was replaced)\n\n' "$REDOC"
  cat "$folder/redoc/LICENSE"
  printf '\n\nParts of redoc.standalone.js\n\n'
  cat "$folder/redoc/bundles/redoc.standalone.js.LICENSE.txt"
} > "$static/LICENSES.txt"
ls -l "$static"
