#!/usr/bin/env bash
# Makes the environment once, then trains: ./train.sh [options of `simpletuner train`].
# With no config it trains the embedded example; ENV=name trains config/name/config.json. `./train.sh configure` makes a config.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/scripts/environment.sh"
make_environment "$here"
cd "$here"
[ "${1:-}" = configure ] && exec "$here/.venv/bin/simpletuner" "$@"

has_config() {
    local suffix argument name
    [ -n "${CONFIG_PATH:-}" ] && return 0
    for name in "${ENV:-}" "${SIMPLETUNER_ENV:-}" "${SIMPLETUNER_ENVIRONMENT:-}"; do
        case "$name" in "" | /*) ;; *) return 0 ;; esac # containers set ENV to a shell's start-up file
    done
    for suffix in json toml env; do
        { [ -f "config/config.$suffix" ] || [ -f "config.$suffix" ]; } && return 0
    done
    for argument in "$@"; do
        case "$argument" in --config | --config=* | --env | --env=* | --example | --example=* | env=* | example=* | -h | --help) return 0 ;; esac
    done
    return 1
}

if ! has_config "$@"; then
    echo "No config found: training the embedded example 'digits'. For your own pictures see README.md."
    set -- --example digits "$@"
fi
exec "$here/.venv/bin/simpletuner" train "$@"
