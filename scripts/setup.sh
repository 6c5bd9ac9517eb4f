# Sourced by the other scripts: makes .venv if it is missing, and installs moejax with the extras named in $1 into it.
# A second call with nothing changed is quick.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

setup() {
    local extras=$1 stamp=.venv/.installed-$1
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "python3 is $(python3 --version); moejax needs 3.11 or later" >&2
            exit 1
        }
        echo "making .venv" >&2
        python3 -m venv --clear .venv || exit 1
    fi
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ scripts/constraints.txt -nt "$stamp" ]; then
        echo "installing moejax[$extras] into .venv" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt \
            --editable ".[$extras]" || exit 1
        touch "$stamp"
    fi
}
