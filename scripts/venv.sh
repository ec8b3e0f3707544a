# Sourced by the other scripts: create or reuse a virtual environment and install the project into it.
# ABR_VENV sets the environment (default: .venv in the repository), PYTHON the interpreter that creates it.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# pip_sources: where pip is set up to look for packages, as options. uv takes the same options, but does not read pip's settings.
pip_sources() {
    local name value each
    python -m pip config list | sed -nE "s/^[^=]*\.(index-url|extra-index-url|find-links)='(.*)'$/\1 \2/p" |
        while read -r name value; do
            for each in $value; do echo "--$name=$each"; done
        done
}
install_packages() {
    # uv takes a tenth of pip's time. Where it is missing, or does not find a package, pip does the work.
    local sources
    mapfile -t sources < <(pip_sources)
    if { python -c 'import uv' || python -m pip install --quiet "$(grep '^uv==' constraints.txt)"; } 2> /dev/null &&
        python -m uv pip install --quiet --index-strategy unsafe-best-match "${sources[@]}" "$@" 2> /dev/null; then
        return
    fi
    # Most modules of these packages are never imported, so compile them on import, if Python may write bytecode.
    [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || set -- --no-compile "$@"
    python -m pip install --quiet --disable-pip-version-check "$@"
}
fail() { echo "error: $*" >&2; exit 1; }

# oldest_versions: the lowest versions that setup.cfg allows, as constraints. For torch it is the tested version, because
# older ones come with CUDA.
oldest_versions() {
    sed -nE '/^ +torch /d; s/^ +([A-Za-z0-9_-]+) >= ([0-9.]+).*/\1==\2/p' setup.cfg
    grep '^torch==' constraints.txt
}

# install_project EXTRAS [CONSTRAINTS]: install the repository in editable mode, e.g. `install_project "[test]"`, with the
# tested versions, or with those of a constraints file.
install_project() {
    local venv=${ABR_VENV:-.venv} python=${PYTHON:-python3} constraints=${2:-constraints.txt}
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "Python 3.11 or newer is needed, but $python is older or missing. Set another one with PYTHON=..."
        echo "Creating the virtual environment $venv"
        "$python" -m venv "$venv" || fail "$python cannot create a virtual environment. Is its venv package installed?"
    fi
    export PATH="$(cd "$venv" && pwd)/bin:$PATH"
    local stamp="$venv/.installed$1"
    if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
        echo "Installing abr_trainer$1 into $venv"
        # Install torch first, so that no other package installs another version.
        install_packages "$(grep '^torch==' constraints.txt)" ||
            fail "torch could not be installed; see above."
        install_packages --editable ".$1" --constraint "$constraints" ||
            fail "the project could not be installed; see above."
        touch "$stamp"
    fi
}

# install_deepspeed: install the tested version of DeepSpeed without compiling its kernels. It builds with the installed torch.
install_deepspeed() {
    python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('deepspeed') is None)" && return
    echo "Installing DeepSpeed"
    install_packages --upgrade setuptools wheel --constraint constraints.txt &&
        DS_BUILD_OPS=0 install_packages --no-build-isolation --editable ".[deepspeed]" --constraint constraints.txt ||
        echo "DeepSpeed cannot be installed here, so its tests will be skipped."
}
