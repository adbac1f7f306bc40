"What every test can use, and the word on what was left out"
import os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
ALL = os.environ.get('ELBOWSYNTH_ALL', '') not in ('', '0')
left_out = []

def pytest_configure(config):
    config.addinivalue_line('markers', 'long(why): takes minutes; left out unless ALL=1')

def pytest_collection_modifyitems(config, items):
    if ALL: return
    left_out.extend((i.nodeid, i.get_closest_marker('long').args[0]) for i in items if i.get_closest_marker('long'))
    items[:] = [i for i in items if not i.get_closest_marker('long')]

def pytest_terminal_summary(terminalreporter):
    skipped = [(r.nodeid, r.longrepr[2].removeprefix('Skipped: ')) for r in terminalreporter.stats.get('skipped', [])]
    if not left_out+skipped: return
    terminalreporter.section('left out')
    for name, why in left_out+skipped: terminalreporter.write_line(f'{name}: {why}')
    if left_out: terminalreporter.write_line('`make test ALL=1` runs the long ones, too')

def sh(*command, cwd=ROOT, check=True, timeout=1200, **env):
    "Run a command of this environment and return it finished, its output as text"
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    base = {k: v for k, v in os.environ.items() if not k.startswith('ELBOWSYNTH_') and k != 'JPY_SESSION_NAME'}
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
                          env=base | {'PATH': path, 'JUPYTER_PREFER_ENV_PATH': '1', 'HF_HUB_OFFLINE': '1'} | env)
    if check and done.returncode: pytest.fail(f'{" ".join(map(str, command))} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}')
    return done

def copy_of_checkout(to):
    "What a clone would hold: the files that git knows, as they are here"
    if shutil.which('git'): names = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')
    else: names = [str(p.relative_to(ROOT)) for p in ROOT.rglob('*') if p.is_file() and not {'.venv', '_runs', '_docs', '_proc', '.git', '__pycache__'} & set(p.relative_to(ROOT).parts)]
    for name in names:
        if name and (ROOT/name).exists():
            (to/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/name, to/name)
    return to
