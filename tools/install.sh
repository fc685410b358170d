# Installs the packages of a lock file into .venv, and task tags itself: sh tools/install.sh LOCK
# pip fetches uv, which installs the rest in seconds. What uv can't do here, pip does by itself.
set -eu
cd "$(dirname "$0")/.."
lock=$1 uv=.venv/uv/bin/uv

python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable); sys.exit(
    sys.version_info < (3, 11) and "Python 3.11 or later is required: "
    "add PYTHON=python3.12, say, to the words of make")')
if [ -t 2 ]; then quiet=; else quiet=--quiet; fi  # on a terminal, pip and uv show bars

# Without pip, which would take seconds and 26 MB, unless this Python has none outside of .venv.
if "$python" -c 'import pip' 2> /dev/null; then
    "$python" -m venv --without-pip .venv
    pip() { "$python" -m pip "$@"; }
    into_venv="--python .venv/bin/python"
else
    "$python" -m venv .venv
    pip() { .venv/bin/python -m pip "$@"; }
    into_venv=
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# uv does not read pip's settings. A variable that is set already is left as it is.
use_as() {
    value=$(sed -n "s/^[^=]*\.$2='\(.*\)'\$/\1/p" .venv/settings |
        sed 's/\\n/ /g; s/^ *//' | head -n 1)
    [ -z "$value" ] || eval "export $1=\"\${$1:-\$value}\""
}

with_uv() {
    trap 'rm -f .venv/settings' EXIT
    (umask 077 && pip config list > .venv/settings) &  # may have passwords
    [ -x "$uv" ] || {
        echo "  fetching uv, which installs the rest"
        sed -n '/^uv==/,/[^\\]$/p' requirements.lock > .venv/uv.lock
        pip install $quiet --require-hashes --no-deps --no-compile \
            --target .venv/uv -r .venv/uv.lock || return
    }
    wait
    use_as UV_DEFAULT_INDEX index-url
    use_as UV_INDEX extra-index-url
    use_as UV_FIND_LINKS find-links
    use_as UV_NO_INDEX no-index
    use_as SSL_CERT_FILE cert
    use_as ALL_PROXY proxy
    export UV_INDEX_STRATEGY=unsafe-best-match  # as pip; the hashes say what is good
    echo "  installing the packages of $lock"
    "$uv" pip install $quiet --python .venv/bin/python --no-deps --require-hashes -r "$lock" &&
        "$uv" pip install $quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
}

with_pip() {
    echo "  installing the packages of $lock with pip, which takes longer"
    pip $into_venv install $quiet --no-deps --require-hashes -r "$lock"
    pip $into_venv install $quiet --no-deps --no-build-isolation -e .
}

with_uv || with_pip
