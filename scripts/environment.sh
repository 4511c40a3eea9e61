# Sourced by train.sh and test.sh: makes .venv with the tested versions, once.

# Python 3.10 to 3.13: the one asked for, the machine's own, or any other.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

# Debian and Ubuntu ship Python without venv; with the right to install it, we do.
install_packages() {
    local sudo=""
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || return 1
        sudo="sudo -n"
    fi
    command -v apt-get >/dev/null || return 1
    echo "Installing $* with apt-get"
    $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
}

give_up() {
    echo "error: $1" >&2
    echo "  hint: $2" >&2
    exit 1
}

# make_environment FOLDER [EXTRA]: FOLDER/.venv holds the package and what it needs.
make_environment() {
    local here=$1 extra=${2:-} python stamp wanted
    stamp="$here/.venv/.simpletuner-${extra:-run}"
    wanted="$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum) $here"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$here/.venv/bin/python" -c "" 2>/dev/null && return 0

    python=$(find_python) || { install_packages python3 python3-venv && python=$(find_python); } ||
        give_up "no Python between 3.10 and 3.13 was found" "sudo apt install python3 python3-venv, or set PYTHON=/path/to/python"
    if [ ! -x "$here/.venv/bin/python" ] || ! "$here/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$here/.venv"
        "$python" -m venv "$here/.venv" >/dev/null 2>&1 ||
            { install_packages python3-venv && "$python" -m venv --clear "$here/.venv"; } ||
            give_up "$python has no venv module" "sudo apt install python3-venv"
    fi
    echo "Setting up .venv (once; $("$here/.venv/bin/python" --version), this downloads PyTorch) ..."
    "$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$here/constraints.txt" \
        --editable "$here${extra:+[$extra]}" ||
        give_up "the packages could not be installed" "see the lines above; a second call goes on where this one stopped"
    echo "$wanted" >"$stamp"
    # The tests' environment can train too: say so, and train.sh installs nothing.
    [ -z "$extra" ] || echo "$wanted" >"$here/.venv/.simpletuner-run"
}
