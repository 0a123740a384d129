#!/usr/bin/env bash
# rich 15.0.0 and CPython's readline (GNU): once a program has imported `readline`, as pytest does,
# programs that it starts on a terminal of their own may not see that terminal's size.
#
# GNU readline puts COLUMNS and LINES of what it takes for the terminal (80 and 24 where there is none)
# into the process's environment. os.environ does not show them, but children inherit them, unless they
# are started with `env=os.environ`; children of those do show them, workers of pytest-xdist among
# them. rich prefers COLUMNS to the size of the terminal, and does not follow when that changes.
# Seen: on a terminal of 120 columns a width of 120 before the import, 80 behind it, 120 with
# `env=os.environ`. Fails if that changes; skips a Python whose readline is libedit or missing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install rich==15.0.0
cat > "$work/widths.py" <<'PY'
import fcntl, importlib.util, os, pty, struct, subprocess, sys, termios

CODE = "from rich.console import Console; print(Console().width)"


def width(**options):
    main, below = pty.openpty()
    fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), below)
    subprocess.run([sys.executable, "-c", CODE], check=True, **ends, **options)
    return int(os.read(main, 100))


found = [width()]
if importlib.util.find_spec("readline") is None:
    print("no readline: skipped")
    sys.exit()
import readline

if "libedit" in (readline.__doc__ or ""):
    print("libedit: skipped")
    sys.exit()
found += [width(), width(env=os.environ)]
print("before the import, behind it, behind it with env=os.environ:", *found)
assert found == [120, 80, 120]
PY
env -u COLUMNS -u LINES TERM=xterm "$work/venv/bin/python" "$work/widths.py" </dev/null
