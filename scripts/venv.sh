# Sourced by the other scripts: make or reuse a virtual environment and install the project into it.
# ABR_VENV chooses the environment (default: .venv in the repository), PYTHON the interpreter that makes it.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
install_packages() {
    # Most of what these packages hold is never imported; what is gets compiled then, if Python may keep the bytecode.
    [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || set -- --no-compile "$@"
    python -m pip install --quiet --disable-pip-version-check "$@"
}
fail() { echo "error: $*" >&2; exit 1; }

# oldest_versions: the lowest versions that setup.cfg allows, as constraints; of torch the tested one, because older ones
# come with CUDA.
oldest_versions() {
    sed -nE '/^ +torch /d; s/^ +([A-Za-z0-9_-]+) >= ([0-9.]+).*/\1==\2/p' setup.cfg
    grep '^torch==' constraints.txt
}

# install_project EXTRAS [CONSTRAINTS]: install the repository in place, e.g. `install_project "[test]"`, at the tested
# versions, or at those of a file.
install_project() {
    local venv=${ABR_VENV:-.venv} python=${PYTHON:-python3} constraints=${2:-constraints.txt}
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "Python 3.11 or newer is needed; $python is older or missing. Name another one with PYTHON=..."
        echo "Making the virtual environment $venv"
        "$python" -m venv "$venv" || fail "$python cannot make a virtual environment. Is its venv package installed?"
    fi
    export PATH="$(cd "$venv" && pwd)/bin:$PATH"
    local stamp="$venv/.installed$1"
    if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
        echo "Installing abr_trainer$1 into $venv"
        # torch first: its pinned version, before another package asks for any.
        install_packages "$(grep '^torch==' constraints.txt)" ||
            fail "torch could not be installed; see above."
        install_packages --editable ".$1" --constraint "$constraints" ||
            fail "the project could not be installed; see above."
        touch "$stamp"
    fi
}

# install_deepspeed: DeepSpeed at the tested version, without compiling its kernels. It builds with the torch that is there.
install_deepspeed() {
    python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('deepspeed') is None)" && return
    echo "Installing DeepSpeed"
    install_packages --upgrade setuptools wheel --constraint constraints.txt &&
        DS_BUILD_OPS=0 install_packages --no-build-isolation --editable ".[deepspeed]" --constraint constraints.txt ||
        echo "DeepSpeed does not install here: its tests will be skipped."
}
