#!/bin/sh
# The programs of other people that tests run against: installed from Debian's packages where they are missing.
set -eu
missing=""
for pair in cc:gcc cc:libc6-dev nginx:nginx-light prometheus:prometheus promtool:prometheus chromium:chromium curl:curl node:nodejs npm:npm; do
  command -v "${pair%%:*}" >/dev/null 2>&1 || [ -x "/usr/sbin/${pair%%:*}" ] || missing="$missing ${pair#*:}"
done
[ -n "$missing" ] || exit 0
sudo=""
if [ "$(id -u)" != 0 ]; then
  sudo=sudo
fi
echo "installing$missing"
if ! command -v apt-get >/dev/null 2>&1; then
  echo "the tests need these programs:$missing; install them, then run this again" >&2
  exit 2
fi
export DEBIAN_FRONTEND=noninteractive
# Nothing may start by itself: a test starts what it needs, on a port of its own.
$sudo sh -c "printf '#!/bin/sh\nexit 101\n' > /tmp/vserve-policy && chmod +x /tmp/vserve-policy"
policy=/usr/sbin/policy-rc.d
[ -e "$policy" ] || { $sudo cp /tmp/vserve-policy "$policy"; trap '$sudo rm -f "$policy"' EXIT; }
$sudo apt-get update -qq
# shellcheck disable=SC2086 # a list of words
$sudo apt-get install -qq -y --no-install-recommends $missing >/dev/null
