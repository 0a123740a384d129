#!/usr/bin/env bash
# torch 2.13.0: the second library that a process builds by one name has another name.
# `torch.utils.cpp_extension.load(name, sources, build_directory=...)` is called twice by one process,
# with the same name, another source and another, empty folder. The first folder gets same.so, the
# second one same_v1.so: versions are counted by name alone, in the process, whatever the folder. A
# second process that builds the second source alone gets same.so. So who keeps libraries in folders
# of their own and looks for NAME.so finds it or not, by what else the process has built. Fails if
# that changes. Needs a C++ compiler.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install torch==2.13.0 numpy setuptools ninja
export PATH="$work/venv/bin:$PATH"
for answers in "1 2" 2; do
  "$work/venv/bin/python" - "$work" $answers <<'PY'
import pathlib
import sys
import tempfile

from torch.utils.cpp_extension import load

found = []
for answer in sys.argv[2:]:
    folder = pathlib.Path(tempfile.mkdtemp(dir=sys.argv[1]))
    source = folder / "same.cpp"
    source.write_text(f'extern "C" int answer() {{ return {answer}; }}\n')
    load("same", [str(source)], build_directory=str(folder), is_python_module=False)
    found.append(*(path.name for path in folder.glob("*.so")))
print(f"sources {' and '.join(sys.argv[2:])} in folders of their own: {' and '.join(found)}")
assert found == ["same.so", "same_v1.so"][: len(found)], "torch does it otherwise now"
PY
done
