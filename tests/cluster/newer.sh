#!/bin/bash
# newer.sh [PYTEST OPTIONS]: the tests on a real Slurm, on that of Debian 13 (24.11) whatever this machine has.
# Its /usr, /etc and /var lie over this machine's in a mount namespace that ends with the tests; all else is this
# machine's, the checkout and its Python too. They are made once, in the cache; remove them there to have newer ones.
set -euo pipefail

fail() {
  echo "newer.sh: $*" >&2
  exit 1
}

# in a new mount namespace: put the other system in place, then become the command
if [ "${1-}" = --inside ]; then
  root=$2 stdlib=$3 python=$4 link=$2/usr/bin/${4##*/}
  shift 4
  if [[ $stdlib = /usr/lib/* ]]; then # Debian's own Python; the newer Debian has another one
    if [ -L "$link" ]; then rm "$link"; fi
    mkdir -p "$root$stdlib" && touch "$link"
    mount --bind "$stdlib" "$root$stdlib" && mount --bind "$python" "$link"
  else # where every user may run it
    mount --bind "${stdlib%/lib/*}" "$root/usr/local"
    if [ ! -L "$link" ]; then ln -sf "/usr/local/bin/${python##*/}" "$link"; fi
  fi
  for folder in usr etc var; do mount --rbind "$root/$folder" "/$folder"; done
  mount -t tmpfs -o mode=755 tmpfs /run # no service of this machine can be reached, nor started
  exec "$@"
fi

cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || fail "only root can put another system in the place of this one"
[ -x .venv/bin/python ] || fail "no .venv here; first: make install"
[[ -L /bin && -L /lib ]] || fail "on this machine /bin and /lib are not in /usr"
command -v debootstrap >/dev/null || fail "no debootstrap here; apt-get install debootstrap"
unshare --mount true 2>/dev/null || fail "this machine lets root make no mount namespace"
root=${XDG_CACHE_HOME:-$HOME/.cache}/bert-newer-slurm
python=$(readlink -f .venv/bin/python)
stdlib=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
inside() { unshare --mount tests/cluster/newer.sh --inside "$1" "$stdlib" "$python" "${@:2}"; }

if [ ! -d "$root" ]; then
  echo "newer.sh: Debian 13 into $root, once ..." >&2
  mkdir -p "${root%/*}"
  new=$(mktemp -d "$root.XXXXXX")
  trap 'rm -rf "$new" "$new.log"' EXIT
  chmod 755 "$new"
  # shellcheck disable=SC2016 # apt puts the value in
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | sed 1q)
  eval "$(apt-config shell http_proxy Acquire::http::Proxy)" && export http_proxy
  debootstrap --variant=minbase --force-check-gpg trixie "$new" ${mirror:+"$mirror"} &>"$new.log" ||
    fail "debootstrap: $(tail -n 1 "$new.log")"
  cp /etc/hosts "$new/etc/hosts"
  sed -i "s/^UID_MIN.*/UID_MIN 20000/" "$new/etc/login.defs" # users of tests are not those of a run on this machine
  libraries=(libbz2-1.0 libexpat1 libffi8 liblzma5 libncursesw6 libreadline8t64 libsqlite3-0 libssl3t64 libuuid1 zlib1g)
  read -ra slurm < <(.venv/bin/python -c 'from slurm.devcluster.packages import *; print(*SLURM, *DATABASE)')
  DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 inside "$new" apt-get install -y -qq --no-install-recommends \
    "${slurm[@]}" "${libraries[@]}" strace git gcc libc6-dev &>"$new.log" || fail "apt-get: $(tail -n 1 "$new.log")"
  mv -T "$new" "$root"
fi
inside "$root" .venv/bin/python -m pytest -m cluster "$@"
